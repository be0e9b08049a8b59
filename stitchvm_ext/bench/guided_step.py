"""What does one guided step cost, against plain sampling and against Tweedie-DPS?

Classifier-free guidance, one latent, one Euler step with the value's gradient. "plain" runs the denoiser alone;
"Tweedie-DPS" denoises, decodes, scores, and differentiates through all of it; the stitched ones add one thing after the
other: a prefix of the value's own, the prefix shared with the unconditional branch, fused blocks, and fewer kept
activations. All but the last two run on the libraries' own blocks. All of them read the timestep's modulation from a
table, and the layers that it replaces, a third of SD3.5 Medium's weights, are not in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbones import precompute_conditioning
from ..sampling.guidance import Guidance
from ..value import TweedieValue
from ..value.base import ValueEstimator
from . import scales
from .scales import Setup
from .suite import Calls, Rows, measure, unfused, with_memory

SIGMA, SIGMA_NEXT = 0.6, 0.55
PLAIN, TWEEDIE = "plain", "Tweedie-DPS"
TARGETS = {"faster_than_tweedie": 2.8, "time_over_plain": 1.35, "peak_over_tweedie": 0.4}  # of stitched, on a CPU


def run(scale: str, name: str, *, out: Path, device: str, pixels: int | None, rounds: int) -> dict[str, Any]:
    """Measure all variants in turns."""
    setup = build(scale, device, pixels)
    result = measure(setup, calls(setup), name, out=out, rounds=rounds, add=compare)
    for variant, ratio in result["stitched"].items():
        peak = "" if ratio["peak_over_tweedie"] is None else f", {ratio['peak_over_tweedie']:.2f} of its peak"
        print(
            f"{variant}: {ratio['faster_than_tweedie']:.2f}x faster than {TWEEDIE}{peak}; "
            f"{ratio['time_over_plain']:.2f}x plain sampling"
        )
    return result


def build(scale: str, device: str = "cpu", pixels: int | None = None) -> Setup:
    """The models of a scale, which read the modulation of the one noise level here from a table.

    The AdaLN layers that it replaces are let go for good: that makes room for Tweedie-DPS.
    """
    setup = scales.build(scale, device, pixels)
    pooled = torch.cat([text["pooled_prompt_embeds"] for text in (setup.condition.cond, setup.condition.uncond)])
    table = precompute_conditioning(setup.backbone, [SIGMA], pooled)
    setup.description["replaced_by_tables"] = sum(p.numel() for linear in table.linears for p in linear.parameters())
    table.linears.clear()
    return setup


def calls(setup: Setup) -> Calls:
    """One whole step, by name: the next latents [1, C, h, w]."""
    value, backbone = setup.value, setup.backbone
    question = setup.latents, SIGMA, setup.condition
    tweedie = TweedieValue(setup.pipe, setup.reward)

    def plain() -> tuple:
        with torch.no_grad():
            return *backbone.branches(*question), None, None

    def step(ask: Callable[[], tuple]) -> Callable[[], Tensor]:
        return lambda: _step(setup, *ask())

    own = step(lambda: ValueEstimator.branches_with_value(value, *question))
    shared = step(lambda: value.branches_with_value(*question))
    return {
        PLAIN: unfused(step(plain)),
        TWEEDIE: unfused(step(lambda: tweedie.branches_with_value(*question))),
        "stitched, own prefix": unfused(with_memory(setup, "save", own)),
        "stitched, shared": unfused(with_memory(setup, "save", shared)),
        "stitched, shared, fused": with_memory(setup, "save", shared),
        "stitched, shared, fused, recompute": with_memory(setup, "recompute", shared),
    }


def _step(setup: Setup, cond: Tensor, uncond: Tensor | None, value: Tensor | None, grad: Tensor | None) -> Tensor:
    velocity = setup.condition.guide(cond, uncond).float()
    if grad is not None:
        velocity = velocity - Guidance().term(velocity, grad, SIGMA)
    return setup.latents + (SIGMA_NEXT - SIGMA) * velocity


def compare(rows: Rows) -> dict[str, Any]:
    """The stitched variants against plain sampling and Tweedie-DPS, and what they should reach."""
    plain, tweedie = rows[PLAIN], rows[TWEEDIE]
    ratios = {
        variant: {
            "faster_than_tweedie": tweedie["median_ms"] / row["median_ms"],
            "time_over_plain": row["median_ms"] / plain["median_ms"],
            "peak_over_tweedie": row["peak_bytes"] / tweedie["peak_bytes"] if tweedie["peak_bytes"] else None,
            "flops_over_plain": row["flops"] / plain["flops"],
        }
        for variant, row in rows.items()
        if variant.startswith("stitched")
    }
    return {"targets": TARGETS, "stitched": ratios}
