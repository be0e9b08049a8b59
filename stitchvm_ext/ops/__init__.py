"""Fused operators, each with a plain reference, a CPU kernel and a CUDA kernel; `info()` says which are usable here."""

from __future__ import annotations

from ._info import format_info, info
from .activation import gelu, gelu_tanh, quick_gelu, silu
from .adaln import adaln
from .qk_norm import QKV, qk_norm
from .resample_tokens import resample_tokens

__all__ = [
    "QKV",
    "adaln",
    "format_info",
    "gelu",
    "gelu_tanh",
    "info",
    "qk_norm",
    "quick_gelu",
    "resample_tokens",
    "silu",
]
