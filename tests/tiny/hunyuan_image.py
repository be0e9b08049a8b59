"""HunyuanImage 2.1, base and distilled: 32x32 images, 4x16x16 latents, 256 image tokens; two and two blocks."""

from __future__ import annotations

import functools

import torch

from stitchvm_ext.playground import models

from . import spread
from .flux import t5_encoder


def qwen_vl(width: int = 32):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(16)
    text = {
        "vocab_size": len(models.WORDS), "hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}, "pad_token_id": models.PAD_ID,
        "bos_token_id": models.BOS_ID, "eos_token_id": models.EOS_ID,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": width}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return Qwen2_5_VLForConditionalGeneration(config).eval().requires_grad_(False)


def hunyuan_image_autoencoder():
    from diffusers import AutoencoderKLHunyuanImage

    torch.manual_seed(17)
    return AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32), layers_per_block=1,
        spatial_compression_ratio=2, sample_size=32, scaling_factor=0.75,
    ).eval().requires_grad_(False)  # fmt: skip


@functools.cache
def tiny_hunyuan_image(distilled: bool = False):
    from diffusers import (
        ClassifierFreeGuidance,
        FlowMatchEulerDiscreteScheduler,
        HunyuanImagePipeline,
        HunyuanImageTransformer2DModel,
    )

    torch.manual_seed(18)
    transformer = HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, num_refiner_layers=1, attention_head_dim=8,
        num_attention_heads=4, text_embed_dim=32, text_embed_2_dim=32, rope_axes_dim=(4, 4), guidance_embeds=distilled,
    )  # fmt: skip
    tokenizer = models.build_tokenizer()
    pipe = HunyuanImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=hunyuan_image_autoencoder(),
        text_encoder=qwen_vl(),
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder(),
        tokenizer_2=tokenizer,
        transformer=spread(transformer, 19, 0.05).requires_grad_(False),
        guider=None if distilled else ClassifierFreeGuidance(guidance_scale=4.0),
    )
    pipe.default_sample_size = 16  # the class has 64 for every model
    # As short as the tokenizer's texts; the start is behind its first mark and the template's word.
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "two {} and", 2
    pipe.tokenizer_max_length = pipe.tokenizer_2_max_length = 12
    pipe.test_options = {"guidance_scale": None, **({"distilled_guidance_scale": 4.0} if distilled else {})}
    pipe.set_progress_bar_config(disable=True)
    return pipe
