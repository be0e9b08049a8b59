"""Bilinear resampling of a grid of tokens, from the resolution of one network to that of another, and what the next
network's input adds to it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _loader, reference
from ._checks import SECOND_DERIVATIVE, check_grid, check_like, check_tokens, shape_of

KERNELS = {
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def resample_tokens(
    x: Tensor,
    grid: tuple[int, int],
    out_grid: tuple[int, int],
    *,
    bias: Tensor | None = None,
    position: Tensor | None = None,
    prefix: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`concat(prefix, resample(x) + bias + residual) + position`, without leaving the token layout.

    The resampling of row-major tokens from an (H, W) grid to an (h, w) grid is bilinear, align_corners=False, no
    antialiasing: the values of `torch.nn.functional.interpolate(mode="bilinear")` on the [B, C, H, W] image. Between
    equal grids it is the identity. A vision transformer's input is such a sum: patches, class tokens, positions.

    The kernels do it in one pass, compute in float32 (float64 for float64) and round once; the gradient is a gather
    with a fixed order of summation, the same on every run. They differentiate for x and residual alone: where bias,
    position or prefix require grad, the reference runs instead, which differentiates for all.

    Args:
        x: [B, H*W, C], floating point, token (row, column) at index row * W + column. Non-contiguous tensors are
            copied.
        grid: (H, W), each in [1, 32767].
        out_grid: (h, w), each in [1, 32767].
        bias: [C], of the map that made x; dtype and device of x, like all that follow.
        position: [P + h*w, C], or [h*w, C] without a prefix.
        prefix: [P, C], the tokens in front, the same for every sample.
        residual: [B, h*w, C].
        backend: "reference", "cpu" or "cuda"; None takes the kernel for x's device and dtype where there is one (see
            `stitchvm info`) and the reference otherwise.

    Returns:
        [B, P + h*w, C], contiguous, dtype of x.

    Raises:
        TypeError: an argument is not a tensor, a dtype does not fit, a grid side is no integer, or backend has no
            kernel for the dtype.
        ValueError: a shape, a grid, a device or backend does not fit, or backend is a kernel and bias, position or
            prefix require grad.
        RuntimeError: the backend asked for is not available; or a second derivative of a kernel is taken.
    """
    op = "resample_tokens"
    check_tokens(op, x)
    h, w = check_grid(op, "grid", grid)
    out_h, out_w = check_grid(op, "out_grid", out_grid)
    if x.shape[1] != h * w:
        raise ValueError(f"{op}: x: expected [B, {h} * {w} = {h * w}, C] for the grid, got {shape_of(x)}")
    batch, _, channels = x.shape
    if prefix is not None:
        check_like(op, "prefix", prefix, x)
        if prefix.dim() != 2 or prefix.shape[1] != channels:
            raise ValueError(f"{op}: prefix: expected shape [P, {channels}], got {shape_of(prefix)}")
    tokens = out_h * out_w + (0 if prefix is None else prefix.shape[0])
    for name, t, shape in (
        ("bias", bias, (channels,)),
        ("position", position, (tokens, channels)),
        ("residual", residual, (batch, out_h * out_w, channels)),
    ):
        if t is not None:
            check_like(op, name, t, x)
            if t.shape != shape:
                raise ValueError(f"{op}: {name}: expected shape {list(shape)}, got {shape_of(t)}")
    chosen = _loader.choose_backend(op, x, backend, KERNELS)
    weights = {"bias": bias, "position": position, "prefix": prefix}
    trained = [name for name, t in weights.items() if t is not None and t.requires_grad]
    if chosen != "reference" and torch.is_grad_enabled() and trained:
        if backend is not None:
            raise ValueError(
                f"{op}: backend {backend!r} gives gradients for x and residual alone, but {trained[0]} requires grad; "
                "expected backend=None or 'reference'"
            )
        chosen = "reference"
    if chosen == "reference":
        return reference.resample_tokens(x, (h, w), (out_h, out_w), **weights, residual=residual)
    return _loader.op(op, chosen)(x, bias, position, prefix, residual, h, w, out_h, out_w)


