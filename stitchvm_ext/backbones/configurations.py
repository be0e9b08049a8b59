"""The published sizes of the larger backbones, built without memory: for counting, planning and tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Configuration:
    """A published denoiser.

    Attributes:
        denoiser: its class in diffusers.
        options: what the class is built with, where the published config.json differs from the class's own defaults
            or those might change.
        parameters: how many it has.
    """

    denoiser: str
    options: dict[str, Any]
    parameters: int

    def build(self) -> nn.Module:
        """The denoiser on the meta device: shapes and no numbers."""
        import diffusers

        with torch.device("meta"):
            return getattr(diffusers, self.denoiser)(**self.options).eval().requires_grad_(False)


def _sd3(layers: int, heads: int, positions: int, dual: tuple[int, ...], parameters: int) -> Configuration:
    options = {
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": layers,
        "attention_head_dim": 64, "num_attention_heads": heads, "joint_attention_dim": 4096,
        "caption_projection_dim": 64 * heads, "pooled_projection_dim": 2048, "pos_embed_max_size": positions,
        "dual_attention_layers": dual, "qk_norm": "rms_norm",
    }  # fmt: skip
    return Configuration("SD3Transformer2DModel", options, parameters)


CONFIGURATIONS: dict[str, Configuration] = {
    "stable-diffusion-3.5-medium": _sd3(24, 24, 384, tuple(range(13)), 2_243_171_520),
    "stable-diffusion-3.5-large": _sd3(38, 38, 192, (), 8_056_627_520),
    "FLUX.1-dev": Configuration(
        "FluxTransformer2DModel",
        {
            "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
            "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
            "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
        },
        11_901_408_320,
    ),
    "FLUX.2-dev": Configuration(
        "Flux2Transformer2DModel",
        {
            "in_channels": 128, "num_layers": 8, "num_single_layers": 48, "attention_head_dim": 128,
            "num_attention_heads": 48, "joint_attention_dim": 15360, "axes_dims_rope": (32, 32, 32, 32),
        },
        32_223_281_152,
    ),
    "HunyuanImage-2.1": Configuration(
        "HunyuanImageTransformer2DModel",
        {
            "in_channels": 64, "out_channels": 64, "num_attention_heads": 28, "attention_head_dim": 128,
            "num_layers": 20, "num_single_layers": 40, "num_refiner_layers": 2, "patch_size": (1, 1),
            "guidance_embeds": False, "text_embed_dim": 3584, "text_embed_2_dim": 1472, "rope_theta": 256.0,
            "rope_axes_dim": (64, 64), "use_meanflow": False,
        },
        17_425_795_520,
    ),
    "Qwen-Image": Configuration(
        "QwenImageTransformer2DModel",
        {
            "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 60, "attention_head_dim": 128,
            "num_attention_heads": 24, "joint_attention_dim": 3584, "axes_dims_rope": (16, 56, 56),
        },
        20_430_401_088,
    ),
}  # fmt: skip
"""By the name under which the model is published."""
