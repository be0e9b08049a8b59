"""FLUX.1 [dev] and [schnell]: 32x32 images, 4x16x16 latents, 64 image tokens; two double and two single blocks."""

from __future__ import annotations

import functools

import torch

from stitchvm_ext.playground import models

from . import clip_text_encoder, spread, tiny_autoencoder


def t5_encoder(width: int = 32):
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(3)
    config = T5Config(vocab_size=len(models.WORDS), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    return T5EncoderModel(config).eval().requires_grad_(False)


@functools.cache
def tiny_flux(guidance_embeds: bool = True):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(4)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=guidance_embeds, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    tokenizer = models.build_tokenizer()
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guidance_embeds, shift=3.0),
        vae=tiny_autoencoder(),
        text_encoder=clip_text_encoder(projected=False),
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder(),
        tokenizer_2=tokenizer,
        transformer=spread(transformer, 5, 0.05).requires_grad_(False),
    )
    pipe.default_sample_size = 16  # the class has 128 for every model
    pipe.set_progress_bar_config(disable=True)
    return pipe
