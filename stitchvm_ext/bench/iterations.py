"""Iterations of training as the variants of a benchmark.

On the playground alone, whose models are small enough to be trained; ``stitchvm plan --method nft|draft`` counts the
large ones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..training import CleanReward, TrainingConfig
from ..training.trainer import Trainer
from .scales import Setup, build
from .suite import measure

PROMPTS = ["a red circle", "two blue squares", "a green ring"]
COMMON = {"max_sequence_length": 0}  # of every configuration

Variants = dict[str, tuple[type[Trainer], TrainingConfig]]


def run_iterations(
    variants: Variants, scale: str, name: str, *, out: Path, device: str, pixels: int | None, rounds: int
) -> dict[str, Any]:
    """Measure iterations of trainers in turns.

    Args:
        variants: the trainer and its configuration by name. One with a ``stop_window`` trains against the stitched
            value, one without against the clean reward.

    Raises:
        ValueError: another scale than the playground.
    """
    if scale != "playground":
        raise ValueError(f"scale: expected playground for an iteration of training, got {scale!r}")
    setup = build(scale, device, pixels)
    with tempfile.TemporaryDirectory() as scratch:
        calls = {
            variant: _iterations(setup, trainer, config, Path(scratch) / str(number))
            for number, (variant, (trainer, config)) in enumerate(variants.items())
        }
        return measure(setup, calls, name, out=out, rounds=rounds)


def _iterations(
    setup: Setup, trainer: type[Trainer], config: TrainingConfig, folder: Path
) -> Callable[[], dict[str, float]]:
    """The next iteration of a trainer, which all start alike."""
    one = build("playground", setup.device)  # a pipeline of its own: the adapter becomes a part of it
    value = CleanReward(one.pipe, one.reward) if config.stop_window is None else one.value
    training = trainer(
        one.pipe, value, PROMPTS, config, output_dir=folder, held_out={"clip": one.reward}, eval_prompts=PROMPTS[:1]
    )

    def iterate() -> dict[str, float]:
        row = training.iterate(training.iteration)
        training.iteration += 1
        return row

    return iterate


def print_shares(result: dict[str, Any], stitched: str, *clean: str) -> None:
    """The time of the stitched iteration over that of each clean one."""
    rows = result["variants"]
    for variant in clean:
        share = rows[stitched]["median_ms"] / rows[variant]["median_ms"]
        print(f"the stitched iteration takes {share:.2f} of the time of: {variant}")
