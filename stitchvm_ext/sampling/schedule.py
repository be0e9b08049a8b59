"""Noise levels of a pipeline's own scheduler."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ..backbones import DiffusionBackbone


def pipeline_sigmas(pipe, backbone: DiffusionBackbone, num_inference_steps: int, latent_hw: tuple[int, int]) -> Tensor:
    """The noise levels at which ``pipe(num_inference_steps=...)`` evaluates its transformer, and the final 0.

    They come from the installed scheduler's ``set_timesteps``, static and resolution-dependent (dynamic) shifting
    included, and are never recomputed here. The scheduler is copied first: ``pipe.scheduler`` keeps its state.

    Args:
        pipe: a pipeline whose scheduler is a ``FlowMatchEulerDiscreteScheduler``.
        num_inference_steps: T, at least 1.
        latent_hw: height and width of the latents, which dynamic shifting depends on.

    Returns:
        float32 [T+1] on the CPU, strictly decreasing from at most 1 to 0.

    Raises:
        TypeError: the scheduler is of another class, so its noise levels are not those of a rectified flow.
        ValueError: its noise levels do not decrease from within (0, 1] to 0.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

    if not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        raise TypeError(
            "pipe.scheduler: expected a flow-matching scheduler (FlowMatchEulerDiscreteScheduler), "
            f"got {type(pipe.scheduler).__name__}"
        )
    scheduler = copy.deepcopy(pipe.scheduler)
    config, options = scheduler.config, {}
    if config.get("use_dynamic_shifting"):
        h, w = backbone.grid(latent_hw)
        options["mu"] = calculate_shift(
            h * w,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.16),
        )
    scheduler.set_timesteps(num_inference_steps, device="cpu", **options)
    sigmas = scheduler.sigmas.to(torch.float32)
    if not (bool((sigmas.diff() < 0).all()) and sigmas[0] <= 1 and sigmas[-1] == 0):
        raise ValueError(
            "pipe.scheduler: expected noise levels that decrease from at most 1 to 0, "
            f"got {sigmas[0].item():g} .. {sigmas[-1].item():g} (is invert_sigmas set?)"
        )
    return sigmas
