"""Training for a reward on the playground: DRaFT, DiffusionNFT and DPO, with the clean reward and the stitched value.

    python benchmarks/alignment.py --value prompted_values/captions

The stitched value of the result is one that reads the prompt (see prompted_value.py): the embedded one, which does not,
tells samples of one prompt hardly apart at these noise levels (see group_signal.py).

Every run starts from the embedded generator and is judged by the clean reward, a held-out reward and the exact checker
on held-out prompts, sampled without guidance by the moving average of its weights. Seconds are the processor's, of one
thread, and like the network evaluations those of training alone. A run that was stopped goes on; ``--runs`` makes some
of them, in a process per core, and the call without it collects all. Writes results/alignment.json and alignment.png.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from stitchvm_ext import StitchedValue
from stitchvm_ext.bench.harness import RESULTS, save
from stitchvm_ext.measure import count_evaluations
from stitchvm_ext.playground import load_pipeline, load_reward, load_value, world
from stitchvm_ext.playground.experiments import checker_measures, held_out_prompts
from stitchvm_ext.training import (
    CleanReward,
    DPOConfig,
    DPOTrainer,
    DraftConfig,
    DraftTrainer,
    NFTConfig,
    NFTTrainer,
    TrainingConfig,
)

SEEDS = (0, 1, 2, 3, 4, 5)
PROMPTS, EVAL_PROMPTS = 256, 64  # different ones to train on, held-out ones to judge by
COMMON = {"lora_rank": 16, "lora_alpha": 32, "eval_steps": 20, "max_sequence_length": 0, "rollout_batch_size": 32,
          "train_batch_size": 32, "save_every": 5}  # fmt: skip
DRAFT = {"iterations": 40, "prompts_per_iteration": 16, "num_inference_steps": 10, "learning_rate": 5e-4,
         "kl_weight": 0.01, "eval_every": 10}  # fmt: skip
NFT = {"iterations": 12, "prompts_per_iteration": 8, "group_size": 12, "num_inference_steps": 10, "learning_rate": 1e-3,
       "kl_weight": 0.0, "timestep_fraction": 0.5, "updates_per_iteration": 4, "eval_every": 1}  # fmt: skip
DPO = {"iterations": 60, "prompts_per_iteration": 2, "group_size": 12, "num_inference_steps": 10, "learning_rate": 1e-3,
       "pairs_per_group": 4, "levels_per_pair": 2, "eval_every": 15}  # fmt: skip
HALFWAY, EARLY = (5, 7), (3, 7)  # METHOD.md §6: 12-17 of 25 steps for NFT, 3-7 of 10 for DRaFT
BEFORE_THREE = (4, 7)  # a gradient through three steps needs one before them

TRAINERS = {
    "draft-1 clean": (DraftTrainer, DraftConfig(**COMMON, **DRAFT, last_steps=1)),
    "draft-3 clean": (DraftTrainer, DraftConfig(**COMMON, **DRAFT, last_steps=3)),
    "draft-1 stitched": (DraftTrainer, DraftConfig(**COMMON, **DRAFT, last_steps=1, stop_window=EARLY)),
    "draft-3 stitched": (DraftTrainer, DraftConfig(**COMMON, **DRAFT, last_steps=3, stop_window=BEFORE_THREE)),
    "nft clean": (NFTTrainer, NFTConfig(**COMMON, **NFT)),
    "nft stitched": (NFTTrainer, NFTConfig(**COMMON, **NFT, stop_window=HALFWAY)),
    "dpo clean": (DPOTrainer, DPOConfig(**COMMON, **DPO)),
    "dpo stitched": (DPOTrainer, DPOConfig(**COMMON, **DPO, stop_window=HALFWAY)),
}
MEASURES = ("target_reward", "held_out_reward", "objects", "colors", "count")
COUNTED = ("denoiser", "value", "decoder")


class Checker:
    """One measure of the exact checker in a reward's place."""

    def __init__(self, measure: str):
        self.measure = measure

    def output(self, images: torch.Tensor, pooled_only: bool) -> torch.Tensor:
        return images.cpu()

    def encode_condition(self, prompts: tuple[str, ...]) -> tuple[str, ...]:
        return prompts

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        return checker_measures(images, prompts)[self.measure]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=list(TRAINERS), metavar="NAME", help="make these runs, no result")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--work", type=Path, default=Path("alignment_runs"), help="folder of the runs")
    parser.add_argument("--value", type=Path, help="folder of a stitched value; by default the embedded one")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="different ones to train on")
    parser.add_argument("--eval-prompts", type=int, default=EVAL_PROMPTS)
    args = parser.parse_args()

    runs = [
        {"method": name.split()[0], "value": name.split()[1], "seed": seed, "curve": train(name, seed, args)}
        for seed in args.seeds
        for name in args.runs or TRAINERS
    ]
    if args.runs:
        return
    settings = {name: describe(config) for name, (_, config) in TRAINERS.items()}
    result = {"prompts": args.prompts, "eval_prompts": args.eval_prompts, "settings": settings, "runs": runs}
    result["stitched_value"] = args.value.name if args.value else "embedded"
    for run in runs:
        first, last = run["curve"][0], run["curve"][-1]
        figures = ", ".join(f"{m} {first[m]:.3f} -> {last[m]:.3f}" for m in MEASURES)
        print(f"{run['method']} {run['value']} seed {run['seed']}: {last['seconds']:.0f} s, {figures}")
    plot(runs, RESULTS / "alignment.png")
    print(f"wrote {save('alignment', result)}")


