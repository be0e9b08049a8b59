"""What does an iteration of DRaFT cost with a clean reward and with a stitched value?

The clean reward needs every rollout to its end, and its gradient comes through the decoder and the last K steps; the
stitched value's comes through its own first blocks and the one step before the rollout stops.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..training import DraftConfig, DraftTrainer
from .iterations import COMMON, print_shares, run_iterations

CLEAN = {1: "DRaFT-1, clean reward", 3: "DRaFT-3, clean reward"}
STITCHED = "stitched, stopped at 3-7"
SAMPLES = 8
STEPS, STOP = 10, (3, 7)  # METHOD.md §6


def run(scale: str, name: str, *, out: Path, device: str, pixels: int | None, rounds: int) -> dict[str, Any]:
    """Measure all three in turns. Raises ValueError for another scale than the playground."""
    common = {**COMMON, "prompts_per_iteration": SAMPLES, "num_inference_steps": STEPS}
    variants = {
        clean: (DraftTrainer, DraftConfig(**common, last_steps=last_steps)) for last_steps, clean in CLEAN.items()
    }
    variants[STITCHED] = (DraftTrainer, DraftConfig(**common, stop_window=STOP))
    result = run_iterations(variants, scale, name, out=out, device=device, pixels=pixels, rounds=rounds)
    print_shares(result, STITCHED, *CLEAN.values())
    return result
