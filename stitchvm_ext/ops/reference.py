"""Plain PyTorch versions of the ops: slow, obviously right, differentiable, on any device and dtype.

They compute in float64 for float64 inputs and in float32 otherwise, and round once, at the end.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def adaln(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """(1 + scale) * LayerNorm(x) + shift; x [B, N, C], scale and shift [B, C] or [1, C]."""
    dtype = _accumulate_dtype(x)
    h = x.to(dtype)
    deviation = h - h.mean(-1, keepdim=True)
    normalized = deviation * torch.rsqrt(deviation.square().mean(-1, keepdim=True) + eps)
    return ((1 + scale.to(dtype)[:, None]) * normalized + shift.to(dtype)[:, None]).to(x.dtype)


def adaln_input_grad(grad: Tensor, x: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Gradient of `adaln` for x: rstd * (g - mean(g) - n * mean(g * n)), g = grad * (1 + scale), n = LayerNorm(x)."""
    dtype = _accumulate_dtype(x)
    h = x.to(dtype)
    deviation = h - h.mean(-1, keepdim=True)
    rstd = torch.rsqrt(deviation.square().mean(-1, keepdim=True) + eps)
    n = deviation * rstd
    g = grad.to(dtype) * (1 + scale.to(dtype)[:, None])
    return (rstd * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))).to(x.dtype)


def _taps(size: int, out_size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each output position o, the two input positions it reads and the weight of the second.

    The source coordinate is (o + 1/2) * size / out_size - 1/2, clamped at 0; the second position at size - 1.
    """
    o = torch.arange(out_size, device=device)
    numerator = ((2 * o + 1) * size - out_size).clamp_min(0)
    first = numerator // (2 * out_size)
    weight = (numerator - first * 2 * out_size).to(dtype) / (2 * out_size)
    return first, (first + 1).clamp_max(size - 1), weight


def resample_tokens(x: Tensor, grid: tuple[int, int], out_grid: tuple[int, int]) -> Tensor:
    """Bilinear resampling (align_corners=False, no antialiasing) of row-major tokens [B, H*W, C] to [B, h*w, C]."""
    dtype = _accumulate_dtype(x)
    image = x.to(dtype).unflatten(1, grid)
    first, second, weight = _taps(grid[0], out_grid[0], dtype, x.device)
    weight = weight[:, None, None]
    image = (1 - weight) * image.index_select(1, first) + weight * image.index_select(1, second)
    first, second, weight = _taps(grid[1], out_grid[1], dtype, x.device)
    weight = weight[:, None]
    image = (1 - weight) * image.index_select(2, first) + weight * image.index_select(2, second)
    return image.flatten(1, 2).to(x.dtype)


def resample_tokens_input_grad(grad: Tensor, grid: tuple[int, int], out_grid: tuple[int, int]) -> Tensor:
    """Adjoint of `resample_tokens`: grad [B, h*w, C] to [B, H*W, C], through dense interpolation matrices."""
    dtype = _accumulate_dtype(grad)

    def matrix(size: int, out_size: int) -> Tensor:
        first, second, weight = _taps(size, out_size, dtype, grad.device)
        eye = torch.eye(size, dtype=dtype, device=grad.device)
        return (1 - weight)[:, None] * eye[first] + weight[:, None] * eye[second]

    image = grad.to(dtype).unflatten(1, out_grid)
    image = torch.einsum("ph,bpqc->bhqc", matrix(grid[0], out_grid[0]), image)
    image = torch.einsum("qw,bhqc->bhwc", matrix(grid[1], out_grid[1]), image)
    return image.flatten(1, 2).to(grad.dtype)


def activation(x: Tensor, kind: int, bias: Tensor | None = None) -> Tensor:
    """gelu, gelu_tanh, quick_gelu or silu (kind 0 to 3) of x + bias; x [..., C], bias [C]."""
    dtype = _accumulate_dtype(x)
    h = x.to(dtype) if bias is None else x.to(dtype) + bias.to(dtype)
    if kind == 0:
        y = F.gelu(h)
    elif kind == 1:
        y = F.gelu(h, approximate="tanh")
    elif kind == 2:
        y = h * torch.sigmoid(1.702 * h)
    else:
        y = F.silu(h)
    return y.to(x.dtype).contiguous()


def activation_input_grad(grad: Tensor, x: Tensor, kind: int, bias: Tensor | None = None) -> Tensor:
    """Gradient of `activation` for x: with y = h * s(h), grad * (s + h * s')."""
    dtype = _accumulate_dtype(x)
    h = x.to(dtype) if bias is None else x.to(dtype) + bias.to(dtype)
    if kind == 0:
        s = torch.special.ndtr(h)
        slope = torch.exp(-0.5 * h * h) / math.sqrt(2 * math.pi)
    elif kind == 1:
        a = 2 * math.sqrt(2 / math.pi)
        s = torch.sigmoid(a * (h + 0.044715 * h**3))
        slope = s * (1 - s) * a * (1 + 3 * 0.044715 * h * h)
    else:
        a = 1.702 if kind == 2 else 1.0
        s = torch.sigmoid(a * h)
        slope = s * (1 - s) * a
    return (grad.to(dtype) * (s + h * slope)).to(x.dtype).contiguous()
