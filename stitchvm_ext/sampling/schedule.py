"""Noise levels of a pipeline's own scheduler."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ..backbones import DDPM, DiffusionBackbone


def pipeline_sigmas(pipe, backbone: DiffusionBackbone, num_inference_steps: int, latent_hw: tuple[int, int]) -> Tensor:
    """The noise levels at which ``pipe(num_inference_steps=...)`` evaluates its denoiser, and the final 0.

    They come from the installed scheduler's ``set_timesteps``, static and resolution-dependent (dynamic) shifting
    included, and are never recomputed here. The scheduler is copied first: ``pipe.scheduler`` keeps its state. The
    timesteps of DDPM models are given as flow times, see :class:`~stitchvm_ext.backbones.DDPM`.

    Args:
        pipe: a pipeline whose scheduler suits its backbone: FlowMatchEuler, or another one with ``use_flow_sigmas``,
            for flows; any with ``alphas_cumprod`` for DDPM models.
        num_inference_steps: T, at least 1.
        latent_hw: height and width of the latents, which dynamic shifting depends on.

    Returns:
        float32 [T+1] on the CPU, strictly decreasing from at most 1 to 0. A scheduler that visits a timestep twice
        (PNDM) gives fewer.

    Raises:
        TypeError: the scheduler's noise levels are not those of a rectified flow, and the backbone is one.
        ValueError: its noise levels do not decrease from within (0, 1] to 0.
    """
    scheduler = copy.deepcopy(pipe.scheduler)
    options = backbone.timestep_options(scheduler.config, num_inference_steps, tuple(latent_hw))
    is_ddpm = isinstance(backbone.process, DDPM)
    if not is_ddpm:
        check_flow_scheduler(scheduler)
    if "sigmas" not in options:
        options["num_inference_steps"] = num_inference_steps
    scheduler.set_timesteps(**options, device="cpu")
    if is_ddpm:
        sigmas = torch.cat([backbone.process.flow_time(scheduler.timesteps).unique().flip(0), torch.zeros(1)])
    else:
        sigmas = scheduler.sigmas.to(torch.float32)
    if not (bool((sigmas.diff() < 0).all()) and sigmas[0] <= 1 and sigmas[-1] == 0):
        raise ValueError(
            "pipe.scheduler: expected noise levels that decrease from at most 1 to 0, "
            f"got {sigmas[0].item():g} .. {sigmas[-1].item():g} (is invert_sigmas set?)"
        )
    return sigmas


def check_flow_scheduler(scheduler) -> None:
    """Raises TypeError unless a scheduler's ``sigmas`` are noise levels of a rectified flow."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and not scheduler.config.get("use_flow_sigmas"):
        raise TypeError(
            "pipe.scheduler: expected a flow-matching scheduler (FlowMatchEulerDiscreteScheduler, or one with "
            f"use_flow_sigmas), got {type(scheduler).__name__}"
        )
