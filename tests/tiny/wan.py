"""Wan 2.1: 64x64 videos, 4xTx8x8 latents, 16 tokens a frame, three blocks."""

from __future__ import annotations

import functools

import torch

from stitchvm_ext.playground import models

from . import spread


def umt5_encoder(width: int = 32):
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(12)
    config = UMT5Config(vocab_size=len(models.WORDS), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    return UMT5EncoderModel(config).eval().requires_grad_(False)


def wan_autoencoder():
    from diffusers import AutoencoderKLWan

    torch.manual_seed(13)
    return AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.7, 1.0, 2.0],
    ).eval().requires_grad_(False)  # fmt: skip


@functools.cache
def tiny_wan():
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    torch.manual_seed(14)
    transformer = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, text_dim=32, freq_dim=16,
        ffn_dim=32, num_layers=3, rope_max_seq_len=32,
    )  # fmt: skip
    pipe = WanPipeline(
        tokenizer=models.build_tokenizer(),
        text_encoder=umt5_encoder(),
        vae=wan_autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=spread(transformer, 15, 0.05).requires_grad_(False),
    )
    pipe.test_size = (64, 64)
    pipe.set_progress_bar_config(disable=True)
    return pipe
