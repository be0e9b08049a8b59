"""HunyuanVideo, text to video."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import DiffusionBackbone, patch_grid
from .condition import Encoding

GUIDANCE = 6.0  # HunyuanVideoPipeline's default, and what null texts are encoded with unless told otherwise


class HunyuanVideoBackbone(DiffusionBackbone):
    """``HunyuanVideoTransformer3DModel``: double-stream blocks, then single-stream ones, all of which return (video,
    text) tokens.

    A text is Llama's tokens and their mask, CLIP's pooled vector, and the guidance scale, which is distilled into the
    model. There is no unconditional branch unless ``true_cfg_scale`` asks for one.
    """

    image_tokens_index = 0
    is_video = True
    text_options = ("max_sequence_length", "guidance")
    distilled_guidance = True
    even_sigmas = True
    float32_noise = True

    def __init__(self, denoiser: nn.Module):
        """Raises ValueError for an image-to-video model."""
        config = denoiser.config
        if config.image_condition_type is not None or config.in_channels != config.out_channels:
            raise ValueError("backbone: expected a text-to-video HunyuanVideo, got one that is conditioned on an image")
        super().__init__(denoiser)

    def grid(self, latent_hw: tuple[int, int], depth: int = 1) -> tuple[int, int]:
        return patch_grid(latent_hw, self.denoiser.config.patch_size)

    def inputs(self, latents: Tensor, sigma: Tensor, encoding: Encoding) -> dict[str, Any]:
        dtype = self.dtype
        return {
            "hidden_states": latents.to(dtype),
            "timestep": self.process.timestep(sigma),
            "guidance": 1000 * encoding["guidance"].to(dtype),
            "encoder_hidden_states": encoding["prompt_embeds"].to(dtype),
            "encoder_attention_mask": encoding["prompt_attention_mask"],
            "pooled_projections": encoding["pooled_prompt_embeds"].to(dtype),
        }

    @torch.no_grad()
    def encode_text(
        self, pipe, prompts: list[str], max_sequence_length: int = 256, guidance: float = GUIDANCE
    ) -> Encoding:
        """``prompt_embeds`` [B, L, text_embed_dim], ``prompt_attention_mask`` int64 [B, L], ``pooled_prompt_embeds``
        [B, pooled_projection_dim] and ``guidance`` [B].
        """
        embeds, pooled, mask = pipe.encode_prompt(list(prompts), max_sequence_length=max_sequence_length)
        return {
            "prompt_embeds": embeds,
            "prompt_attention_mask": mask,
            "pooled_prompt_embeds": pooled,
            "guidance": torch.full((len(prompts),), float(guidance), device=embeds.device),
        }

    def pixel_factor(self, pipe) -> int:
        return pipe.vae_scale_factor_spatial

    def default_latent_size(self, pipe) -> tuple[int, int]:
        return 720 // self.pixel_factor(pipe), 1280 // self.pixel_factor(pipe)
