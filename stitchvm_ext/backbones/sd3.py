"""Stable Diffusion 3, 3.5 Medium and 3.5 Large."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..offload import offload_device
from .base import DiffusionBackbone
from .condition import Encoding


class SD3Backbone(DiffusionBackbone):
    """``SD3Transformer2DModel``: joint image-text blocks; a text is its token embeddings and a pooled vector."""

    image_tokens_index = 1  # blocks return (text, image)

    text_options = ("max_sequence_length",)
    max_shift = 1.16

    def grid(self, latent_hw: tuple[int, int], depth: int = 1) -> tuple[int, int]:
        patch = self.denoiser.config.patch_size
        largest = self.denoiser.config.pos_embed_max_size
        h, w = (side // patch for side in latent_hw)
        if (h * patch, w * patch) != tuple(latent_hw) or not (0 < h <= largest and 0 < w <= largest):
            raise ValueError(
                f"latents: expected height and width to be multiples of {patch} up to {largest * patch}, "
                f"got {tuple(latent_hw)}"
            )
        return h, w

    def inputs(self, latents: Tensor, sigma: Tensor, encoding: Encoding) -> dict[str, Any]:
        dtype = self.dtype
        return {
            "hidden_states": latents.to(dtype),
            "timestep": self.process.timestep(sigma),  # float32: embedded in float32 by the transformer
            "encoder_hidden_states": encoding["prompt_embeds"].to(dtype),
            "pooled_projections": encoding["pooled_prompt_embeds"].to(dtype),
        }

    def read_inputs(self, call: dict[str, Any]) -> tuple[Tensor, float, Encoding, bool]:
        timestep = call["timestep"].flatten()
        if not bool((timestep == timestep[0]).all()):
            raise ValueError(f"timestep: expected one noise level for the whole batch, got {timestep.tolist()}")
        encoding = {"prompt_embeds": call["encoder_hidden_states"], "pooled_prompt_embeds": call["pooled_projections"]}
        extras = ("joint_attention_kwargs", "block_controlnet_hidden_states", "skip_layers")
        plain = all(call.get(name) is None for name in extras)
        return call["hidden_states"], float(timestep[0]) / 1000, encoding, plain

    @torch.no_grad()
    def encode_text(self, pipe, prompts: list[str], max_sequence_length: int = 256) -> Encoding:
        """``prompt_embeds`` [B, L, joint_attention_dim] and ``pooled_prompt_embeds`` [B, pooled_projection_dim].

        Args:
            max_sequence_length: rows that the T5 encoder contributes. A pipeline without T5 fills them with zeros.
        """
        encoder = pipe.text_encoder  # offloaded alone, it leaves a pipeline on the CPU without a device of its own
        embeds, _, pooled, _ = pipe.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            device=encoder and offload_device(encoder),
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
