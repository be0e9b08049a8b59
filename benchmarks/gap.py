"""What closes the gap to Tweedie-DPS in the reward that Tweedie differentiates: a better base, or more stage-2 steps?

    python benchmarks/gap.py --work playground-training --cells early=generator-2500.pt:1 short=generator.pt:1

Needs the work folder of ``python -m stitchvm_ext.playground.train``, and copies of its ``generator.pt`` taken at other
steps. For every cell, a generator and a number of stage-2 epochs, a value model is stitched anew, and StitchVM-DPS and
Tweedie-DPS run over the prompts and seeds of guidance.py's sweep, whose figures are those of the shipped generator and
its 3 epochs. The cells are added to those in results/gap.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from guidance import run, table

from stitchvm_ext import TweedieValue, stitch
from stitchvm_ext.bench.harness import RESULTS, save
from stitchvm_ext.evaluation.compare import Contender
from stitchvm_ext.playground import load_pipeline, load_reward
from stitchvm_ext.playground.experiments import held_out_prompts
from stitchvm_ext.playground.train import REWARD_SEEDS, Training, generator_from_state, pack
from stitchvm_ext.playground.train_value import CONFIG, PROBE_PICTURES, TRAINING_PICTURES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--cells", nargs="+", required=True, metavar="NAME=STATE:EPOCHS")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.25, 0.5])
    args = parser.parse_args()

    training = Training(args.work)
    images = training.data["images"][: PROBE_PICTURES + TRAINING_PICTURES].permute(0, 3, 1, 2)
    clips = [training.reward(seed) for seed in REWARD_SEEDS]
    path = RESULTS / "gap.json"
    cells = json.loads(path.read_text())["cells"] if path.is_file() else {}
    for name, cell in (spec.split("=", 1) for spec in args.cells):
        state, epochs = cell.rsplit(":", 1)
        with tempfile.TemporaryDirectory() as scratch:
            weights = Path(scratch) / "weights"
            pack(training.autoencoder, generator_from_state(Path(state)), clips, weights)
            pipe, reward = load_pipeline(weights), load_reward(folder=weights)
            rewards = {"reward": reward, "held_out_reward": load_reward(held_out=True, folder=weights)}
            config = replace(CONFIG, epochs=int(epochs))
            stitched = stitch(pipe, reward, images, work_dir=Path(scratch) / "value", config=config)
            methods = [Contender("unguided", None)]
            for label, value in (("stitched", stitched), ("Tweedie", TweedieValue(pipe, reward))):
                methods += [Contender(f"{label} constant {s:g}", value, {"strength": s}) for s in args.strengths]
            options = {"num_inference_steps": args.steps, "guidance_scale": 3.0}
            figures = run(pipe, methods, held_out_prompts(args.prompts), rewards, name, options)
        step = torch.load(state, weights_only=True, map_location="cpu")["step"]
        cells[name] = {"generator_steps": step, "stage_2_epochs": int(epochs), "figures": figures}
        print(f"\n{name}: generator after {step} steps, {epochs} epochs\n{table(figures)}", flush=True)
    result = {"prompts": args.prompts, "steps": args.steps, "cells": cells}
    print(f"wrote {save('gap', result)}")


if __name__ == "__main__":
    main()
