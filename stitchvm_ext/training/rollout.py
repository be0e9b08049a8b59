"""Rollouts: from noise to z_tau, without a gradient."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from ..backbones import Condition, DiffusionBackbone, precompute_conditioning
from ..sampling.transitions import dpm_solver_2m, get_transition, ode
from .sharding import is_sharded

SOLVERS = ("ode", "linear_sde", "flow_grpo", "dpm_solver")


@torch.no_grad()
def roll_out(
    backbone: DiffusionBackbone,
    condition: Condition,
    sigmas: Tensor,
    generators: Sequence[torch.Generator],
    latent_shape: Sequence[int],
    solver: str = "ode",
    stops: Sequence[int] | None = None,
    passes: int = 0,
) -> tuple[Tensor, Tensor]:
    """Follow the (guided) velocity from noise for as many steps as each sample is to take.

    A sample that has stopped leaves the batch. Its noise comes from its own generator, so it does not depend on the
    samples beside it.

    Args:
        sigmas: [T+1], decreasing to 0.
        generators: one per sample.
        latent_shape: C, H, W.
        solver: "ode" (Euler), "linear_sde" or "flow_grpo" (see :mod:`sampling.transitions`), or "dpm_solver", the
            second-order multistep DPM-Solver++.
        stops: 1 .. T steps per sample; all T by default.
        passes: how often the denoiser is to run at least, although all samples have stopped: other processes wait for
            it where its weights are split over them.

    Returns:
        z_tau float32 [B, C, H, W] and tau float32 [B], ``sigmas[stops]``.
    """
    step = None if solver == "dpm_solver" else get_transition(solver)
    draw = lambda rows: torch.stack([torch.randn(*latent_shape, generator=generators[r]) for r in rows])  # noqa: E731
    stops = torch.as_tensor([len(sigmas) - 1] * len(condition) if stops is None else list(stops))
    running = list(range(len(condition)))
    z = backbone.process.flow_latents(draw(running).to(backbone.device), sigmas[:1].to(backbone.device))
    found = torch.empty_like(z)
    previous: tuple[Tensor, float] | None = None
    with backbone.fused(), modulation_table(backbone, sigmas, condition):
        for number, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas.tolist()), 1):
            velocity = backbone.guided_velocity(z, sigma, condition).float()
            if step is None:
                z, previous = dpm_solver_2m(z, velocity, sigma, sigma_next, previous)
            else:
                noise = None if step is ode else draw(running).to(z.device)
                z = step(z, velocity, sigma, sigma_next, noise).float()
            stopped = [k for k, row in enumerate(running) if stops[row] == number]
            if stopped:
                found[[running[k] for k in stopped]] = z[stopped]
                going = [k for k, row in enumerate(running) if stops[row] > number]
                if not going:
                    break
                running, z, condition = [running[k] for k in going], z[going], condition.rows(going)
                previous = None if previous is None else (previous[0][going], previous[1])
        for _ in range(number, passes):
            backbone.guided_velocity(z, sigma, condition)
    return found, sigmas[stops]


def modulation_table(backbone: DiffusionBackbone, sigmas: Tensor, condition: Condition):
    """A context in which the AdaLN vectors of a schedule and its texts are read from a table, where that is known to
    be possible: see :func:`precompute_conditioning`.
    """
    if type(backbone.denoiser).__name__ != "SD3Transformer2DModel" or is_sharded(backbone.denoiser):
        return nullcontext()
    pooled = [branch["pooled_prompt_embeds"] for branch in (condition.cond, condition.uncond) if branch]
    return precompute_conditioning(backbone, sigmas, torch.cat(pooled))
