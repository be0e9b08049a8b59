"""Which backbone, and which latents: how a saved value model knows what it was made for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import DiffusionBackbone
from .latents import normalisation


def fingerprint(backbone: DiffusionBackbone, depth: int) -> dict[str, Any]:
    """What a saved value model remembers of its backbone: class, width and depth, the noise levels that its scheduler
    sets, and a few weights of each kept block.
    """
    return {
        "class": type(backbone.denoiser).__name__,
        "width": backbone.width(max(depth, 1)),
        "depth": backbone.depth,
        "latent_channels": backbone.latent_channels,
        "noise_levels": backbone.process.noise_levels(),
        "weights": [
            _sample_weights(next(p for p in block.parameters() if p.ndim > 1)) for block in backbone.blocks[:depth]
        ],
    }


def check_fingerprint(backbone: DiffusionBackbone, expected: dict[str, Any], depth: int) -> None:
    """Raises ValueError unless this backbone is the one that ``expected`` was taken from, whatever its dtype."""
    got = fingerprint(backbone, depth)
    for name in ("class", "width", "depth", "latent_channels"):
        if got[name] != expected[name]:
            raise ValueError(
                f"pipe: the value model was made for a backbone with {name} {expected[name]}, got {got[name]}"
            )
    if not _is_close(got["noise_levels"], expected.get("noise_levels", [])):
        raise ValueError(
            "pipe: the value model was made for other noise levels; is pipe.scheduler configured for this model?"
        )
    for number, (mine, theirs) in enumerate(zip(got["weights"], expected["weights"], strict=True), 1):
        if not _is_close(mine, theirs):
            raise ValueError(
                f"pipe: the value model was made for other backbone weights; they differ in block {number}"
            )


def latent_space(backbone: DiffusionBackbone, pipe) -> dict[str, Any]:
    """What two backbones must have in common for a value of one to read the latents of the other: channels, size,
    normalisation, and the autoencoder's weights, of which a few. Names and classes do not matter.
    """
    decoder = next(p for name, p in pipe.vae.named_parameters() if name.startswith("decoder.") and p.ndim > 1)
    return {
        "channels": backbone.latent_channels,
        "pixel_factor": backbone.pixel_factor(pipe),
        "normalisation": normalisation(pipe.vae),
        "decoder": _sample_weights(decoder),
    }


def check_latent_space(expected: dict[str, Any] | None, got: dict[str, Any]) -> None:
    """Raises ValueError unless two results of :func:`latent_space` are the same space."""
    if expected is None:
        raise ValueError(
            "value: it was made without its latent space, so it cannot be told whether this pipeline's latents suit "
            "it; expected a value on this pipeline's own denoiser"
        )
    for name in ("channels", "pixel_factor"):
        if got[name] != expected[name]:
            raise ValueError(f"value: expected latents with {name} {expected[name]}, got {got[name]}")
    for name in ("normalisation", "decoder"):
        if not _is_close(got[name], expected[name]):
            raise ValueError(
                f"value: expected latents of the autoencoder that it was made for, got another one's: {name} "
                f"{got[name]} in the place of {expected[name]}"
            )


def _sample_weights(matrix: Tensor, count: int = 8) -> list[float]:
    """A few entries of a matrix: enough to tell two trainings apart, stable under rounding to bfloat16."""
    return [round(v, 6) for v in matrix.detach().flatten()[:: max(1, matrix.numel() // count)][:count].float().tolist()]


def _is_close(mine: list[float], theirs: list[float]) -> bool:
    """Whether two lists of numbers are equal up to the rounding of bfloat16."""
    if len(mine) != len(theirs):
        return False
    return torch.allclose(torch.tensor(mine), torch.tensor(theirs), rtol=2**-6, atol=1e-4)
