"""What closes the gap to Tweedie-DPS in the reward that Tweedie differentiates: a better base, or more stage-2 steps?

    python benchmarks/gap.py --work playground-training --generators early=generator-2500.pt final=generator.pt

Needs the work folder of ``python -m stitchvm_ext.playground.train``, and copies of its ``generator.pt`` taken at
different steps. For every generator and every length of stage 2 a value model is stitched anew, and StitchVM-DPS and
Tweedie-DPS run over the same strengths, prompts and seeds. Writes results/gap.json.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from guidance import run, table
from harness import save

from stitchvm_ext import TweedieValue, stitch
from stitchvm_ext.playground import load_pipeline, load_reward
from stitchvm_ext.playground.experiments import Method, held_out_prompts
from stitchvm_ext.playground.train import REWARD_SEEDS, Training, generator_from_state, pack
from stitchvm_ext.playground.train_value import CONFIG, PROBE_PICTURES, TRAINING_PICTURES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--generators", nargs="+", required=True, metavar="NAME=STATE")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, CONFIG.epochs])
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--schedule", default="constant")
    args = parser.parse_args()

    training = Training(args.work)
    images = training.data["images"][: PROBE_PICTURES + TRAINING_PICTURES].permute(0, 3, 1, 2)
    clips = [training.reward(seed) for seed in REWARD_SEEDS]
    cells = {}
    for name, state in (spec.split("=", 1) for spec in args.generators):
        step = torch.load(state, weights_only=True, map_location="cpu")["step"]
        with tempfile.TemporaryDirectory() as scratch:
            weights = Path(scratch) / "weights"
            pack(training.autoencoder, generator_from_state(Path(state)), clips, weights)
            pipe, reward = load_pipeline(weights), load_reward(folder=weights)
            rewards = {"reward": reward, "held_out_reward": load_reward(held_out=True, folder=weights)}
            values = {"Tweedie": TweedieValue(pipe, reward)}
            for epochs in args.epochs:
                work = Path(scratch) / f"value-{epochs}"
                config = replace(CONFIG, epochs=epochs)
                values[f"stitched, {epochs} epochs"] = stitch(pipe, reward, images, work_dir=work, config=config)
            methods = [Method("unguided", None)]
            for label, value in values.items():
                for strength in args.strengths:
                    setting = {"strength": strength, "schedule": args.schedule}
                    methods.append(Method(f"{label} {strength:g}", value, setting))
            common = {"num_inference_steps": args.steps, "guidance_scale": 3.0}
            cells[name] = {
                "generator_steps": step,
                "figures": run(pipe, methods, held_out_prompts(args.prompts), rewards, name, common),
            }
        print(f"\n{name}: generator after {step} steps\n{table(cells[name]['figures'])}", flush=True)
    result = {"prompts": args.prompts, "steps": args.steps, "schedule": args.schedule, "generators": cells}
    print(f"wrote {save('gap', result)}")


if __name__ == "__main__":
    main()
