"""What do a value and its gradient cost, by themselves?

"Tweedie" runs both branches of the denoiser, the decoder and the reward, forward and backward; the stitched value its
prefix, the stitch and the reward's suffix.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..value import TweedieValue
from .guided_step import SIGMA, build
from .scales import Setup
from .suite import Calls, measure, unfused, with_memory


def run(scale: str, name: str, *, out: Path, device: str, pixels: int | None, rounds: int) -> dict[str, Any]:
    """Measure all variants in turns."""
    setup = build(scale, device, pixels)
    return measure(setup, calls(setup), name, out=out, rounds=rounds)


def calls(setup: Setup) -> Calls:
    """V [1] and its gradient, by name."""
    question = setup.latents, SIGMA, setup.condition
    tweedie = TweedieValue(setup.pipe, setup.reward)
    stitched = lambda: setup.value.value_and_grad(*question)  # noqa: E731
    return {
        "Tweedie": unfused(lambda: tweedie.value_and_grad(*question)),
        "stitched": unfused(with_memory(setup, "save", stitched)),
        "stitched, fused": with_memory(setup, "save", stitched),
        "stitched, fused, recompute": with_memory(setup, "recompute", stitched),
    }
