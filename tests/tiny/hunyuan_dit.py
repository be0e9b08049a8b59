"""HunyuanDiT 1.1 and 1.2 (which reads no sizes): 128x128 images, 4x16x16 latents, 64 image tokens; four blocks, the
last with a skip connection.
"""

from __future__ import annotations

import functools

import torch

from stitchvm_ext.playground import models

from . import spread, tiny_autoencoder
from .flux import t5_encoder
from .unet import ddim


@functools.cache
def tiny_hunyuan_dit(version: float = 1.1):
    from diffusers import HunyuanDiT2DModel, HunyuanDiTPipeline
    from transformers import BertConfig, BertModel

    torch.manual_seed(10)
    transformer = HunyuanDiT2DModel(
        sample_size=16, num_layers=4, patch_size=2, attention_head_dim=8, num_attention_heads=4, hidden_size=32,
        in_channels=4, cross_attention_dim=24, cross_attention_dim_t5=32, pooled_projection_dim=16,
        use_style_cond_and_image_meta_size=version < 1.2,
    )  # fmt: skip
    bert = BertConfig(
        vocab_size=len(models.WORDS), hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=77, pad_token_id=models.PAD_ID,
    )  # fmt: skip
    pipe = HunyuanDiTPipeline(
        vae=tiny_autoencoder(shift_factor=None, levels=4),  # the pipeline takes 8 pixels per latent as given
        text_encoder=BertModel(bert).eval().requires_grad_(False),
        tokenizer=models.build_tokenizer(),
        transformer=spread(transformer, 11, 0.05).requires_grad_(False),
        scheduler=ddim("v_prediction", beta_end=0.018),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=t5_encoder(),
        tokenizer_2=models.build_tokenizer(),
    )
    pipe.default_sample_size = 16  # the class has 128 for every model
    pipe.test_options = {"use_resolution_binning": False}
    pipe.set_progress_bar_config(disable=True)
    return pipe
