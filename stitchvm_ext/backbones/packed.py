"""Latents that a transformer reads as tokens: 2x2 patches, channels first within a token (FLUX, Qwen-Image)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import DiffusionBackbone, patch_grid


def packed_grid(latent_hw: tuple[int, int]) -> tuple[int, int]:
    """Token grid of a latent of size (H, W). Raises ValueError for odd sizes."""
    return patch_grid(latent_hw, 2)


def pack(latents: Tensor) -> Tensor:
    """[B, C, H, W] as tokens [B, H/2 · W/2, 4C], as the pipelines' ``_pack_latents``."""
    b, c, height, width = latents.shape
    h, w = packed_grid((height, width))
    return latents.view(b, c, h, 2, w, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w, 4 * c)


def unpack(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inverse of :func:`pack`."""
    (h, w), channels = grid, tokens.shape[-1] // 4
    patches = tokens.view(-1, h, w, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(-1, channels, 2 * h, 2 * w)


class PackedBackbone(DiffusionBackbone):
    """A flow model whose pipeline packs latents and starts its schedule from evenly spaced noise levels."""

    even_sigmas = True

    @property
    def latent_channels(self) -> int:
        return self.denoiser.config.in_channels // 4

    def grid(self, latent_hw: tuple[int, int], depth: int = 1) -> tuple[int, int]:
        return packed_grid(latent_hw)

    def model_time(self, sigma: Tensor) -> Tensor:
        """In [0, 1] and in the latents' dtype, as the pipelines give it: rounded as a timestep of up to 1000."""
        return self.process.timestep(sigma).to(self.dtype) / 1000

    def unpack(self, output: Tensor, latents: Tensor) -> Tensor:
        return unpack(output, packed_grid(latents.shape[-2:]))

    def pack(self, velocity: Tensor) -> Tensor:
        return pack(velocity)


def common_time(call: dict[str, Any]) -> float:
    """The noise level of a pipeline's call. Raises ValueError unless all samples have the same."""
    timestep = call["timestep"].flatten()
    if not bool((timestep == timestep[0]).all()):
        raise ValueError(f"timestep: expected one noise level for the whole batch, got {timestep.tolist()}")
    return float(timestep[0])
