"""Several proposals for the next latent, of which the value keeps one (METHOD.md §5; SVDD, 2408.08252)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backbones import Condition
from ..value.carry import Carry
from .particles import check_values
from .task import SamplingTask


@dataclass
class Kept:
    """The kept proposals of B particles.

    Attributes:
        latents: [B, ...].
        values: V at the next noise level, float32 [B]; None where there was nothing to choose.
        carry: for the next step's denoiser pass.
        log_ratio: log of transition over proposal density [B]; None where they are the same.
    """

    latents: Tensor
    values: Tensor | None = None
    carry: Carry | None = None
    log_ratio: Tensor | None = None


def propose(
    task: SamplingTask,
    condition: Condition,
    latents: Tensor,
    velocity: Tensor,
    sigma: float,
    sigma_next: float,
    proposals: int,
    *,
    scale: float | None = None,
    pull: Tensor | None = None,
) -> Kept:
    """One step of B = S * K particles, each the best of M proposals under the value.

    The proposals of a particle share its denoiser pass; all of them are read by the value together, and what it
    computed of the kept one serves the next step's pass. With one proposal, or a step without noise, this is a plain
    step.

    Args:
        condition: one row per particle.
        velocity: [B, ...], of classifier-free guidance, float32.
        proposals: M.
        scale: draw the kept one with odds ``exp(scale V)``; None keeps the best.
        pull: [B, ...], taken off the velocity: the proposals of a guided step.

    Raises:
        FloatingPointError: a value of NaN or +inf.
    """
    particles = len(latents) // len(task)
    is_random = task.is_random(sigma, sigma_next)
    count = proposals if is_random and sigma_next > 0 else 1
    noise = task.step_noise(sigma, sigma_next, particles * count)
    repeat = lambda x: x.repeat_interleave(count, 0)  # noqa: E731
    guided = velocity if pull is None else velocity - pull
    found = task.transition(repeat(latents), repeat(guided), sigma, sigma_next, noise)
    ratio = None if pull is None else _log_ratio(task, repeat(pull), noise, sigma, sigma_next)
    if count == 1:
        return Kept(found, log_ratio=ratio)
    every = condition.rows([b for b in range(len(latents)) for _ in range(count)])
    values, carry = task.denoiser.values(found, sigma_next, every, carry=True)
    check_values(values.view(len(task), -1))
    table = values.view(-1, count)
    if scale is None:
        best = table.argmax(1)
    else:
        uniforms = task.noise.uniform(particles).view(-1, 1).to(table.device)
        odds = (scale * table.double()).nan_to_num(neginf=-1e300).softmax(1).cumsum(1)
        best = torch.searchsorted(odds / odds[:, -1:], uniforms, right=True).clamp_max(count - 1).squeeze(1)
    rows = torch.arange(len(latents), device=best.device) * count + best
    return Kept(found[rows], values[rows], carry.rows(rows) if carry else None, None if ratio is None else ratio[rows])


def _log_ratio(task: SamplingTask, pull: Tensor, noise: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """``log p(z') - log q(z')`` [B] of Gaussian steps whose means differ by what the pull moved, float64."""
    _, velocity_coef, noise_coef = task.transition.coefficients(sigma, sigma_next)
    moved = (-velocity_coef / noise_coef * pull.double()).flatten(1)  # in units of the step's standard deviation
    return -(0.5 * moved.square() + moved * noise.double().flatten(1)).sum(1)
