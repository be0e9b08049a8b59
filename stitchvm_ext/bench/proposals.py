"""What does one proposal of a particle method cost: a value without a gradient?

"Tweedie" with the denoiser's pass at the proposal; the same where that pass has been made anyway, so that decoder and
reward remain; and the stitched value.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..value import TweedieValue
from .guided_step import SIGMA, build
from .scales import Setup
from .suite import Calls, measure, unfused


def run(scale: str, name: str, *, out: Path, device: str, pixels: int | None, rounds: int) -> dict[str, Any]:
    """Measure all variants in turns."""
    setup = build(scale, device, pixels)
    return measure(setup, calls(setup), name, out=out, rounds=rounds)


@torch.no_grad()
def calls(setup: Setup) -> Calls:
    """V [1], by name."""
    latents, condition = setup.latents, setup.condition
    tweedie = TweedieValue(setup.pipe, setup.reward)
    velocity, sigma = torch.zeros_like(latents), torch.full((len(latents),), SIGMA, device=latents.device)
    stitched = torch.no_grad()(lambda: setup.value.value(latents, SIGMA, condition))
    return {
        "Tweedie": unfused(torch.no_grad()(lambda: tweedie.value(latents, SIGMA, condition))),
        "Tweedie, denoised before": unfused(
            torch.no_grad()(lambda: tweedie.score_velocity(latents, sigma, velocity, condition))
        ),
        "stitched": unfused(stitched),
        "stitched, fused": stitched,
    }
