"""Wan 2.1, text to video."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import DiffusionBackbone, patch_grid
from .condition import Encoding


class WanBackbone(DiffusionBackbone):
    """``WanTransformer3DModel``: blocks over the patches of all frames, cross-attention to UMT5's tokens.

    A text's encoding is as long as ``max_sequence_length``, its padding zeros that are read like words. The autoencoder
    clamps what it decodes: where it does, rewards of decoded frames have no gradient.
    """

    is_video = True
    text_options = ("max_sequence_length",)
    float32_noise = True

    @classmethod
    def from_pipe(cls, pipe, denoiser: nn.Module) -> WanBackbone:
        """Raises ValueError for an image-to-video model, and for a pipeline with a second denoiser (Wan 2.2 A14B)."""
        config = denoiser.config
        if config.image_dim is not None or config.in_channels != config.out_channels:
            raise ValueError("backbone: expected a text-to-video Wan model, got one that is conditioned on an image")
        if pipe is not denoiser and pipe.config.get("boundary_ratio") is not None:
            raise ValueError(
                "pipe: expected a Wan pipeline with one denoiser, got one whose transformer_2 takes over at "
                f"boundary_ratio {pipe.config.boundary_ratio}"
            )
        return cls(denoiser)

    @property
    def dtype(self) -> torch.dtype:
        return self.denoiser.patch_embedding.weight.dtype  # diffusers keeps other weights in float32

    def grid(self, latent_hw: tuple[int, int], depth: int = 1) -> tuple[int, int]:
        return patch_grid(latent_hw, self.denoiser.config.patch_size[1])

    def inputs(self, latents: Tensor, sigma: Tensor, encoding: Encoding) -> dict[str, Any]:
        return {
            "hidden_states": latents.to(self.dtype),
            "timestep": self.process.timestep(sigma),
            "encoder_hidden_states": encoding["prompt_embeds"].to(self.dtype),
        }

    @torch.no_grad()
    def encode_text(self, pipe, prompts: list[str], max_sequence_length: int = 512) -> Encoding:
        """``prompt_embeds`` [B, max_sequence_length, text_dim]."""
        embeds, _ = pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
        )
        return {"prompt_embeds": embeds}

    def pixel_factor(self, pipe) -> int:
        return pipe.vae_scale_factor_spatial

    def default_latent_size(self, pipe) -> tuple[int, int]:
        return 480 // self.pixel_factor(pipe), 832 // self.pixel_factor(pipe)
