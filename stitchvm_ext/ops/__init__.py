"""Fused operators, each with a plain reference, a CPU kernel and a CUDA kernel; `info()` says which are usable here."""

from __future__ import annotations

from ._info import format_info, info
from .resample_tokens import resample_tokens
from .residual_norm import adaln, gated_residual, gated_residual_adaln, layer_norm

__all__ = [
    "adaln",
    "format_info",
    "gated_residual",
    "gated_residual_adaln",
    "info",
    "layer_norm",
    "resample_tokens",
]
