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


def _rotate_half(x: Tensor) -> Tensor:
    """r[2i] = -x[2i+1], r[2i+1] = x[2i] over the last dimension."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-second, first), -1).flatten(-2)


def qk_norm(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    context_q: Tensor | None,
    context_k: Tensor | None,
    context_v: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    context_q_weight: Tensor | None,
    context_k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    context_first: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Per-head RMSNorm and rotary embedding in the joint layout; see `ops.qk_norm`. Returns q, k, v and 1 / RMS."""
    dtype = _accumulate_dtype(q)

    def join(image: Tensor, text: Tensor | None) -> Tensor:
        if text is None:
            return image
        return torch.cat((text, image) if context_first else (image, text), 1)

    def norm(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        h = x.to(dtype).unflatten(-1, (heads, -1))
        if weight is None:
            return h, torch.ones_like(h[..., 0])
        rstd = torch.rsqrt(h.square().mean(-1) + eps)
        return h * rstd[..., None] * weight.to(dtype), rstd

    def stream(image: Tensor, text: Tensor | None, weight: Tensor | None, text_weight: Tensor | None):
        values, rstd = norm(image, weight)
        text_values, text_rstd = (None, None) if text is None else norm(text, text_weight)
        values, rstd = join(values, text_values), join(rstd, text_rstd)
        if cos is not None:
            values = values * cos.to(dtype)[:, None] + _rotate_half(values) * sin.to(dtype)[:, None]
        return values.to(q.dtype).contiguous(), rstd.detach()

    joint_q, q_rstd = stream(q, context_q, q_weight, context_q_weight)
    joint_k, k_rstd = stream(k, context_k, k_weight, context_k_weight)
    joint_v = None if v is None else join(v, context_v).unflatten(-1, (heads, -1)).contiguous()
    return joint_q, joint_k, joint_v, q_rstd, k_rstd


def qk_norm_input_grad(
    grad_q: Tensor,
    grad_k: Tensor,
    joint_q: Tensor,
    joint_k: Tensor,
    q_rstd: Tensor,
    k_rstd: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    context_q_weight: Tensor | None,
    context_k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    context_q_tokens: int,
    context_k_tokens: int,
    context_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `qk_norm` for q, k and the context's q and k, from its results.

    With z the result before the rotation, g the gradient for z, n = z / w: rstd * (g * w - n * mean(g * w * n)).
    """
    dtype = _accumulate_dtype(joint_q)

    def split(t: Tensor, context_tokens: int) -> tuple[Tensor, Tensor]:
        if context_first:
            return t[:, context_tokens:], t[:, :context_tokens]
        return t[:, : t.shape[1] - context_tokens], t[:, t.shape[1] - context_tokens :]

    def stream(grad, joint, rstd, weight, context_weight, context_tokens):
        g, z = grad.to(dtype), joint.to(dtype)
        if cos is not None:
            c, s = cos.to(dtype)[:, None], sin.to(dtype)[:, None]
            g = g * c - _rotate_half(g * s)
            first_c, second_c = c.unflatten(-1, (-1, 2)).unbind(-1)
            first_s, second_s = s.unflatten(-1, (-1, 2)).unbind(-1)
            first, second = z.unflatten(-1, (-1, 2)).unbind(-1)
            determinant = first_c * second_c + first_s * second_s
            z = torch.stack((first * second_c + second * first_s, second * first_c - first * second_s), -1)
            z = (z / determinant[..., None]).flatten(-2)
        results = []
        for part_g, part_z, part_rstd, w in zip(
            split(g, context_tokens),
            split(z, context_tokens),
            split(rstd, context_tokens),
            (weight, context_weight),
            strict=True,
        ):
            result = part_g
            if w is not None:
                n, gw = part_z / w.to(dtype), part_g * w.to(dtype)
                result = part_rstd.to(dtype)[..., None] * (gw - n * (gw * n).mean(-1, keepdim=True))
            results.append(result.flatten(2).to(joint.dtype).contiguous())
        return results

    q, context_q = stream(grad_q, joint_q, q_rstd, q_weight, context_q_weight, context_q_tokens)
    k, context_k = stream(grad_k, joint_k, k_rstd, k_weight, context_k_weight, context_k_tokens)
    return q, k, context_q, context_k
