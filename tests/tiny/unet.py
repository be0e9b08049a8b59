"""Stable Diffusion 1.5 and 2 (v-prediction), and SDXL: 32x32 images, 4x16x16 latents, U-Nets of three down blocks."""

from __future__ import annotations

import functools

import torch

from stitchvm_ext.playground import models

from . import clip_text_encoder, spread, tiny_autoencoder

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"


def ddim(prediction_type: str = "epsilon", zero_snr: bool = False, **config):
    """A first-order scheduler, by default over Stable Diffusion's noise levels, that ends at level 0."""
    from diffusers import DDIMScheduler

    levels = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", **config}
    return DDIMScheduler(
        clip_sample=False, set_alpha_to_one=True, steps_offset=1, prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr, timestep_spacing="trailing" if zero_snr else "leading", **levels,
    )  # fmt: skip


def _unet(blocks: tuple[str, ...], seed: int, **config):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=16, layers_per_block=1, block_out_channels=(16, 32, 48), norm_num_groups=8, attention_head_dim=4,
        down_block_types=blocks, up_block_types=tuple(b.replace("Down", "Up") for b in reversed(blocks)), **config,
    )  # fmt: skip
    return spread(unet, seed, 0.05).requires_grad_(False)


@functools.cache
def tiny_sd15(prediction_type: str = "epsilon"):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        unet=_unet((CROSS, CROSS, PLAIN), 6, cross_attention_dim=32),
        scheduler=ddim(prediction_type),
        vae=tiny_autoencoder(shift_factor=None),
        text_encoder=clip_text_encoder(projected=False),
        tokenizer=models.build_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def tiny_sdxl(prediction_type: str = "epsilon", zero_snr: bool = False):
    from diffusers import StableDiffusionXLPipeline

    unet = _unet(
        (PLAIN, CROSS, CROSS), 7, cross_attention_dim=64, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8, transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
    )  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        unet=unet,
        scheduler=ddim(prediction_type, zero_snr),
        vae=tiny_autoencoder(shift_factor=None),
        text_encoder=clip_text_encoder(projected=False),
        tokenizer=models.build_tokenizer(),
        text_encoder_2=clip_text_encoder(),
        tokenizer_2=models.build_tokenizer(),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
