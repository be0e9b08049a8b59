"""Between images and latents: the autoencoder with its shift and scale (METHOD.md §1)."""

from __future__ import annotations

import torch
from torch import Tensor


def _shift_and_scale(vae) -> tuple[float, float]:
    return float(getattr(vae.config, "shift_factor", None) or 0.0), float(vae.config.scaling_factor)


@torch.no_grad()
def encode_images(vae, images: Tensor) -> Tensor:
    """z_0 = E(x_0): the posterior mode of images [B, 3, H, W] in [0, 1], float32 [B, C, h, w], shifted and scaled."""
    shift, scale = _shift_and_scale(vae)
    mode = vae.encode(images.to(vae.dtype) * 2 - 1).latent_dist.mode()
    return (mode.float() - shift) * scale


def decode_latents(vae, latents: Tensor) -> Tensor:
    """D(z_0): float32 images [B, 3, H, W] of scaled latents; differentiable, and not clamped to [0, 1]."""
    shift, scale = _shift_and_scale(vae)
    return vae.decode((latents / scale + shift).to(vae.dtype)).sample.float() / 2 + 0.5
