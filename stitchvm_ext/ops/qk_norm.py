"""RMSNorm of queries and keys per head, rotary embedding and the joint image + text layout, in one pass."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _loader, reference
from ._checks import SECOND_DERIVATIVE, shape_of

KERNELS = {
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


class QKV(NamedTuple):
    """Joint q [B, Sq, H, D], k and v [B, Sk, H, D], and 1 / RMS of every head [B, Sq, H] and [B, Sk, H]."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    q_rstd: Tensor
    k_rstd: Tensor


def qk_norm(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    context: tuple[Tensor | None, Tensor, Tensor | None] | None = None,
    context_q_weight: Tensor | None = None,
    context_k_weight: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    context_first: bool = False,
    eps: float = 1e-6,
    backend: str | None = None,
) -> QKV:
    """Split q and k into heads, normalise each (RMSNorm, arXiv:1910.07467), rotate, and join image and text tokens.

    For every head x of D channels: `x * rsqrt(mean(x^2) + eps) * weight`, then, with `rotary`, out = x * cos + r * sin
    with r[2i] = -x[2i+1], r[2i+1] = x[2i] (RoPE, arXiv:2104.09864, as in FLUX). The results are written straight into
    the sequence that joint attention reads, image tokens first (SD3) or text tokens first (FLUX); v is copied there
    along. The kernels compute in float32 (float64 for float64) and round once. They differentiate for q, k, v and the
    context, from their results and the 1 / RMS alone: where a weight requires grad, the reference runs instead.

    Args:
        q: [B, Nq, H*D], floating point. A chunk of a wider [B, Nq, C] tensor is read in place; tensors whose channels
            are not contiguous are copied. So are all the following.
        k: [B, N, H*D], dtype and device of q.
        v: like k; or None.
        heads: H.
        q_weight: [D], dtype and device of q; None leaves the image queries as they are (1 / RMS is given as 1).
        k_weight: the same for the image keys.
        context: q [B, Mq, H*D], k [B, M, H*D] and v [B, M, H*D] of the text tokens. Its q is None where no text queries
            are needed; its v is None exactly where v is.
        context_q_weight: as q_weight, for the text tokens.
        context_k_weight: as k_weight, for the text tokens.
        rotary: cos and sin, float32 [S, D] in the order of the joint sequence; needs Sq == Sk == S and an even D.
        context_first: the text tokens come before the image tokens.
        eps: added to the mean of squares; finite, >= 0.
        backend: "reference", "cpu" or "cuda"; None takes the kernel for q's device and dtype where there is one (see
            `stitchvm info`) and the reference otherwise.

    Returns:
        QKV, contiguous, with Sq = Nq + Mq and Sk = N + M: q, k and v in the dtype of q, v None where it is absent;
        q_rstd and k_rstd in float32 (float64 for float64), which have no gradient.

    Raises:
        TypeError: an argument is not a tensor, or its dtype does not fit.
        ValueError: a shape, a device, heads, eps or backend does not fit, or backend is a kernel and a weight, cos or
            sin requires grad.
        RuntimeError: the backend asked for is not available; or a second derivative of a kernel is taken.
    """
    context_q, context_k, context_v = (None, None, None) if context is None else context
    cos, sin = (None, None) if rotary is None else rotary
    args = (q, k, v, context_q, context_k, context_v, q_weight, k_weight, context_q_weight, context_k_weight, cos, sin)
    _check(args, heads, eps)
    chosen = _loader.choose_backend("qk_norm", q, backend, KERNELS)
    if chosen != "reference" and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[6:]):
        if backend is not None:
            raise ValueError(
                f"qk_norm: backend {backend!r} gives gradients for q, k, v and the context alone, but a weight, cos or "
                "sin requires grad; expected backend=None or 'reference'"
            )
        chosen = "reference"
    if chosen == "reference":
        return QKV(*reference.qk_norm(*args, heads, context_first, eps))
    joint_q, joint_k, joint_v, q_rstd, k_rstd = _loader.op("qk_norm", chosen)(*args, heads, context_first, float(eps))
    return QKV(joint_q, joint_k, None if v is None else joint_v, q_rstd, k_rstd)


