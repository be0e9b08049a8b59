"""Lumina-Image 2.0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import DiffusionBackbone, patch_grid, shift_for_tokens
from .condition import Encoding
from .process import ReversedFlow


class Lumina2Backbone(DiffusionBackbone):
    """``Lumina2Transformer2DModel``: after refiners for each, text and image tokens run as one sequence; time runs from
    noise to data.

    A sample's sequence is its text without padding, its image, and padding up to the longest of the batch. The pipeline
    puts a system prompt before prompts and none before negative prompts, and so does this adapter.

    As under the pipeline's ``cfg_normalization``, the guided velocity gets the conditional one's norm back, row by row.
    """

    text_options = ("max_sequence_length",)
    even_sigmas = True

    def __init__(self, denoiser: nn.Module):
        super().__init__(denoiser, ReversedFlow())
        self._text_lengths: Tensor | None = None  # of the call in progress, which says where the image tokens are

    def width(self, depth: int = 1) -> int:
        return self.denoiser.config.hidden_size

    def grid(self, latent_hw: tuple[int, int], depth: int = 1) -> tuple[int, int]:
        return patch_grid(latent_hw, self.denoiser.config.patch_size)

    def inputs(self, latents: Tensor, sigma: Tensor, encoding: Encoding) -> dict[str, Any]:
        mask = encoding["prompt_attention_mask"]
        self._text_lengths = mask.sum(1)
        return {
            "hidden_states": latents.to(self.dtype),
            "timestep": self.process.timestep(sigma),
            "encoder_hidden_states": encoding["prompt_embeds"].to(self.dtype),
            "encoder_attention_mask": mask,
        }

    def image_tokens(self, output, latents: Tensor, depth: int) -> Tensor:
        places = torch.arange(self._token_count(latents, depth), device=output.device) + self._text_lengths[:, None]
        return output.gather(1, places.unsqueeze(-1).expand(-1, -1, output.shape[-1])).to(self.dtype)

    @torch.no_grad()
    def encode_text(self, pipe, prompts: list[str], max_sequence_length: int = 256) -> Encoding:
        """``prompt_embeds`` [B, L, cap_feat_dim] and ``prompt_attention_mask`` int64 [B, L]."""
        embeds, mask, _, _ = pipe.encode_prompt(list(prompts), False, max_sequence_length=max_sequence_length)
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    @torch.no_grad()
    def encode_negative(self, pipe, prompts: list[str], max_sequence_length: int = 256) -> Encoding:
        _, _, embeds, mask = pipe.encode_prompt(
            list(prompts), True, negative_prompt=list(prompts), max_sequence_length=max_sequence_length
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def rescale_guidance(self, guided: Tensor, cond: Tensor) -> Tensor:
        """The guided velocity with the norm of the conditional one in every row of a channel."""
        return guided * (cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def timestep_options(self, config: dict[str, Any], steps: int, latent_hw: tuple[int, int]) -> dict[str, Any]:
        options = super().timestep_options(config, steps, latent_hw)
        if "mu" in options:  # the pipeline counts the latents' channels in the place of tokens
            options["mu"] = shift_for_tokens(config, (self.latent_channels, 1), self.max_shift)
        return options
