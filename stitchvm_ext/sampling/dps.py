"""Value-gradient guidance (DPS): the sampling loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ..backbones import Condition, DiffusionBackbone
from ..ops import guidance_step
from ..value.base import ValueEstimator
from .guidance import Guidance, check_finite
from .transitions import ReverseSDE, Transition


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
        backbone: yields the velocity.
        value: the estimator to climb, on this backbone or one of the same latent space; None for plain sampling.
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
    latents = latents.detach().float()
    values = latents.new_full((len(sigmas) - 1, len(latents)), float("nan"))
    shares_backbone = value is not None and value.backbone.denoiser is backbone.denoiser
    for step, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas.tolist())):
        guided = value is not None and guidance.is_active(step, sigma)
        if guided and shares_backbone:
            cond, uncond, values[step], grad = value.branches_with_value(latents, sigma, condition)
        else:
            with torch.no_grad():
                cond, uncond = backbone.branches(latents, sigma, condition)
        if guided and not shares_backbone:
            values[step], grad = value.value_and_grad(latents, sigma, condition)
        if condition.rescale is not None:  # the fused step knows the plain formula alone
            cond, uncond = condition.guide(cond, uncond), None
        eps = noise() if noise else None
        if isinstance(transition, ReverseSDE):
            latents_coef, velocity_coef, noise_coef = transition.coefficients(sigma, sigma_next)
            following, norms = guidance_step(
                latents,
                cond,
                uncond,
                grad if guided else None,
                eps if noise_coef else None,
                guidance_scale=condition.guidance_scale,
                strength=guidance.amount(sigma) if guided else 0.0,
                relative=guidance.mode == "relative",
                latents_coef=latents_coef,
                velocity_coef=velocity_coef,
                noise_coef=noise_coef,
            )
            if not _all_finite(norms, following, *([values[step]] if guided else [])):
                if guided:
                    velocity = condition.guide(cond, uncond)
                    check_finite(step, sigma, velocity=velocity, value=values[step], gradient=grad)
                check_finite(step, sigma, latents=following)
        else:
            velocity = condition.guide(cond, uncond)
            if guided:
                check_finite(step, sigma, velocity=velocity, value=values[step], gradient=grad)
                velocity = velocity.float() - guidance.term(velocity, grad, sigma)
            following = transition(latents, velocity, sigma, sigma_next, eps)
            check_finite(step, sigma, latents=following)
        latents = following
        on_step()
    return latents, values


def _all_finite(*tensors: Tensor) -> bool:
    """One question to the device for all of them."""
    return bool(torch.stack([torch.isfinite(t).all() for t in tensors]).all())
