"""The forward process from a state on the way: from z_tau to z_t, t > tau (METHOD.md §6).

``z_t = a z_tau + s eps`` with ``a = (1-t)/(1-tau)`` and ``s² = t² - a² tau²``. Along it the velocity's target is
``u* = a' z_tau + s' eps``, whose mean given z_t is the flow's own field at z_t, for every tau. At tau = 0 all of this
is the plain flow: ``a = 1-t``, ``s = t``, ``u* = eps - z_0``.

As t falls to tau, s goes to 0 and s' to infinity, and so does the target's variance. Without eps the same relation is

    z_tau = g z_t - h u*,   g = 1 - tau + a tau² / t,   h = (t - tau) (t + a tau) / t

in which everything is finite: g -> 1 and h -> 0 as t -> tau. So a loss between anchors, ``g z_t - h u`` and z_tau, is
the velocity's loss weighted by h², which takes the singularity away; at tau = 0 it is the loss between clean estimates,
``z_t - t u`` and z_0.

Arguments: latents [B, ...]; tau and t [B] with 0 <= tau < t <= 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backbones import expand_sigma


def _scales(tau: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """a and s. In ``s² = (t - tau) (t + a tau) / (1 - tau)`` nothing cancels."""
    a = (1 - t) / (1 - tau)
    return a, ((t - tau) * (t + a * tau) / (1 - tau)).sqrt()


def bridge(anchor: Tensor, noise: Tensor, tau: Tensor, t: Tensor) -> Tensor:
    """z_t."""
    a, s = _scales(expand_sigma(tau, anchor), expand_sigma(t, anchor))
    return a * anchor + s * noise


def bridge_velocity(anchor: Tensor, noise: Tensor, tau: Tensor, t: Tensor) -> Tensor:
    """``u* = a' z_tau + s' eps``, with ``a' = -1/(1-tau)`` and ``s' = (t + a tau²/(1-tau)) / s``."""
    tau, t = expand_sigma(tau, anchor), expand_sigma(t, anchor)
    a, s = _scales(tau, t)
    return (t + a * tau.square() / (1 - tau)) / s * noise - anchor / (1 - tau)


def predicted_anchor(latents: Tensor, velocity: Tensor, tau: Tensor, t: Tensor) -> Tensor:
    """The z_tau that a velocity at z_t implies, ``g z_t - h u``."""
    tau, t = expand_sigma(tau, latents), expand_sigma(t, latents)
    a = (1 - t) / (1 - tau)
    return (1 - tau + a * tau.square() / t) * latents - (t - tau) * (t + a * tau) / t * velocity


def training_levels(sigmas: Tensor, stop: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` different levels of a rollout's schedule above the one where it stopped, [count], in random order.

    The nearest is a whole step of the schedule away from tau: that keeps the velocity's target bounded.
    """
    return sigmas[torch.randperm(stop, generator=generator)[:count]]
