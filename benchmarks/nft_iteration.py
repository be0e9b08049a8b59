"""What does an iteration of DiffusionNFT cost: as its authors' code runs it, as this library does, and stitched?

    python benchmarks/nft_iteration.py --value prompted_values/rollouts

The first has what the library leaves out: LoRA layers that are not merged, also for rollouts and the old policy, a pass
of the model without them (the published weight of the KL term), and the libraries' own blocks. Samples, levels and the
policy's loss are those of the clean iteration, so its learning curve is the clean one's of nft_values.json on another
clock. Iterations of alignment.py's settings in turns; writes results/nft_iteration.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from alignment import PROMPTS, TRAINERS, training_prompts
from torch import Tensor, nn

from stitchvm_ext import CleanReward, StitchedValue
from stitchvm_ext.bench.harness import RESULTS, alternate, save
from stitchvm_ext.bench.pages import clean_nft_reaches, curves_of
from stitchvm_ext.playground import load_pipeline, load_reward
from stitchvm_ext.playground.experiments import held_out_prompts
from stitchvm_ext.training import NFTConfig, NFTTrainer
from stitchvm_ext.training.lora import lora_view


class OneAdapter(nn.Module):
    """A LoRA layer with one adapter, not merged."""

    def __init__(self, layer: nn.Module, adapter: str):
        super().__init__()
        self.base, self.scaling = layer.get_base_layer(), layer.scaling[adapter]
        self.a, self.b = layer.lora_A[adapter], layer.lora_B[adapter]

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * self.b(self.a(x))


class AsPublished(NFTTrainer):
    """Nothing merged and nothing fused."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        old = lora_view(self.policy.denoiser, lambda layer: OneAdapter(layer, "old"))
        self.old = self.policy.on(old)
        self.old.fused = self.base.fused = nullcontext

    def merged(self, adapter: str = "default"):
        return self.old if adapter == "old" else super().merged(adapter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--value", type=Path, required=True, help="folder of a stitched value")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    measured = json.loads((RESULTS / "nft_values.json").read_text())
    curves = curves_of(measured)
    if ("nft", args.value.name) not in curves:
        parser.error(f"--value: expected one that nft_values.json has runs of, got {args.value.name}")
    (_, clean), (_, stitched) = TRAINERS["nft clean"], TRAINERS["nft stitched"]
    reward = load_reward("clip")
    published = replace(clean, kl_weight=NFTConfig.kl_weight)  # the default is the published code's
    with tempfile.TemporaryDirectory() as folder:

        def trainer(trainer_class, config, name: str) -> NFTTrainer:
            pipe = load_pipeline()
            is_stitched = config.stop_window is not None
            value = StitchedValue.from_pretrained(args.value, pipe) if is_stitched else CleanReward(pipe, reward)
            judged = {"held_out": {"reward": reward}, "eval_prompts": held_out_prompts(1)}
            return trainer_class(
                pipe, value, training_prompts(PROMPTS), config, output_dir=Path(folder) / name, **judged
            )

        trainers = {
            "as published": trainer(AsPublished, published, "published"),
            "clean": trainer(NFTTrainer, clean, "clean"),
            "stitched": trainer(NFTTrainer, stitched, "stitched"),
        }
        numbers = {name: itertools.count() for name in trainers}
        losses: dict[str, list[float]] = {name: [] for name in trainers}

        def iterate(name: str) -> None:
            losses[name].append(trainers[name].iterate(next(numbers[name]))["policy_loss"])

        calls = {name: (lambda name=name: iterate(name)) for name in trainers}
        times = alternate(calls, seconds=0, rounds=args.rounds, warmup=1)
    first = [losses[name][0] for name in ("as published", "clean")]
    if not math.isclose(*first, rel_tol=1e-3):
        raise RuntimeError(f"losses: expected the same of the first clean iterations, got {first}")
    seconds = {name: of["median_ms"] / 1000 for name, of in times.items()}
    reached = iteration_reached(curves["nft", args.value.name], clean_nft_reaches(measured))
    total = curves["nft", "clean"][0][-1]["iteration"]
    shares = {}
    if reached is not None:
        stitched_seconds = reached * seconds["stitched"]
        shares = {name: stitched_seconds / (total * seconds[name]) for name in ("as published", "clean")}
    result = {"value": args.value.name, "rounds": args.rounds, "times": times, "share_of_time": shares}
    print(", ".join(f"{name}: {of:.1f} s per iteration" for name, of in seconds.items()))
    print(f"stitched at the clean runs' last held-out reward: iteration {reached} of {total}")
    for name, share in shares.items():
        print(f"in {share:.2f} of their time, {name} (1/{1 / share:.2f})")
    print(f"wrote {save('nft_iteration', result)}")


def iteration_reached(curves: list[list[dict[str, float]]], held_out_reward: float) -> int | None:
    """The first after which the mean over seeds is at least this; None where there is none."""
    for points in zip(*curves, strict=True):
        if statistics.mean(point["held_out_reward"] for point in points) >= held_out_reward:
            return points[0]["iteration"]
    return None


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
