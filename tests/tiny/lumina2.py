"""Lumina-Image 2.0: 32x32 images, 4x16x16 latents, 64 image tokens; one refiner of each kind and three blocks."""

from __future__ import annotations

import functools

import torch

from stitchvm_ext.playground import models

from . import spread, tiny_autoencoder
from .sana import gemma


@functools.cache
def tiny_lumina2(dynamic_shifting: bool = False):
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    torch.manual_seed(10)
    transformer = Lumina2Transformer2DModel(
        sample_size=16, in_channels=4, hidden_size=32, num_layers=3, num_refiner_layers=1, num_attention_heads=4,
        num_kv_heads=2, multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(300, 16, 16), cap_feat_dim=32,
    )  # fmt: skip
    pipe = Lumina2Pipeline(
        transformer=spread(transformer, 11, 0.05).requires_grad_(False),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0, use_dynamic_shifting=dynamic_shifting),
        vae=tiny_autoencoder(),
        text_encoder=gemma(),
        tokenizer=models.build_tokenizer(),
    )
    pipe.vae_scale_factor = 2  # the class has 8 for every autoencoder
    pipe.set_progress_bar_config(disable=True)
    return pipe
