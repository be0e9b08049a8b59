"""HunyuanVideo: 64x64 videos, 4xTx8x8 latents, 16 tokens a frame; two double and two single blocks."""

from __future__ import annotations

import functools

import torch

from stitchvm_ext.playground import models

from . import clip_text_encoder, spread

TEMPLATE_TOKENS = 95  # that the pipeline cuts off


def llama(width: int = 32):
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(20)
    config = LlamaConfig(
        vocab_size=len(models.WORDS), hidden_size=width, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, pad_token_id=models.PAD_ID,
        bos_token_id=models.BOS_ID, eos_token_id=models.EOS_ID,
    )  # fmt: skip
    return LlamaModel(config).eval().requires_grad_(False)


def llama_tokenizer():
    """Begins every text with so many marks that the pipeline's template takes as many tokens as the real one's."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from tokenizers import pre_tokenizers, processors

    tokenizer = models.build_tokenizer()
    core = tokenizer.backend_tokenizer
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    prefix = DEFAULT_PROMPT_TEMPLATE["template"].split("{}")[0]
    marks = TEMPLATE_TOKENS - len(tokenizer(prefix, add_special_tokens=False).input_ids)
    core.post_processor = processors.TemplateProcessing(
        single="<bos> " * marks + "$A", special_tokens=[("<bos>", models.BOS_ID)]
    )
    return tokenizer


def hunyuan_video_autoencoder():
    from diffusers import AutoencoderKLHunyuanVideo

    torch.manual_seed(21)
    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, scaling_factor=0.5
    ).eval().requires_grad_(False)  # fmt: skip


@functools.cache
def tiny_hunyuan_video():
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

    torch.manual_seed(22)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, num_refiner_layers=1, attention_head_dim=8,
        num_attention_heads=4, text_embed_dim=32, pooled_projection_dim=32, rope_axes_dim=(4, 2, 2),
    )  # fmt: skip
    pipe = HunyuanVideoPipeline(
        text_encoder=llama(),
        tokenizer=llama_tokenizer(),
        transformer=spread(transformer, 23, 0.05).requires_grad_(False),
        vae=hunyuan_video_autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=clip_text_encoder(projected=False, positions=77),
        tokenizer_2=models.build_tokenizer(),
    )
    pipe.test_size = (64, 64)
    pipe.set_progress_bar_config(disable=True)
    return pipe
