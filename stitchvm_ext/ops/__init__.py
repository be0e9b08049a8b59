"""Fused operators, each with a plain reference, a CPU kernel and a CUDA kernel; `info()` says which are usable here."""

from __future__ import annotations

from ._info import format_info, info
from .adaln import adaln
from .guidance_step import guidance_step
from .resample_tokens import resample_tokens, resample_tokens_input_grad

__all__ = ["adaln", "format_info", "guidance_step", "info", "resample_tokens", "resample_tokens_input_grad"]
