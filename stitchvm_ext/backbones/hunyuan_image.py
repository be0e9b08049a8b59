"""HunyuanImage 2.1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import DiffusionBackbone, patch_grid
from .condition import Encoding

GUIDANCE = 3.25  # HunyuanImagePipeline's default, and what null texts are encoded with unless told otherwise


class HunyuanImageBackbone(DiffusionBackbone):
    """``HunyuanImageTransformer2DModel``: double-stream blocks, then single-stream ones, all of which return (image,
    text), over the latents of an autoencoder of 32 pixels per position.

    A text is Qwen2.5-VL's tokens and, for what stands in quotation marks, ByT5's, each with a mask; of the distilled
    model also the guidance scale, an input there. The base model's classifier-free guidance is the plain one, the
    pipeline's with a ``ClassifierFreeGuidance`` as guider; its usual ``AdaptiveProjectedMixGuidance`` is that in the
    first steps alone.

    A MeanFlow model (the distilled one) gives the mean velocity from a time to another. It is asked for the velocity
    at one time, so samples in few steps differ from the pipeline's, which asks for the mean over each step.
    """

    image_tokens_index = 0
    even_sigmas = True

    def __init__(self, denoiser: nn.Module):
        """Raises ValueError for the refiner, which denoises images with other latents."""
        if len(denoiser.config.patch_size) != 2:
            raise ValueError(
                "backbone: expected a HunyuanImage base or distilled model with two-dimensional patches, got "
                f"patch_size {tuple(denoiser.config.patch_size)} (the refiner)"
            )
        super().__init__(denoiser)
        self.distilled_guidance = denoiser.config.guidance_embeds
        self.text_options = ("guidance",) if self.distilled_guidance else ()

    def grid(self, latent_hw: tuple[int, int], depth: int = 1) -> tuple[int, int]:
        return patch_grid(latent_hw, self.denoiser.config.patch_size[0])

    def inputs(self, latents: Tensor, sigma: Tensor, encoding: Encoding) -> dict[str, Any]:
        dtype = self.dtype
        timestep = self.process.timestep(sigma).to(dtype)  # embedded in the dtype that it has
        return {
            "hidden_states": latents.to(dtype),
            "timestep": timestep,
            "timestep_r": timestep if self.denoiser.config.use_meanflow else None,
            "guidance": 1000 * encoding["guidance"].to(dtype) if self.distilled_guidance else None,
            "encoder_hidden_states": encoding["prompt_embeds"].to(dtype),
            "encoder_attention_mask": encoding["prompt_embeds_mask"],
            "encoder_hidden_states_2": encoding["prompt_embeds_2"].to(dtype),
            "encoder_attention_mask_2": encoding["prompt_embeds_mask_2"],
        }

    @torch.no_grad()
    def encode_text(self, pipe, prompts: list[str], guidance: float = GUIDANCE) -> Encoding:
        """``prompt_embeds`` [B, 1000, text_embed_dim], ``prompt_embeds_2`` [B, 128, text_embed_2_dim], their int64
        masks ``prompt_embeds_mask`` and ``prompt_embeds_mask_2`` and, for a distilled model, ``guidance`` [B].
        """
        embeds, mask, glyphs, glyph_mask = pipe.encode_prompt(list(prompts), batch_size=len(prompts))
        encoding = {
            "prompt_embeds": embeds,
            "prompt_embeds_mask": mask,
            "prompt_embeds_2": glyphs,
            "prompt_embeds_mask_2": glyph_mask,
        }
        if self.distilled_guidance:
            encoding["guidance"] = torch.full((len(prompts),), float(guidance), device=embeds.device)
        return encoding
