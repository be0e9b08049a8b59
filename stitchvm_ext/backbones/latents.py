"""Between images and latents: the autoencoder, and the shift and scale that diffusion models see (METHOD.md §1)."""

from __future__ import annotations

from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


def _is_video(vae) -> bool:
    """Whether the autoencoder takes and gives frames [B, C, F, H, W]: its convolutions are three-dimensional."""
    return next(p for p in vae.parameters() if p.ndim >= 4).ndim == 5


def _statistics(vae, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Mean and standard deviation by which the pipeline normalises raw latents, to broadcast against them."""
    config = vae.config
    per_channel = lambda values: torch.as_tensor(values).to(latents).view(1, -1, *[1] * (latents.ndim - 2))  # noqa: E731
    scale = float(config.get("scaling_factor") or 1.0)
    if hasattr(vae, "bn"):  # FLUX.2 keeps them in a batch norm over patchified latents
        return per_channel(vae.bn.running_mean), per_channel((vae.bn.running_var + config.batch_norm_eps).sqrt())
    if config.get("latents_mean") is not None:
        return per_channel(config.latents_mean), per_channel(config.latents_std) / scale
    return float(config.get("shift_factor") or 0.0), 1 / scale


def normalisation(vae) -> list[float]:
    """The numbers by which raw latents are normalised: mean and deviation, one each or per channel."""
    channels = torch.zeros(1, vae.bn.num_features if hasattr(vae, "bn") else len(vae.config.get("latents_mean") or [0]))
    return [float(v) for part in _statistics(vae, channels) for v in torch.as_tensor(part).flatten()]


def _working_dtype(vae) -> torch.dtype:
    """The autoencoder's dtype, or float32 where it overflows in float16: ``force_upcast``, of SDXL's."""
    return torch.float32 if vae.dtype == torch.float16 and vae.config.get("force_upcast") else vae.dtype


class _Method(nn.Module):
    def __init__(self, vae, name: str):
        super().__init__()
        self.vae, self.name = vae, name

    def forward(self, x: Tensor):
        return getattr(self.vae, self.name)(x)


def _run(vae, name: str, x: Tensor):
    """What ``vae.encode`` or ``vae.decode`` returns, computed in x's dtype. The weights stay in theirs."""
    if x.dtype == vae.dtype:
        return getattr(vae, name)(x)
    tensors = chain(vae.named_parameters(), vae.named_buffers())
    state = {f"vae.{n}": t.to(x.dtype) if t.is_floating_point() else t for n, t in tensors}
    return functional_call(_Method(vae, name), state, (x,))


@torch.no_grad()
def encode_images(vae, images: Tensor) -> Tensor:
    """z_0 = E(x_0): the posterior mode, float32, shifted and scaled.

    Args:
        images: [B, 3, H, W] in [0, 1]; for a video autoencoder also frames [B, 3, F, H, W].

    Returns:
        [B, C, h, w]; of a video autoencoder [B, C, T, h, w], T = 1 for images. FLUX.2's are patchified, as its pipeline
        has them.
    """
    pixels = images.to(_working_dtype(vae)) * 2 - 1
    if _is_video(vae) and pixels.ndim == 4:
        pixels = pixels.unsqueeze(2)
    encoded = _run(vae, "encode", pixels)
    raw = (encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent).float()
    if hasattr(vae, "bn"):
        raw = F.pixel_unshuffle(raw, 2)
    mean, std = _statistics(vae, raw)
    return (raw - mean) / std


def decode_latents(vae, latents: Tensor) -> Tensor:
    """D(z_0): float32 images [B, 3, H, W] (frames [B, 3, F, H, W] of a video autoencoder) of what
    :func:`encode_images` returns; differentiable, and not clamped to [0, 1].
    """
    mean, std = _statistics(vae, latents)
    raw = latents * std + mean
    if hasattr(vae, "bn"):
        raw = F.pixel_shuffle(raw, 2)
    if _is_video(vae) and raw.ndim == 4:
        raw = raw.unsqueeze(2)
    return _run(vae, "decode", raw.to(_working_dtype(vae))).sample.float() / 2 + 0.5