def load_stitched(pipe, folder: Path | None) -> StitchedValue:
    return load_value(pipe) if folder is None else StitchedValue.from_pretrained(folder, pipe)


def describe(config: TrainingConfig) -> dict[str, Any]:
    """The settings that are this benchmark's own."""
    names = [*COMMON, *DRAFT, *NFT, *DPO, "last_steps", "stop_window"]
    return {name: getattr(config, name) for name in dict.fromkeys(names) if hasattr(config, name)}


def training_prompts(count: int) -> list[str]:
    """Distinct captions of the world that are not held out."""
    return list(dict.fromkeys(picture.caption for picture in world.dataset(4 * count, seed=5)))[:count]


def train(name: str, seed: int, args: argparse.Namespace) -> list[dict[str, float]]:
    """A run of TRAINERS, with the value that its name says."""
    trainer_class, config = TRAINERS[name]
    pipe, reward = load_pipeline(), load_reward("clip")
    value = CleanReward(pipe, reward) if name.endswith("clean") else load_stitched(pipe, args.value)
    return run(trainer_class, config, pipe, value, name, seed, args)


def run(trainer_class, config, pipe, value, name: str, seed: int, args: argparse.Namespace) -> list[dict[str, float]]:
    """One run, to its end; its curve, a point per evaluation."""
    judges = {"target_reward": load_reward("clip"), "held_out_reward": load_reward("clip", held_out=True)}
    trainer = trainer_class(
        pipe,
        value,
        training_prompts(args.prompts),
        type(config)(**{**vars(config), "seed": seed}),
        output_dir=args.work / f"{name.replace(' ', '_')}_{seed}",
        held_out=judges | {measure: Checker(measure) for measure in MEASURES[2:]},
        eval_prompts=held_out_prompts(args.eval_prompts),
    )
    iterate = trainer.iterate
    trainer.iterate = lambda iteration: counted(trainer, iterate, iteration)
    return curve(trainer.train())


def counted(trainer, iterate, iteration: int) -> dict[str, float]:
    """An iteration's row, with what it spent. The views of the denoiser share their hooks: one counts for all."""
    began = time.process_time()
    with count_evaluations(trainer.policy) as evaluations:
        row = iterate(iteration)
    spent = {"seconds": time.process_time() - began, **{kind: getattr(evaluations, kind) for kind in COUNTED}}
    return row | {f"spent/{kind}": amount for kind, amount in spent.items()}


def curve(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """The evaluations of a run, each with what training took until then."""
    points, spent = [], dict.fromkeys(("seconds", *COUNTED), 0.0)
    for row in rows:
        for kind in spent:
            spent[kind] += row.get(f"spent/{kind}", 0.0)
        if "held_out/target_reward" in row:
            names = {"denoiser": "denoiser_evaluations", "value": "value_evaluations", "decoder": "decodings"}
            points.append(
                {"iteration": row["iteration"]}
                | {names.get(kind, kind): round(amount, 3) for kind, amount in spent.items()}
                | {measure: row[f"held_out/{measure}"] for measure in MEASURES}
            )
    return points


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """What was gained by three measures, against seconds and denoiser evaluations: mean over seeds, standard error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.5), layout="constrained")
    names = list(dict.fromkeys((run["method"], run["value"]) for run in runs))
    colors = {"draft-1": "tab:green", "draft-3": "tab:olive", "nft": "tab:blue", "dpo": "tab:red"}
    axes = figure.subplots(2, 3, sharey="col")
    costs = {"seconds": "seconds of training", "denoiser_evaluations": "denoiser evaluations"}
    for row, (cost, label) in zip(axes, costs.items(), strict=True):
        for ax, measure in zip(row, ("target_reward", "held_out_reward", "objects"), strict=True):
            for method, value in names:
                curves = [run["curve"] for run in runs if (run["method"], run["value"]) == (method, value)]
                x = torch.tensor([[point[cost] for point in c] for c in curves]).mean(0)
                y = torch.tensor([[point[measure] - c[0][measure] for point in c] for c in curves])
                error = y.std(0) / len(curves) ** 0.5 if len(curves) > 1 else torch.zeros_like(y[0])
                style = "--" if value == "clean" else "-"
                ax.plot(x, y.mean(0), style, color=colors[method], label=f"{method}, {value}")
                ax.fill_between(x, y.mean(0) - error, y.mean(0) + error, color=colors[method], alpha=0.12)
            ax.set(xlabel=label, ylabel=f"{measure.replace('_', ' ')}, gained")
            ax.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
