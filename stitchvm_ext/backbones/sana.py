"""Sana: linear attention over the latents of a deep-compression autoencoder (32 pixels per latent position)."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .base import DiffusionBackbone, patch_grid
from .condition import Encoding
from .process import RectifiedFlow


class SanaBackbone(DiffusionBackbone):
    """``SanaTransformer2DModel``: one block returns image tokens alone; a text is Gemma's tokens and their mask.

    The pipeline puts an instruction before prompts and none before negative prompts, and so does this adapter. Sizes
    are taken as they are: of the pipeline's own, this is ``use_resolution_binning=False``.
    """

    text_options = ("max_sequence_length",)
    float32_noise = True

    @classmethod
    def from_pipe(cls, pipe, denoiser: nn.Module) -> SanaBackbone:
        """Raises ValueError for Sana-Sprint, which has another forward process."""
        if denoiser.config.guidance_embeds:
            raise ValueError(
                "backbone: expected a Sana model of flow matching, got one with guidance_embeds (Sana-Sprint), whose "
                "forward process is trigonometric"
            )
        return cls(denoiser, RectifiedFlow(1000 * denoiser.config.timestep_scale))

    def grid(self, latent_hw: tuple[int, int], depth: int = 1) -> tuple[int, int]:
        return patch_grid(latent_hw, self.denoiser.config.patch_size)

    def inputs(self, latents: Tensor, sigma: Tensor, encoding: Encoding) -> dict[str, Any]:
        return {
            "hidden_states": latents.to(self.dtype),
            "timestep": self.process.timestep(sigma),
            "encoder_hidden_states": encoding["prompt_embeds"].to(self.dtype),
            "encoder_attention_mask": encoding["prompt_attention_mask"],
        }

    def encode_text(self, pipe, prompts: list[str], max_sequence_length: int = 300) -> Encoding:
        """``prompt_embeds`` [B, L, caption_channels] and ``prompt_attention_mask`` int64 [B, L]."""
        instruction = inspect.signature(pipe.__call__).parameters["complex_human_instruction"].default
        return self._encode(pipe, prompts, max_sequence_length, instruction)

    def encode_negative(self, pipe, prompts: list[str], max_sequence_length: int = 300) -> Encoding:
        return self._encode(pipe, prompts, max_sequence_length, None)

    @torch.no_grad()
    def _encode(self, pipe, prompts: list[str], max_sequence_length: int, instruction: list[str] | None) -> Encoding:
        embeds, mask, _, _ = pipe.encode_prompt(
            list(prompts), False, max_sequence_length=max_sequence_length, complex_human_instruction=instruction
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}
