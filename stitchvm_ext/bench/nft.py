"""What does an iteration of DiffusionNFT cost with a clean reward and with a stitched value?

The clean reward needs every rollout to its end, decoded; the stitched value reads the latents of rollouts that stop
halfway, which are then trained at the levels above that point alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..training import NFTConfig, NFTTrainer
from .iterations import COMMON, print_shares, run_iterations

CLEAN, STITCHED = "clean reward", "stitched, stopped at 12-17"
STEPS, STOP = 25, (12, 17)  # METHOD.md §6


def run(scale: str, name: str, *, out: Path, device: str, pixels: int | None, rounds: int) -> dict[str, Any]:
    """Measure both in turns. Raises ValueError for another scale than the playground."""
    common = {**COMMON, "prompts_per_iteration": 2, "group_size": 4, "num_inference_steps": STEPS}
    variants = {
        CLEAN: (NFTTrainer, NFTConfig(**common)),
        STITCHED: (NFTTrainer, NFTConfig(**common, stop_window=STOP)),
    }
    result = run_iterations(variants, scale, name, out=out, device=device, pixels=pixels, rounds=rounds)
    print_shares(result, STITCHED, CLEAN)
    return result
