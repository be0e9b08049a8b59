"""What does an iteration of DiffusionNFT cost with a clean reward and with a stitched value?

The clean reward needs every rollout to its end, decoded; the stitched value reads the latents of rollouts that stop
halfway, which are then trained at the levels above that point alone. On the playground; ``stitchvm plan --method nft``
counts the large models.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..training import CleanReward, NFTConfig, NFTTrainer
from .scales import Setup, build
from .suite import Calls, measure

CLEAN, STITCHED = "clean reward", "stitched, stopped at 12-17"
STEPS, STOP = 25, (12, 17)  # METHOD.md §6


def run(scale: str, name: str, *, out: Path, device: str, pixels: int | None, rounds: int) -> dict[str, Any]:
    """Measure both in turns. Raises ValueError for another scale than the playground."""
    if scale != "playground":
        raise ValueError(f"scale: expected playground for an iteration of NFT, got {scale!r}")
    setup = build(scale, device, pixels)
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(setup, calls(setup, Path(scratch)), name, out=out, rounds=rounds)
    rows = result["variants"]
    share = rows[STITCHED]["median_ms"] / rows[CLEAN]["median_ms"]
    print(f"the stitched iteration takes {share:.2f} of the clean one's time")
    return result


def calls(setup: Setup, folder: Path) -> Calls:
    """The next iteration of two trainers that start alike."""
    prompts = ["a red circle", "two blue squares", "a green ring"]
    common = {"prompts_per_iteration": 2, "group_size": 4, "num_inference_steps": STEPS, "max_sequence_length": 0}

    def iterations(number: int, use_value: bool) -> Callable[[], Any]:
        one = build("playground", setup.device)  # a pipeline of its own: the adapter becomes a part of it
        value = one.value if use_value else CleanReward(one.pipe, one.reward)
        config = NFTConfig(**common, stop_window=STOP if use_value else None)
        trainer = NFTTrainer(
            one.pipe, value, prompts, config, output_dir=folder / str(number), held_out={"clip": one.reward},
            eval_prompts=prompts[:1],
        )  # fmt: skip

        def iterate() -> dict[str, float]:
            row = trainer.iterate(trainer.iteration)
            trainer.iteration += 1
            return row

        return iterate

    return {CLEAN: iterations(0, False), STITCHED: iterations(1, True)}
