"""FLUX.1 [dev] and [schnell]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .condition import Encoding
from .packed import PackedBackbone, common_time, pack, packed_grid, unpack

GUIDANCE = 3.5  # FluxPipeline's default, and what null texts are encoded with unless told otherwise


class FluxBackbone(PackedBackbone):
    """``FluxTransformer2DModel``: double-stream blocks, then single-stream ones; latents are packed in 2x2 patches.

    A text is its T5 tokens, CLIP's pooled vector and, in the guidance-distilled [dev], the guidance scale; [schnell]
    ignores that. There is no unconditional branch unless ``true_cfg_scale`` asks for one.

    The velocity of [dev] is that of the guided model: a value on it is read as on any model under guidance. [schnell]
    is a few-step student, see :mod:`backbones.distilled`.
    """

    text_options = ("max_sequence_length", "guidance")
    distilled_guidance = True

    def inputs(self, latents: Tensor, sigma: Tensor, encoding: Encoding) -> dict[str, Any]:
        dtype = self.dtype
        text = encoding["prompt_embeds"].to(dtype)
        h, w = packed_grid(latents.shape[-2:])
        return {
            "hidden_states": pack(latents.to(dtype)),
            "timestep": self.model_time(sigma),
            "guidance": encoding.get("guidance"),
            "encoder_hidden_states": text,
            "pooled_projections": encoding["pooled_prompt_embeds"].to(dtype),
            "txt_ids": text.new_zeros(text.shape[1], 3),
            "img_ids": image_ids(h, w).to(text),
        }

    def read_inputs(self, call: dict[str, Any]) -> tuple[Tensor, float, Encoding, bool]:
        encoding = {"prompt_embeds": call["encoder_hidden_states"], "pooled_prompt_embeds": call["pooled_projections"]}
        if call.get("guidance") is not None:
            encoding["guidance"] = call["guidance"]
        extras = ("joint_attention_kwargs", "controlnet_block_samples", "controlnet_single_block_samples")
        plain = not any(call.get(name) for name in extras)
        h, w = (int(side) + 1 for side in call["img_ids"].view(-1, 3)[-1, 1:])
        return unpack(call["hidden_states"], (h, w)), common_time(call), encoding, plain

    @torch.no_grad()
    def encode_text(
        self, pipe, prompts: list[str], max_sequence_length: int = 512, guidance: float = GUIDANCE
    ) -> Encoding:
        """``prompt_embeds`` [B, L, joint_attention_dim], ``pooled_prompt_embeds`` [B, pooled_projection_dim] and, for
        [dev], ``guidance`` [B].
        """
        embeds, pooled, _ = pipe.encode_prompt(
            prompt=list(prompts), prompt_2=None, max_sequence_length=max_sequence_length
        )
        encoding = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        if self.denoiser.config.guidance_embeds:
            encoding["guidance"] = torch.full((len(prompts),), float(guidance), device=embeds.device)
        return encoding


def image_ids(height: int, width: int) -> Tensor:
    """Rotary positions [height · width, 3] of image tokens: (0, row, column)."""
    ids = torch.zeros(height, width, 3)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)[None]
    return ids.view(-1, 3)
