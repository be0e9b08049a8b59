"""Latents that a transformer reads as tokens: 2x2 patches, channels first within a token (FLUX, Qwen-Image)."""

from __future__ import annotations

from torch import Tensor

from .base import patch_grid


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
