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


def _table(t: Tensor, rows: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The row of a [R, C] table for each sample, to broadcast over tokens: [B, 1, C] (or [1, 1, C])."""
    return (t if rows is None else t.index_select(0, rows)).to(dtype)[:, None]


def _normalized(h: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """LayerNorm(h) without affine, and 1 / std."""
    deviation = h - h.mean(-1, keepdim=True)
    rstd = torch.rsqrt(deviation.square().mean(-1, keepdim=True) + eps)
    return deviation * rstd, rstd


def residual_norm(
    x: Tensor,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    branch2: Tensor | None = None,
    gate2: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    scale2: Tensor | None = None,
    shift2: Tensor | None = None,
    rows: Tensor | None = None,
    affine: bool = False,
    eps: float = 1e-6,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """residual = x + gate * branch + gate2 * branch2 and LayerNorm(residual) * (1 + scale) + shift, once or twice.

    x and branches [B, N, C]; gates, scales and shifts [R, C] with R in (1, B), or any R and rows [B], which says the
    row of each sample. `affine` takes the factor `scale` instead of `1 + scale`. Without a branch, x is the residual.

    Returns:
        (residual, y, y2): None without a branch, a scale, a scale2.
    """
    dtype = _accumulate_dtype(x)
    h = x.to(dtype)
    for b, g in ((branch, gate), (branch2, gate2)):
        if b is not None:
            h = h + (b.to(dtype) if g is None else _table(g, rows, dtype) * b.to(dtype))
    residual = None if branch is None else h.to(x.dtype)
    if scale is None:
        return residual, None, None
    n, _ = _normalized(h if residual is None else residual.to(dtype), eps)

    def modulated(scale: Tensor, shift: Tensor | None) -> Tensor:
        y = n * ((0 if affine else 1) + _table(scale, rows, dtype))
        return (y if shift is None else y + _table(shift, rows, dtype)).to(x.dtype)

    return residual, modulated(scale, shift), None if scale2 is None else modulated(scale2, shift2)


def residual_norm_input_grad(
    grad_residual: Tensor | None = None,
    grad_y: Tensor | None = None,
    grad_y2: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    gate2: Tensor | None = None,
    scale: Tensor | None = None,
    scale2: Tensor | None = None,
    rows: Tensor | None = None,
    affine: bool = False,
    eps: float = 1e-6,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `residual_norm` for x and the gated branches.

    With g = grad_y * (1 + scale) + grad_y2 * (1 + scale2) and n = LayerNorm(residual):
    grad_x = grad_residual + rstd * (g - mean(g) - n * mean(g * n)), grad_branch = gate * grad_x.

    Returns:
        (grad_x, grad_branch, grad_branch2): grad_x is None without grad_y and grad_y2 (it is grad_residual then), a
        branch's gradient is None without its gate (it is that of x then).
    """
    like = next(t for t in (grad_residual, grad_y, grad_y2) if t is not None)
    dtype = _accumulate_dtype(like)
    grad = 0 if grad_residual is None else grad_residual.to(dtype)
    through_norm = [(g, s) for g, s in ((grad_y, scale), (grad_y2, scale2)) if g is not None]
    if through_norm:
        n, rstd = _normalized(residual.to(dtype), eps)
        g = sum(g.to(dtype) * ((0 if affine else 1) + _table(s, rows, dtype)) for g, s in through_norm)
        grad = grad + rstd * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))
    branches = (None if t is None else (_table(t, rows, dtype) * grad).to(like.dtype) for t in (gate, gate2))
    return grad.to(like.dtype) if through_norm else None, *branches


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