def resample_tokens_input_grad(
    grad: Tensor,
    grid: tuple[int, int],
    out_grid: tuple[int, int],
    prefix_tokens: int = 0,
    *,
    backend: str | None = None,
) -> Tensor:
    """The gradient of `resample_tokens` for x: the adjoint of the resampling, of `grad` behind its first P tokens.

    Args:
        grad: [B, P + h*w, C], floating point; the gradient of the result.
        grid, out_grid, backend: as for `resample_tokens`.
        prefix_tokens: P, at least 0.

    Returns:
        [B, H*W, C], contiguous, dtype of grad.

    Raises:
        TypeError, ValueError, RuntimeError: as for `resample_tokens`.
    """
    op = "resample_tokens_input_grad"
    check_tokens(op, grad, "grad")
    h, w = check_grid(op, "grid", grid)
    out_h, out_w = check_grid(op, "out_grid", out_grid)
    if isinstance(prefix_tokens, bool) or not isinstance(prefix_tokens, int):
        raise TypeError(f"{op}: prefix_tokens: expected an integer, got {type(prefix_tokens).__name__}")
    if prefix_tokens < 0:
        raise ValueError(f"{op}: prefix_tokens: expected at least 0, got {prefix_tokens}")
    if grad.shape[1] != prefix_tokens + out_h * out_w:
        raise ValueError(
            f"{op}: grad: expected [B, {prefix_tokens} + {out_h} * {out_w} = {prefix_tokens + out_h * out_w}, C] for "
            f"prefix_tokens and out_grid, got {shape_of(grad)}"
        )
    chosen = _loader.choose_backend(op, grad, backend, KERNELS)
    if chosen == "reference":
        return reference.resample_tokens_input_grad(grad, (h, w), (out_h, out_w), prefix_tokens)
    return _loader.op(op, chosen)(grad, prefix_tokens, h, w, out_h, out_w)


def register(namespace: str) -> None:
    """Fake kernels (shapes only) and autograd for the compiled ops of a namespace."""
    input_grad = getattr(torch.ops, namespace).resample_tokens_input_grad

    @torch.library.register_fake(f"{namespace}::resample_tokens")
    def _(x, bias, position, prefix, residual, h, w, out_h, out_w):
        return x.new_empty(x.shape[0], out_h * out_w + (0 if prefix is None else prefix.shape[0]), x.shape[2])

    @torch.library.register_fake(f"{namespace}::resample_tokens_input_grad")
    def _(grad, prefix_tokens, h, w, out_h, out_w):
        return grad.new_empty(grad.shape[0], h * w, grad.shape[2])

    def setup_context(ctx, inputs, output):
        prefix = inputs[3]
        ctx.prefix_tokens = 0 if prefix is None else prefix.shape[0]
        ctx.sides = inputs[5:]

    def backward(ctx, grad):
        if any(ctx.needs_input_grad[1:4]):
            raise RuntimeError(
                "resample_tokens: the kernel gives gradients for x and residual alone; call "
                "stitchvm_ext.ops.resample_tokens instead"
            )
        straight = grad[:, ctx.prefix_tokens :]
        for_x = None
        if ctx.needs_input_grad[0]:  # with equal grids the resampling is the identity
            h, w, out_h, out_w = ctx.sides
            same = (h, w) == (out_h, out_w)
            for_x = straight if same else input_grad(grad, ctx.prefix_tokens, *ctx.sides)
        for_residual = straight if ctx.needs_input_grad[4] else None
        return for_x, None, None, None, for_residual, None, None, None, None

    torch.library.register_autograd(f"{namespace}::resample_tokens", backward, setup_context=setup_context)

    def no_second_derivative(ctx, grad):
        raise RuntimeError(SECOND_DERIVATIVE.format(op="resample_tokens"))

    torch.library.register_autograd(f"{namespace}::resample_tokens_input_grad", no_second_derivative)


if _loader.HAS_OPS:
    register(_loader.NAMESPACE)
