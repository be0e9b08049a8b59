"""Adaptive layer norm: the modulated normalisation in front of every block of a diffusion transformer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _loader, reference
from ._checks import SECOND_DERIVATIVE, check_like, check_tokens, shape_of

KERNELS = {
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def adaln(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6, *, backend: str | None = None) -> Tensor:
    """LayerNorm without affine over C, then `(1 + scale) * x + shift` (DiT, arXiv:2212.09748, adaLN).

    The compiled kernels read x once from memory, compute in float32 (float64 for float64) and round once. They
    differentiate for x alone: where scale or shift require grad, the reference runs instead, which differentiates for
    all three.

    Args:
        x: [B, N, C], floating point. Non-contiguous tensors are copied.
        scale: [B, C], or [1, C] to share one row over the batch; dtype and device of x. A chunk of a wider tensor is
            read in place.
        shift: like scale.
        eps: added to the variance; finite, >= 0.
        backend: "reference", "cpu" or "cuda"; None takes the kernel for x's device and dtype where there is one (see
            `stitchvm info`) and the reference otherwise.

    Returns:
        [B, N, C], contiguous, dtype of x.

    Raises:
        TypeError: an argument is not a tensor, or its dtype does not fit.
        ValueError: a shape, a device, eps or backend does not fit, or backend is a kernel and scale or shift require
            grad.
        RuntimeError: the backend asked for is not available; or a second derivative of a kernel is taken.
    """
    _check(x, scale, shift, eps)
    chosen = _loader.choose_backend("adaln", x, backend, KERNELS)
    if chosen != "reference" and torch.is_grad_enabled() and (scale.requires_grad or shift.requires_grad):
        if backend is not None:
            raise ValueError(
                f"adaln: backend {backend!r} gives gradients for x alone, but scale or shift require grad; "
                "expected backend=None or 'reference'"
            )
        chosen = "reference"
    if chosen == "reference":
        return reference.adaln(x, scale, shift, eps)
    return _loader.op("adaln", chosen)(x, scale, shift, float(eps))


def _check(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> None:
    check_tokens("adaln", x)
    batch, _, channels = x.shape
    for name, t in (("scale", scale), ("shift", shift)):
        check_like("adaln", name, t, x)
        if t.dim() != 2 or t.shape[1] != channels or t.shape[0] not in (batch, 1):
            raise ValueError(
                f"adaln: {name}: expected shape [{batch}, {channels}] or [1, {channels}], got {shape_of(t)}"
            )
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(f"adaln: eps: expected a number, got {type(eps).__name__}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"adaln: eps: expected a finite number >= 0, got {eps}")


def register(namespace: str) -> None:
    """Fake kernels (shapes only) and autograd for the compiled ops of a namespace."""
    input_grad = getattr(torch.ops, namespace).adaln_input_grad

    @torch.library.register_fake(f"{namespace}::adaln")
    def _(x, scale, shift, eps):
        return x.new_empty(x.shape)

    @torch.library.register_fake(f"{namespace}::adaln_input_grad")
    def _(grad, x, scale, eps):
        return x.new_empty(x.shape)

    def setup_context(ctx, inputs, output):
        x, scale, _, ctx.eps = inputs
        ctx.save_for_backward(x, scale)

    def backward(ctx, grad):
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            raise RuntimeError("adaln: the kernel gives gradients for x alone; call stitchvm_ext.ops.adaln instead")
        x, scale = ctx.saved_tensors
        return input_grad(grad, x, scale, ctx.eps), None, None, None

    torch.library.register_autograd(f"{namespace}::adaln", backward, setup_context=setup_context)

    def no_second_derivative(ctx, grad):
        raise RuntimeError(SECOND_DERIVATIVE.format(op="adaln"))

    torch.library.register_autograd(f"{namespace}::adaln_input_grad", no_second_derivative)


if _loader.HAS_OPS:
    register(_loader.NAMESPACE)
