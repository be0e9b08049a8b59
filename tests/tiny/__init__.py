"""Small random models in the real formats, built offline in about a second."""

from __future__ import annotations

import functools

import torch

from stitchvm_ext.playground import models


def spread(model: torch.nn.Module, seed: int, scale: float = 0.1) -> torch.nn.Module:
    """Weights far from their initial values, zeros included, so that every input matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim:
                p.add_(scale * torch.randn(p.shape, generator=generator))
    return model.eval()


def tiny_transformer(seed: int = 0, depth: int = 4):
    """An SD3.5-Medium-like transformer, 32 wide, with two dual-attention blocks and no zero-initialised layers."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(seed)
    return (
        SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, num_layers=depth, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
            pos_embed_max_size=16, dual_attention_layers=(0, 1), qk_norm="rms_norm",
        )
        .eval()
        .requires_grad_(False)
    )  # fmt: skip


def tiny_autoencoder(seed: int = 0, shift_factor: float | None = 0.06, levels: int = 2):
    """2^(levels - 1) pixels per latent position."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return (
        AutoencoderKL(
            sample_size=32, block_out_channels=(8,) * levels, layers_per_block=1, latent_channels=4, norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
            use_quant_conv=False, use_post_quant_conv=False, shift_factor=shift_factor, scaling_factor=1.5,
        )
        .eval()
        .requires_grad_(False)
    )  # fmt: skip


def clip_text_encoder(vocabulary: int = len(models.WORDS), projected: bool = True, positions: int = models.MAX_TOKENS):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(
        CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=64, projection_dim=32, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=positions,
            bos_token_id=models.BOS_ID, eos_token_id=models.EOS_ID, pad_token_id=models.PAD_ID,
        )
    ).eval().requires_grad_(False)  # fmt: skip


@functools.cache
def tiny_pipeline(t5: bool = False, shift: float = 3.0):
    """A whole StableDiffusion3Pipeline: 32x32 images, 4x16x16 latents, 64 image tokens. Treat it as read-only."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(1)
    tokenizer = models.build_tokenizer()
    t5_encoder = None
    if t5:
        config = T5Config(vocab_size=len(models.WORDS), d_model=64, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
        t5_encoder = T5EncoderModel(config).eval().requires_grad_(False)
    pipe = StableDiffusion3Pipeline(
        transformer=tiny_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=tiny_autoencoder(),
        text_encoder=clip_text_encoder(),
        tokenizer=tokenizer,
        text_encoder_2=clip_text_encoder(),
        tokenizer_2=tokenizer,
        text_encoder_3=t5_encoder,
        tokenizer_3=tokenizer if t5 else None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def tiny_reward(layers: int = 3):
    """An OpenClipReward on 32x32 images: 4x4 patches of width 32. Treat it as read-only."""
    from open_clip.model import CLIP

    from stitchvm_ext.rewards import OpenClipReward

    torch.manual_seed(2)
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": layers, "head_width": 8},
        "text_cfg": {
            "context_length": models.MAX_TOKENS, "vocab_size": len(models.WORDS), "width": 16, "heads": 2, "layers": 1
        },
    }  # fmt: skip
    tokenizer = models.build_tokenizer()
    return OpenClipReward(CLIP(**config), lambda texts: models.tokenize(tokenizer, list(texts)), config)
