"""Value-gradient guidance (DPS): the sampling loop."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import guidance_step
from .guidance import Guidance, check_finite
from .task import Sampled, SamplingTask, sampled
from .transitions import ReverseSDE


def sample_dps(task: SamplingTask, guidance: Guidance) -> Sampled:
    """Integrate the guided velocity ``u - c_t grad V`` from the first noise level to the last (METHOD.md §5).

    Steps that are not guided evaluate the denoiser alone.

    Raises:
        FloatingPointError: velocity, value, gradient or latents are not finite; names the step.
    """
    latents, condition = task.start(), task.condition
    values = latents.new_full((task.num_steps, len(latents)), float("nan"))
    grad = None
    for step, sigma, sigma_next in task.steps():
        evaluates = task.denoiser.value is not None and guidance.is_active(step, sigma)
        if evaluates:
            cond, uncond, values[step], grad = task.denoiser.branches_with_value(latents, sigma, condition)
        else:
            cond, uncond = task.denoiser.branches(latents, sigma, condition)
        pull = grad if evaluates or (grad is not None and guidance.goes_on(step, sigma)) else None
        noise = task.step_noise(sigma, sigma_next)
        checked = {"value": values[step], "gradient": grad} if evaluates else {}
        latents = _step(task, guidance, step, latents, cond, uncond, pull, checked, noise, sigma, sigma_next)
        task.on_step()
    return sampled(task, values, latents)


def _step(
    task: SamplingTask,
    guidance: Guidance,
    step: int,
    latents: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    grad: Tensor | None,
    checked: dict[str, Tensor],
    noise: Tensor | None,
    sigma: float,
    sigma_next: float,
) -> Tensor:
    """The next latents; by the fused op where the transition is one that it knows."""
    condition, transition = task.condition, task.transition
    if condition.rescale is not None:  # the fused step knows the plain formula alone
        cond, uncond = condition.guide(cond, uncond), None
    if not isinstance(transition, ReverseSDE):
        velocity = condition.guide(cond, uncond)
        check_finite(step, sigma, velocity=velocity, **checked)
        if grad is not None:
            velocity = velocity.float() - guidance.term(velocity, grad, sigma)
        following = transition(latents, velocity, sigma, sigma_next, noise)
        check_finite(step, sigma, latents=following)
        return following
    latents_coef, velocity_coef, noise_coef = transition.coefficients(sigma, sigma_next)
    following, norms = guidance_step(
        latents,
        cond,
        uncond,
        grad,
        noise if noise_coef else None,
        guidance_scale=condition.guidance_scale,
        strength=0.0 if grad is None else guidance.amount(sigma),
        relative=guidance.mode == "relative",
        latents_coef=latents_coef,
        velocity_coef=velocity_coef,
        noise_coef=noise_coef,
    )
    if not _all_finite(norms, following, *checked.values()):
        if checked:
            check_finite(step, sigma, velocity=condition.guide(cond, uncond), **checked)
        check_finite(step, sigma, latents=following)
    return following


def _all_finite(*tensors: Tensor) -> bool:
    """One question to the device for all of them."""
    return bool(torch.stack([torch.isfinite(t).all() for t in tensors]).all())
