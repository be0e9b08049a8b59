"""PixArt-Sigma and PixArt-Alpha."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import patch_grid
from .condition import Encoding
from .ddpm import DDPMBackbone


class PixArtBackbone(DDPMBackbone):
    """``PixArtTransformer2DModel``: blocks over image tokens with cross-attention to a T5 text.

    The model also predicts a variance, in the second half of its output channels, which is left out. Alpha's models of
    1024 pixels read the size of the image, which is taken from the latents. The pipelines' ``use_resolution_binning``,
    which samples at another size and crops, is not done: ask for a size that the model was trained on.
    """

    text_options = ("max_sequence_length",)

    def grid(self, latent_hw: tuple[int, int], depth: int = 1) -> tuple[int, int]:
        return patch_grid(latent_hw, self.denoiser.config.patch_size)

    def inputs(self, latents: Tensor, sigma: Tensor, encoding: Encoding) -> dict[str, Any]:
        dtype = self.dtype
        size = {"resolution": None, "aspect_ratio": None}
        if self.denoiser.use_additional_conditions:
            h, w = self.image_size(latents)
            size = {
                "resolution": latents.new_tensor([h, w], dtype=dtype).expand(len(latents), -1),
                "aspect_ratio": latents.new_tensor([h / w], dtype=dtype).expand(len(latents), -1),
            }
        return {
            "hidden_states": latents.to(dtype),
            "timestep": self.process.timestep(sigma),
            "encoder_hidden_states": encoding["prompt_embeds"].to(dtype),
            "encoder_attention_mask": encoding["prompt_attention_mask"],
            "added_cond_kwargs": size,
        }

    @torch.no_grad()
    def encode_text(self, pipe, prompts: list[str], max_sequence_length: int | None = None) -> Encoding:
        """``prompt_embeds`` [B, L, caption_channels] and ``prompt_attention_mask`` [B, L].

        Args:
            max_sequence_length: L, by default the pipeline's own: 300, of Alpha 120.
        """
        options = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
        embeds, mask, _, _ = pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, clean_caption=True, device=self.device, **options
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}
