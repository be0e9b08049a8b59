"""Value-gradient guidance (DPS): the sampling loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ..backbones import Condition, DiffusionBackbone
from ..value.base import ValueEstimator
from .guidance import Guidance, check_finite
from .transitions import Transition


def sample_dps(
    backbone: DiffusionBackbone,
    value: ValueEstimator | None,
    latents: Tensor,
    sigmas: Tensor,
    condition: Condition,
    *,
    guidance: Guidance,
    transition: Transition,
    noise: Callable[[], Tensor] | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Integrate the guided velocity ``u - c_t grad V`` from the first noise level to the last (METHOD.md §5).

    Steps that are not guided evaluate the denoiser alone.

    Args:
        backbone: yields the velocity, with classifier-free guidance, of steps without value guidance.
        value: the estimator to climb; None for plain sampling.
        latents: z [B, C, H, W] at noise level ``sigmas[0]``.
        sigmas: [T+1] decreasing noise levels.
        condition: one row per latent.
        noise: draws standard normal noise like ``latents``, once per step; None for a deterministic transition.
        on_step: called after each step.

    Returns:
        float32 latents [B, C, H, W] at ``sigmas[-1]``, and values float32 [T, B]: V(z_t, t) before each step, NaN
        where it was not guided.

    Raises:
        FloatingPointError: velocity, value, gradient or latents are not finite; names the step.
    """
    latents = latents.float()
    values = latents.new_full((len(sigmas) - 1, len(latents)), float("nan"))
    for step, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas.tolist())):
        if value is not None and guidance.is_active(step, sigma):
            velocity, values[step], grad = value.denoise_with_value(latents, sigma, condition)
            check_finite(step, sigma, velocity=velocity, value=values[step], gradient=grad)
            velocity = velocity.float() - guidance.term(velocity, grad, sigma)
        else:
            with torch.no_grad():
                velocity = backbone.guided_velocity(latents, sigma, condition)
        latents = transition(latents, velocity, sigma, sigma_next, noise() if noise else None)
        check_finite(step, sigma, latents=latents)
        on_step()
    return latents, values
