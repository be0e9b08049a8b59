"""Qwen-Image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .condition import Encoding
from .packed import PackedBackbone, pack, packed_grid


class QwenImageBackbone(PackedBackbone):
    """``QwenImageTransformer2DModel``: double-stream blocks; latents are packed in 2x2 patches, and the autoencoder is
    one of videos, of which an image is a single frame.

    A text is the tokens that Qwen2.5-VL gives for it inside the pipeline's template, less the template's head; texts of
    different length are masked. ``guidance_scale`` is what the pipeline calls ``true_cfg_scale``. As there, the guided
    velocity gets the conditional one's norm back, token by token; the unconditional text is the empty one where the
    pipeline leaves classifier-free guidance out without a negative prompt.
    """

    text_options = ("max_sequence_length",)

    def inputs(self, latents: Tensor, sigma: Tensor, encoding: Encoding) -> dict[str, Any]:
        dtype = self.dtype
        return {
            "hidden_states": pack(latents.to(dtype)),
            "timestep": self.model_time(sigma),
            "encoder_hidden_states": encoding["prompt_embeds"].to(dtype),
            "encoder_hidden_states_mask": encoding["prompt_embeds_mask"],
            "img_shapes": [[(1, *packed_grid(latents.shape[-2:]))]] * len(latents),
        }

    @torch.no_grad()
    def encode_text(self, pipe, prompts: list[str], max_sequence_length: int = 512) -> Encoding:
        """``prompt_embeds`` [B, L, joint_attention_dim] and the bool ``prompt_embeds_mask`` [B, L], L the longest."""
        embeds, mask = pipe.encode_prompt(prompt=list(prompts), max_sequence_length=max_sequence_length)
        if mask is None:  # no padding
            mask = embeds.new_ones(embeds.shape[:2])
        return {"prompt_embeds": embeds, "prompt_embeds_mask": mask.bool()}

    def rescale_guidance(self, guided: Tensor, cond: Tensor) -> Tensor:
        """The guided velocity with the norm of the conditional one in every 2x2 patch."""
        norms = [F.avg_pool2d(v.float().square().sum(1, keepdim=True), 2).sqrt() for v in (cond, guided)]
        return guided * F.interpolate(norms[0] / norms[1], scale_factor=2, mode="nearest").to(guided.dtype)
