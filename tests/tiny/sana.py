"""Sana: 32x32 images, 4x16x16 latents of a deep-compression autoencoder, 256 image tokens, three blocks."""

from __future__ import annotations

import functools

import torch

from stitchvm_ext.playground import models

from . import spread


def gemma(width: int = 32):
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(6)
    config = Gemma2Config(
        vocab_size=len(models.WORDS), hidden_size=width, intermediate_size=32, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=models.PAD_ID, bos_token_id=models.BOS_ID,
        eos_token_id=models.EOS_ID,
    )  # fmt: skip
    return Gemma2Model(config).eval().requires_grad_(False)


def deep_compression_autoencoder():
    from diffusers import AutoencoderDC

    torch.manual_seed(7)
    return AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), downsample_block_type="conv",
        scaling_factor=0.4,
    ).eval().requires_grad_(False)  # fmt: skip


@functools.cache
def tiny_sana():
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel

    torch.manual_seed(8)
    transformer = SanaTransformer2DModel(
        sample_size=16, in_channels=4, out_channels=4, num_layers=3, num_attention_heads=4, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=32,
        timestep_scale=0.5,
    )  # fmt: skip
    pipe = SanaPipeline(
        tokenizer=models.build_tokenizer(),
        text_encoder=gemma(),
        vae=deep_compression_autoencoder(),
        transformer=spread(transformer, 9, 0.05).requires_grad_(False),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.test_options = {"use_resolution_binning": False}
    pipe.set_progress_bar_config(disable=True)
    return pipe