def qk_norm_input_grad(
    grad_q: Tensor,
    grad_k: Tensor,
    joint: QKV,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    context_q_weight: Tensor | None = None,
    context_k_weight: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    context_q_tokens: int = 0,
    context_k_tokens: int = 0,
    context_first: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of `qk_norm` for q, k and the context's q and k, for backward passes written by hand.

    It reads the normalised results and 1 / RMS, not the inputs; the gradient for v is a slice of that of joint v. A
    weight of exactly 0 destroys what the backward needs and gives NaN there.

    Args:
        grad_q: [B, Sq, H, D], any strides (channels that are not contiguous are copied), not checked.
        grad_k: [B, Sk, H, D], likewise.
        joint: what `qk_norm` returned; v is not read.
        context_q_tokens: Mq, 0 where the context has no q.
        context_k_tokens: M.
        The rest as `qk_norm` had it.

    Returns:
        [B, Nq, H*D] and [B, N, H*D], contiguous; [B, Mq, H*D] and [B, M, H*D], None for 0 tokens.
    """
    cos, sin = (None, None) if rotary is None else rotary
    chosen = _loader.choose_backend("qk_norm_input_grad", joint.q, backend, KERNELS)
    f = reference.qk_norm_input_grad if chosen == "reference" else _loader.op("qk_norm_input_grad", chosen)
    grads = f(
        *(grad_q, grad_k, joint.q, joint.k, joint.q_rstd, joint.k_rstd),
        *(q_weight, k_weight, context_q_weight, context_k_weight, cos, sin),
        *(context_q_tokens, context_k_tokens, context_first),
    )
    return (
        grads[0],
        grads[1],
        grads[2] if context_q_tokens else None,
        grads[3] if context_k_tokens else None,
    )


def _check(args: tuple[Tensor | None, ...], heads: int, eps: float) -> None:
    q, k, v, context_q, context_k, context_v, *weights, cos, sin = args
    if not isinstance(q, Tensor):
        raise TypeError(f"qk_norm: q: expected a tensor, got {type(q).__name__}")
    if not q.is_floating_point():
        raise TypeError(f"qk_norm: q: expected a floating-point dtype, got {q.dtype}")
    if q.layout != torch.strided:
        raise TypeError(f"qk_norm: q: expected a strided (dense) tensor, got layout {q.layout}")
    if q.dim() != 3:
        raise ValueError(f"qk_norm: q: expected shape [B, N, H*D], got {shape_of(q)}")
    batch, _, channels = q.shape
    if isinstance(heads, bool) or not isinstance(heads, int):
        raise TypeError(f"qk_norm: heads: expected an integer, got {type(heads).__name__}")
    if heads < 1 or channels % heads or channels == 0:
        raise ValueError(f"qk_norm: heads: expected a divisor of the {channels} channels of q, got {heads}")
    dim = channels // heads
    names = ("k", "v", "context q", "context k", "context v")
    for name, t in zip(names, args[1:6], strict=True):
        if t is None and name != "k":
            continue
        _check_like(name, t, q)
        if t.dim() != 3 or t.shape[0] != batch or t.shape[2] != channels:
            raise ValueError(f"qk_norm: {name}: expected shape [{batch}, N, {channels}], got {shape_of(t)}")
    if v is not None and v.shape[1] != k.shape[1]:
        raise ValueError(f"qk_norm: v: expected the {k.shape[1]} tokens of k, got {v.shape[1]}")
    if context_k is None and (context_q is not None or context_v is not None):
        raise ValueError("qk_norm: context k: expected a tensor where the context has q or v, got None")
    if context_k is not None and (v is None) != (context_v is None):
        got = "None" if context_v is None else "a tensor"
        raise ValueError(f"qk_norm: context v: expected {'None' if v is None else 'a tensor'} as for v, got {got}")
    if context_v is not None and context_v.shape[1] != context_k.shape[1]:
        raise ValueError(
            f"qk_norm: context v: expected the {context_k.shape[1]} tokens of context k, got {context_v.shape[1]}"
        )
    for name, t in zip(("q_weight", "k_weight", "context_q_weight", "context_k_weight"), weights, strict=True):
        if t is None:
            continue
        _check_like(name, t, q)
        if t.dim() != 1 or t.shape[0] != dim:
            raise ValueError(f"qk_norm: {name}: expected shape [{dim}], got {shape_of(t)}")
    if cos is not None or sin is not None:
        _check_rotary(args, dim)
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(f"qk_norm: eps: expected a number, got {type(eps).__name__}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"qk_norm: eps: expected a finite number >= 0, got {eps}")


def _check_like(name: str, t: Tensor, q: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"qk_norm: {name}: expected a tensor, got {type(t).__name__}")
    if t.dtype != q.dtype:
        raise TypeError(f"qk_norm: {name}: expected the dtype of q, {q.dtype}, got {t.dtype}")
    if t.device != q.device:
        raise ValueError(f"qk_norm: {name}: expected the device of q, {q.device}, got {t.device}")


def _check_rotary(args: tuple[Tensor | None, ...], dim: int) -> None:
    q, k, _, context_q, context_k, *_, cos, sin = args
    q_tokens = q.shape[1] + (0 if context_q is None else context_q.shape[1])
    k_tokens = k.shape[1] + (0 if context_k is None else context_k.shape[1])
    if q_tokens != k_tokens:
        raise ValueError(f"qk_norm: rotary: expected as many queries as keys, got {q_tokens} and {k_tokens}")
    if dim % 2:
        raise ValueError(f"qk_norm: rotary: expected heads of an even number of channels, got {dim}")
    for name, t in (("cos", cos), ("sin", sin)):
        if not isinstance(t, Tensor):
            raise TypeError(f"qk_norm: {name}: expected a tensor, got {type(t).__name__}")
        if t.dtype != torch.float32:
            raise TypeError(f"qk_norm: {name}: expected torch.float32, got {t.dtype}")
        if t.device != q.device:
            raise ValueError(f"qk_norm: {name}: expected the device of q, {q.device}, got {t.device}")
        if t.dim() != 2 or t.shape[0] != q_tokens or t.shape[1] != dim:
            raise ValueError(f"qk_norm: {name}: expected shape [{q_tokens}, {dim}], got {shape_of(t)}")


def register(namespace: str) -> None:
    """Fake kernels (shapes only) and autograd for the compiled ops of a namespace."""
    input_grad = getattr(torch.ops, namespace).qk_norm_input_grad

    @torch.library.register_fake(f"{namespace}::qk_norm")
    def _(q, k, v, context_q, context_k, context_v, qw, kw, cqw, ckw, cos, sin, heads, context_first, eps):
        batch, dim = q.shape[0], q.shape[2] // heads
        q_tokens = q.shape[1] + (0 if context_q is None else context_q.shape[1])
        k_tokens = k.shape[1] + (0 if context_k is None else context_k.shape[1])
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        return (
            q.new_empty(batch, q_tokens, heads, dim),
            q.new_empty(batch, k_tokens, heads, dim),
            q.new_empty(0) if v is None else q.new_empty(batch, k_tokens, heads, dim),
            q.new_empty(batch, q_tokens, heads, dtype=wide),
            q.new_empty(batch, k_tokens, heads, dtype=wide),
        )

    @torch.library.register_fake(f"{namespace}::qk_norm_input_grad")
    def _(grad_q, grad_k, joint_q, joint_k, q_rstd, k_rstd, qw, kw, cqw, ckw, cos, sin, mq, mk, context_first):
        batch, channels = joint_q.shape[0], joint_q.shape[2] * joint_q.shape[3]
        return (
            joint_q.new_empty(batch, joint_q.shape[1] - mq, channels),
            joint_q.new_empty(batch, joint_k.shape[1] - mk, channels),
            joint_q.new_empty(batch, mq, channels) if mq else joint_q.new_empty(0),
            joint_q.new_empty(batch, mk, channels) if mk else joint_q.new_empty(0),
        )

    def setup_context(ctx, inputs, output):
        _, _, _, context_q, context_k, context_v, *constants, _, ctx.context_first, _ = inputs
        joint_q, joint_k, _, q_rstd, k_rstd = output
        ctx.mark_non_differentiable(q_rstd, k_rstd)
        ctx.save_for_backward(joint_q, joint_k, q_rstd, k_rstd, *constants)
        ctx.context_shapes = tuple(None if t is None else t.shape for t in (context_q, context_k, context_v))

    def backward(ctx, grad_q, grad_k, grad_v, *_):
        if any(ctx.needs_input_grad[6:12]):
            raise RuntimeError(
                "qk_norm: the kernel gives gradients for q, k, v and the context alone; call stitchvm_ext.ops.qk_norm "
                "instead"
            )
        mq, mk, mv = (0 if shape is None else shape[1] for shape in ctx.context_shapes)
        q, k, context_q, context_k = input_grad(grad_q, grad_k, *ctx.saved_tensors, mq, mk, ctx.context_first)
        v = context_v = None
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[5]:
            image = slice(mv, None) if ctx.context_first else slice(grad_v.shape[1] - mv)
            text = slice(mv) if ctx.context_first else slice(grad_v.shape[1] - mv, None)
            v, context_v = grad_v[:, image].flatten(2), grad_v[:, text].flatten(2)
        context = [
            None if shape is None or not needed else grad.reshape(shape)
            for grad, shape, needed in zip(
                (context_q, context_k, context_v), ctx.context_shapes, ctx.needs_input_grad[3:6], strict=True
            )
        ]
        return q, k, v, *context, *[None] * 9

    torch.library.register_autograd(f"{namespace}::qk_norm", backward, setup_context=setup_context)

    def no_second_derivative(ctx, *grads):
        raise RuntimeError(SECOND_DERIVATIVE.format(op="qk_norm"))

    torch.library.register_autograd(f"{namespace}::qk_norm_input_grad", no_second_derivative)


if _loader.HAS_OPS:
    register(_loader.NAMESPACE)
