"""Plain PyTorch versions of the ops: slow, obviously right, differentiable, on any device and dtype.

They compute in float64 for float64 inputs and in float32 otherwise, and round once, at the end.
"""

from __future__ import annotations

import torch
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


def _interpolate(x: Tensor, grid: tuple[int, int], out_grid: tuple[int, int]) -> Tensor:
    """Bilinear resampling (align_corners=False, no antialiasing) of row-major tokens [B, H*W, C] to [B, h*w, C]."""
    image = x.unflatten(1, grid)
    first, second, weight = _taps(grid[0], out_grid[0], x.dtype, x.device)
    weight = weight[:, None, None]
    image = (1 - weight) * image.index_select(1, first) + weight * image.index_select(1, second)
    first, second, weight = _taps(grid[1], out_grid[1], x.dtype, x.device)
    weight = weight[:, None]
    image = (1 - weight) * image.index_select(2, first) + weight * image.index_select(2, second)
    return image.flatten(1, 2)


def resample_tokens(
    x: Tensor,
    grid: tuple[int, int],
    out_grid: tuple[int, int],
    bias: Tensor | None = None,
    position: Tensor | None = None,
    prefix: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """[prefix; resample(x) + bias + residual] + position: [B, P + h*w, C] from x [B, H*W, C]."""
    dtype = _accumulate_dtype(x)
    y = x.to(dtype)
    if grid != out_grid:
        y = _interpolate(y, grid, out_grid)
    if bias is not None:
        y = y + bias
    if residual is not None:
        y = y + residual
    if prefix is not None:
        y = torch.cat([prefix.to(dtype).expand(len(y), -1, -1), y], dim=1)
    if position is not None:
        y = y + position
    return y.to(x.dtype, copy=y is x).contiguous()


def resample_tokens_input_grad(
    grad: Tensor, grid: tuple[int, int], out_grid: tuple[int, int], prefix_tokens: int = 0
) -> Tensor:
    """Adjoint of the resampling of `resample_tokens`: grad [B, P + h*w, C] to [B, H*W, C], through dense interpolation
    matrices.
    """
    dtype = _accumulate_dtype(grad)

    def matrix(size: int, out_size: int) -> Tensor:
        first, second, weight = _taps(size, out_size, dtype, grad.device)
        eye = torch.eye(size, dtype=dtype, device=grad.device)
        return (1 - weight)[:, None] * eye[first] + weight[:, None] * eye[second]

    image = grad[:, prefix_tokens:].to(dtype).unflatten(1, out_grid)
    image = torch.einsum("ph,bpqc->bhqc", matrix(grid[0], out_grid[0]), image)
    image = torch.einsum("qw,bhqc->bhwc", matrix(grid[1], out_grid[1]), image)
    return image.flatten(1, 2).to(grad.dtype)


def guidance_step(
    latents: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    grad: Tensor | None,
    noise: Tensor | None,
    guidance_scale: float,
    strength: float,
    relative: bool,
    latents_coef: float,
    velocity_coef: float,
    noise_coef: float,
) -> tuple[Tensor, Tensor]:
    """latents_coef * latents + velocity_coef * (u - c * grad) + noise_coef * noise, and the norms [B, 2] of u and grad,
    with u = uncond + guidance_scale * (cond - uncond) and c = strength, times ||u|| / ||grad|| if relative.
    """
    dtype = latents.dtype

    def norm(x: Tensor) -> Tensor:  # in float64: squares of 1e-25 or 1e25 do not fit float32
        return torch.linalg.vector_norm(x.double().flatten(1), dim=1)

    velocity = cond.to(dtype)
    if uncond is not None:
        velocity = uncond.to(dtype) + guidance_scale * (velocity - uncond.to(dtype))
    norms = [norm(velocity), torch.zeros_like(norm(velocity))]
    guided = velocity
    if grad is not None:
        norms[1] = norm(grad)
        c = torch.full_like(norms[0], strength)
        if relative:
            c = torch.where(norms[1] > 0, strength * norms[0] / norms[1], 0)
        guided = velocity - (c.view(-1, *[1] * (grad.dim() - 1)) * grad.double()).to(dtype)
    out = latents_coef * latents + velocity_coef * guided
    if noise is not None:
        out = out + noise_coef * noise
    return out.contiguous(), torch.stack(norms, dim=1).to(dtype)
