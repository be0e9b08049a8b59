"""PixArt-Sigma and -Alpha (which reads the size of the image): 32x32 images, 4x16x16 latents, 64 image tokens."""

from __future__ import annotations

import functools

import torch

from stitchvm_ext.playground import models

from . import spread, tiny_autoencoder
from .flux import t5_encoder
from .unet import ddim


@functools.cache
def tiny_pixart(alpha: bool = False):
    from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel

    torch.manual_seed(8)
    transformer = PixArtTransformer2DModel(
        sample_size=128 if alpha else 16, num_layers=3, attention_head_dim=12, num_attention_heads=3, in_channels=4,
        out_channels=8, cross_attention_dim=36, caption_channels=32, interpolation_scale=2,
    )  # fmt: skip
    pipe = (PixArtAlphaPipeline if alpha else PixArtSigmaPipeline)(
        tokenizer=models.build_tokenizer(),
        text_encoder=t5_encoder(),
        vae=tiny_autoencoder(shift_factor=None),
        transformer=spread(transformer, 9, 0.05).requires_grad_(False),
        scheduler=ddim(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    )
    pipe.default_sample_size = 16  # the pipeline tells a model that reads sizes by its sample_size
    pipe.test_options = {"use_resolution_binning": False}
    pipe.set_progress_bar_config(disable=True)
    return pipe
