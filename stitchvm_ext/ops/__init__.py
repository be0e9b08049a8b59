"""Fused operators, each with a plain reference, a CPU kernel and a CUDA kernel; `info()` says which are usable here."""

from __future__ import annotations

from ._info import format_info, info
from .activation import gelu, gelu_tanh, quick_gelu, silu
from .guidance_step import guidance_step
from .qk_norm import qk_norm
from .resample_tokens import resample_tokens
from .residual_norm import adaln, gated_residual, gated_residual_adaln, layer_norm

__all__ = [
    "adaln",
    "format_info",
    "gated_residual",
    "gated_residual_adaln",
    "gelu",
    "gelu_tanh",
    "guidance_step",
    "info",
    "layer_norm",
    "qk_norm",
    "quick_gelu",
    "resample_tokens",
    "silu",
]
