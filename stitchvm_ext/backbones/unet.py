"""U-Nets: Stable Diffusion 1 and 2, and Stable Diffusion XL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .condition import Encoding
from .ddpm import DDPMBackbone
from .process import DDPM
from .truncate import truncate_unet

# Inputs of other U-Nets (Kandinsky, DeepFloyd IF, consistency models), which no text encoder of the pipeline gives.
_CONFIG = {
    "addition_embed_type": (None, "text_time"),
    "class_embed_type": (None,),
    "encoder_hid_dim_type": (None,),
    "time_cond_proj_dim": (None,),
}


class UNetBackbone(DDPMBackbone):
    """``UNet2DConditionModel``, cut after one of its down blocks: the tokens are the positions of the feature map that
    leaves the block, its downsampling included. Widths and grids differ by depth.

    A text is its token embeddings; for SDXL also a pooled vector. SDXL further reads the size of the image, which is
    taken from the latents: original and target size are the image's own, nothing is cropped.

    Raises:
        ValueError: the U-Net reads more than latents, time and text (inpainting, distilled guidance, image embeddings).
    """

    truncate = staticmethod(truncate_unet)

    def __init__(self, denoiser: nn.Module, process: DDPM, pixel_factor: int):
        config = denoiser.config
        for name, allowed in _CONFIG.items():
            if config.get(name) not in allowed:
                raise ValueError(f"unet: expected {name} to be one of {list(allowed)}, got {config.get(name)!r}")
        if config.in_channels != config.out_channels:
            raise ValueError(
                f"unet: expected as many input channels as the {config.out_channels} output channels, "
                f"got {config.in_channels} (an inpainting model?)"
            )
        super().__init__(denoiser, process, pixel_factor)
        self.depth = len(denoiser.down_blocks)
        self.is_xl = config.addition_embed_type == "text_time"

    def width(self, depth: int = 1) -> int:
        return self.denoiser.config.block_out_channels[depth - 1]

    def grid(self, latent_hw: tuple[int, int], depth: int = 1) -> tuple[int, int]:
        h, w = latent_hw
        for block in self.denoiser.down_blocks[:depth]:
            if block.downsamplers is not None:
                h, w = (h + 1) // 2, (w + 1) // 2
        return h, w

    def inputs(self, latents: Tensor, sigma: Tensor, encoding: Encoding) -> dict[str, Any]:
        dtype = self.dtype
        call = {
            "sample": latents.to(dtype),
            "timestep": self.process.timestep(sigma),
            "encoder_hidden_states": encoding["prompt_embeds"].to(dtype),
        }
        if self.is_xl:
            size = self.image_size(latents)
            sizes = latents.new_tensor([*size, 0, 0, *size], dtype=dtype)  # original, crop, target
            call["added_cond_kwargs"] = {
                "text_embeds": encoding["pooled_prompt_embeds"].to(dtype),
                "time_ids": sizes.expand(len(latents), -1),
            }
        return call

    def image_tokens(self, output, latents: Tensor, depth: int) -> Tensor:
        return output[0].flatten(2).transpose(1, 2).to(self.dtype)  # (feature map, skip connections)

    def run_prefix(self, latents: Tensor, sigma: Tensor, encoding: Encoding, depth: int) -> Tensor:
        output = self.truncated(depth)(**self.call_inputs(latents, sigma, encoding), return_dict=False)
        return self.image_tokens(output, latents, depth)

    @torch.no_grad()
    def encode_text(self, pipe, prompts: list[str]) -> Encoding:
        """``prompt_embeds`` [B, 77, cross_attention_dim], for SDXL also ``pooled_prompt_embeds`` [B, D]."""
        encoded = pipe.encode_prompt(
            prompt=list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if not self.is_xl:
            return {"prompt_embeds": encoded[0]}
        return {"prompt_embeds": encoded[0], "pooled_prompt_embeds": encoded[2]}

    def encode_negative(self, pipe, prompts: list[str]) -> Encoding:
        """As :meth:`encode_text`; the empty text is zeros where ``force_zeros_for_empty_prompt`` of SDXL's pipeline
        says so.
        """
        encoding = self.encode_text(pipe, prompts)
        if self.is_xl and pipe.config.force_zeros_for_empty_prompt:
            empty = torch.tensor([not prompt for prompt in prompts], device=self.device)
            for rows in encoding.values():
                rows[empty] = 0
        return encoding
