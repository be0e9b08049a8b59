"""FLUX.2 [dev] and [klein]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .condition import Encoding
from .packed import PackedBackbone, common_time

GUIDANCE = 4.0  # Flux2Pipeline's default, and what null texts are encoded with unless told otherwise


class Flux2Backbone(PackedBackbone):
    """``Flux2Transformer2DModel``: double-stream blocks, then single-stream ones on one tensor of text and image.

    Latents are the autoencoder's in 2x2 patches, normalised by its batch norm: [B, 128, H/16, W/16] of H x W pixels,
    one token each. A text is three layers of the language model side by side and, in the guidance-distilled [dev], the
    guidance scale, as in :class:`FluxBackbone`. [klein] has classifier-free guidance instead; the few-step one
    (``is_distilled``) wants ``guidance_scale=1``. Reference images are not supported.
    """

    text_options = ("max_sequence_length", "guidance")

    @property
    def distilled_guidance(self) -> bool:
        return bool(self.denoiser.config.guidance_embeds)

    @property
    def latent_channels(self) -> int:
        return self.denoiser.config.in_channels

    def grid(self, latent_hw: tuple[int, int], depth: int = 1) -> tuple[int, int]:
        return tuple(latent_hw)

    def pixel_factor(self, pipe) -> int:
        return 2 * pipe.vae_scale_factor

    def default_latent_size(self, pipe) -> tuple[int, int]:
        return (pipe.default_sample_size // 2,) * 2

    def inputs(self, latents: Tensor, sigma: Tensor, encoding: Encoding) -> dict[str, Any]:
        dtype, device = self.dtype, latents.device
        text = encoding["prompt_embeds"].to(dtype)
        (height, width), length = latents.shape[-2:], text.shape[1]
        return {
            "hidden_states": self.pack(latents.to(dtype)),
            "timestep": self.model_time(sigma),
            "guidance": encoding.get("guidance"),
            "encoder_hidden_states": text,
            "txt_ids": position_ids(1, 1, length, device),
            "img_ids": position_ids(height, width, 1, device),
        }

    def unpack(self, output: Tensor, latents: Tensor) -> Tensor:
        return output.transpose(1, 2).unflatten(2, latents.shape[-2:])

    def pack(self, velocity: Tensor) -> Tensor:
        return velocity.flatten(2).transpose(1, 2)

    def read_inputs(self, call: dict[str, Any]) -> tuple[Tensor, float, Encoding, bool]:
        if not self.distilled_guidance:  # two calls a step: which is which cannot be told from one
            return super().read_inputs(call)
        ids = call["img_ids"].reshape(-1, call["img_ids"].shape[-1])
        if bool(ids[:, 0].any()):
            raise ValueError("img_ids: expected the tokens of one image, got reference images, which are not supported")
        height, width = (int(side) + 1 for side in ids[-1, 1:3])
        latents = call["hidden_states"].transpose(1, 2).unflatten(2, (height, width))
        encoding = {"prompt_embeds": call["encoder_hidden_states"], "guidance": call["guidance"]}
        plain = not any(call.get(name) for name in ("joint_attention_kwargs", "kv_cache", "kv_cache_mode"))
        return latents, common_time(call), encoding, plain

    @torch.no_grad()
    def encode_text(
        self, pipe, prompts: list[str], max_sequence_length: int = 512, guidance: float = GUIDANCE
    ) -> Encoding:
        """``prompt_embeds`` [B, max_sequence_length, joint_attention_dim] and, for [dev], ``guidance`` [B]."""
        embeds, _ = pipe.encode_prompt(prompt=list(prompts), max_sequence_length=max_sequence_length)
        if not self.distilled_guidance:
            return {"prompt_embeds": embeds}
        return {"prompt_embeds": embeds, "guidance": torch.full((len(prompts),), float(guidance), device=embeds.device)}

    def timestep_options(self, config: dict[str, Any], steps: int, latent_hw: tuple[int, int]) -> dict[str, Any]:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        options = super().timestep_options(config, steps, latent_hw)
        if "mu" in options:
            options["mu"] = compute_empirical_mu(latent_hw[0] * latent_hw[1], steps)
        return options


def position_ids(height: int, width: int, length: int, device: torch.device) -> Tensor:
    """Rotary positions [height · width · length, 4] of tokens: (0, row, column, place in the text)."""
    return torch.cartesian_prod(*(torch.arange(n, device=device) for n in (1, height, width, length)))
