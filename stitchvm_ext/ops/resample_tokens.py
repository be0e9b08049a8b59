"""Bilinear resampling of a grid of tokens, from the resolution of one network to that of another."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _loader, reference
from ._checks import SECOND_DERIVATIVE, check_grid, check_tokens, shape_of

KERNELS = {
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def resample_tokens(
    x: Tensor, grid: tuple[int, int], out_grid: tuple[int, int], *, backend: str | None = None
) -> Tensor:
    """Resample row-major tokens of an (H, W) grid to an (h, w) grid, without leaving the token layout.

    Bilinear, align_corners=False, no antialiasing: the values of `torch.nn.functional.interpolate(mode="bilinear")` on
    the [B, C, H, W] image. The kernels compute in float32 (float64 for float64) and round once; the gradient is a
    gather with a fixed order of summation, the same on every run.

    Args:
        x: [B, H*W, C], floating point, token (row, column) at index row * W + column. Non-contiguous tensors are
            copied.
        grid: (H, W), each in [1, 32767].
        out_grid: (h, w), each in [1, 32767].
        backend: "reference", "cpu" or "cuda"; None takes the kernel for x's device and dtype where there is one (see
            `stitchvm info`) and the reference otherwise.

    Returns:
        [B, h*w, C], contiguous, dtype of x.

    Raises:
        TypeError: x is not a floating-point tensor, a grid side is no integer, or backend has no kernel for the dtype.
        ValueError: a shape, a grid or backend does not fit.
        RuntimeError: the backend asked for is not available; or a second derivative of a kernel is taken.
    """
    check_tokens("resample_tokens", x)
    h, w = check_grid("resample_tokens", "grid", grid)
    out_h, out_w = check_grid("resample_tokens", "out_grid", out_grid)
    if x.shape[1] != h * w:
        raise ValueError(f"resample_tokens: x: expected [B, {h} * {w} = {h * w}, C] for the grid, got {shape_of(x)}")
    chosen = _loader.choose_backend("resample_tokens", x, backend, KERNELS)
    if chosen == "reference":
        return reference.resample_tokens(x, (h, w), (out_h, out_w))
    return _loader.op("resample_tokens", chosen)(x, h, w, out_h, out_w)


def register(namespace: str) -> None:
    """Fake kernels (shapes only) and autograd for the compiled ops of a namespace."""
    input_grad = getattr(torch.ops, namespace).resample_tokens_input_grad

    @torch.library.register_fake(f"{namespace}::resample_tokens")
    def _(x, h, w, out_h, out_w):
        return x.new_empty(x.shape[0], out_h * out_w, x.shape[2])

    @torch.library.register_fake(f"{namespace}::resample_tokens_input_grad")
    def _(grad, h, w, out_h, out_w):
        return grad.new_empty(grad.shape[0], h * w, grad.shape[2])

    def setup_context(ctx, inputs, output):
        ctx.sides = inputs[1:]

    def backward(ctx, grad):
        return input_grad(grad, *ctx.sides), None, None, None, None

    torch.library.register_autograd(f"{namespace}::resample_tokens", backward, setup_context=setup_context)

    def no_second_derivative(ctx, grad):
        raise RuntimeError(SECOND_DERIVATIVE.format(op="resample_tokens"))

    torch.library.register_autograd(f"{namespace}::resample_tokens_input_grad", no_second_derivative)


if _loader.HAS_OPS:
    register(_loader.NAMESPACE)
