"""HunyuanDiT 1.0 to 1.2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import patch_grid
from .condition import Encoding
from .ddpm import DDPMBackbone

ORIGINAL_SIZE = (1024, 1024)  # the pipeline's default, whatever size it samples
TEXT_LENGTHS = {"": 77, "_t5": 256}  # of the two text encoders, fixed by the transformer's padding


class HunyuanDiTBackbone(DDPMBackbone):
    """``HunyuanDiT2DModel``: blocks over image tokens with cross-attention to two texts, BERT's and mT5's.

    Blocks of the second half also read the output of one of the first half, which every cut after them includes. The
    model also predicts a variance, in the second half of its output channels, which is left out; up to version 1.1 it
    reads the size of the image, which is taken from the latents, and a style, which is always the first.
    """

    def grid(self, latent_hw: tuple[int, int], depth: int = 1) -> tuple[int, int]:
        return patch_grid(latent_hw, self.denoiser.config.patch_size)

    def inputs(self, latents: Tensor, sigma: Tensor, encoding: Encoding) -> dict[str, Any]:
        dtype, batch = self.dtype, len(latents)
        sizes = latents.new_tensor([*ORIGINAL_SIZE, *self.image_size(latents), 0, 0], dtype=dtype)
        call = {
            "hidden_states": latents.to(dtype),
            "timestep": self.process.timestep(sigma).to(dtype),  # the transformer embeds it in the dtype that it has
            "image_meta_size": sizes.repeat(batch, 1),
            "style": torch.zeros(batch, dtype=torch.long, device=latents.device),
            "image_rotary_emb": self._rotary(self.grid(tuple(latents.shape[-2:])), latents.device),
        }
        for suffix in TEXT_LENGTHS:
            call[f"encoder_hidden_states{suffix}"] = encoding[f"prompt_embeds{suffix}"].to(dtype).contiguous()
            call[f"text_embedding_mask{suffix}"] = encoding[f"prompt_attention_mask{suffix}"]
        return call

    def _rotary(self, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Rotary embeddings of the positions of ``grid``, stretched over that of an image of 512 pixels."""
        from diffusers.models.embeddings import get_2d_rotary_pos_embed
        from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

        config = self.denoiser.config
        region = get_resize_crop_region_for_grid(grid, 512 // 8 // config.patch_size)
        return get_2d_rotary_pos_embed(config.attention_head_dim, region, grid, device=device, output_type="pt")

    @torch.no_grad()
    def encode_text(self, pipe, prompts: list[str]) -> Encoding:
        """``prompt_embeds`` [B, 77, cross_attention_dim] of BERT, ``prompt_embeds_t5`` [B, 256, cross_attention_dim_t5]
        of mT5, and the mask of each.
        """
        encoding = {}
        for index, (suffix, length) in enumerate(TEXT_LENGTHS.items()):
            encoding[f"prompt_embeds{suffix}"], _, encoding[f"prompt_attention_mask{suffix}"], _ = pipe.encode_prompt(
                list(prompts),
                device=self.device,
                dtype=self.dtype,
                do_classifier_free_guidance=False,
                max_sequence_length=length,
                text_encoder_index=index,
            )
        return encoding
