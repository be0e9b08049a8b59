"""Models of real geometry with random weights, which is enough for speed and memory: nothing is downloaded."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backbones import backbone_of
from ..rewards import OpenClipReward
from ..value import StitchedValue
from ..value.stitch_layer import StitchLayer
from .shapes import BACKBONES, TOWERS

TEXT_TOKENS = 333  # 77 of CLIP and 256 of T5


def transformer(name: str, blocks: int, side: int, dtype: torch.dtype, device: str = "cpu"):
    """The first ``blocks`` blocks of an SD3.5 transformer, and one more in which the text stream ends."""
    from diffusers import SD3Transformer2DModel

    shape = BACKBONES[name]
    torch.manual_seed(0)
    with torch.device(device):
        model = SD3Transformer2DModel(
            sample_size=2 * side, patch_size=2, in_channels=16, out_channels=16, num_layers=blocks + 1,
            attention_head_dim=shape.width // shape.heads, num_attention_heads=shape.heads,
            joint_attention_dim=4096, caption_projection_dim=shape.width, pooled_projection_dim=2048,
            pos_embed_max_size=max(96, side), dual_attention_layers=tuple(range(min(shape.dual_attention, blocks))),
            qk_norm="rms_norm",
        )  # fmt: skip
    return model.to(dtype).eval().requires_grad_(False)


def tower(name: str, dtype: torch.dtype, device: str = "cpu") -> OpenClipReward:
    """An image tower as open_clip builds it, with a text tower that is next to nothing."""
    from open_clip.model import CLIP

    shape = TOWERS[name]
    config = {
        "embed_dim": shape.embed,
        "vision_cfg": {
            "image_size": shape.side * shape.patch, "patch_size": shape.patch, "width": shape.width,
            "layers": shape.layers, "head_width": shape.width // shape.heads, "mlp_ratio": shape.mlp_ratio,
        },
        "text_cfg": {"context_length": 4, "vocab_size": 16, "width": 32, "heads": 2, "layers": 1},
        "quick_gelu": shape.quick_gelu,
    }  # fmt: skip
    torch.manual_seed(1)
    with torch.device(device):
        clip = CLIP(**config)
    return OpenClipReward(clip.to(dtype), None, config)


def encoding(batch: int, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    g = torch.Generator(device).manual_seed(2)
    return {
        "prompt_embeds": torch.randn(batch, TEXT_TOKENS, 4096, generator=g, device=device).to(dtype),
        "pooled_prompt_embeds": torch.randn(batch, 2048, generator=g, device=device).to(dtype),
    }


def stitched_value(
    backbone: str, reward: str, *, depth: int, side: int, dtype: torch.dtype, device: str = "cpu"
) -> StitchedValue:
    """A value model on ``depth`` blocks at ``side``² image tokens, j = 1, frozen."""
    model = backbone_of(transformer(backbone, depth, side, dtype, device))
    suffix = tower(reward, dtype, device).suffix(1)
    torch.manual_seed(3)
    stitch = StitchLayer(model.width(depth), suffix.width, suffix.grid)
    torch.nn.init.normal_(stitch.mlp[3].weight, std=0.02)
    value = StitchedValue(
        model, stitch, suffix, depth=depth, layer=1, latent_size=(2 * side, 2 * side),
        null_condition=encoding(1, dtype, device), text_options={},
    )  # fmt: skip
    return value.to(device, dtype).eval().requires_grad_(False)
