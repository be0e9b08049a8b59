"""Pointwise nonlinearities of transformer MLPs, with the bias of the linear layer before them added on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _loader, reference
from ._checks import SECOND_DERIVATIVE, check_like, shape_of

KERNELS = {
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}

KINDS = {"gelu": 0, "gelu_tanh": 1, "quick_gelu": 2, "silu": 3}  # csrc/common/activation.h


def gelu(x: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """GELU of x + bias, h * Phi(h) with the normal distribution function Phi (arXiv:1606.08415), not approximated.

    The compiled kernels add the bias and evaluate in float32 (float64 for float64) and round once. Their backward reads
    x and bias again, nothing else is kept. They differentiate for x alone: where bias requires grad, the reference runs
    instead, which differentiates for both.

    Args:
        x: [..., C], floating point, any number of dimensions. Non-contiguous tensors are copied.
        bias: [C], dtype and device of x; or None.
        backend: "reference", "cpu" or "cuda"; None takes the kernel for x's device and dtype where there is one (see
            `stitchvm info`) and the reference otherwise.

    Returns:
        [..., C], contiguous, dtype of x.

    Raises:
        TypeError: an argument is not a tensor, or its dtype does not fit.
        ValueError: a shape, a device or backend does not fit, or backend is a kernel and bias requires grad.
        RuntimeError: the backend asked for is not available; or a second derivative of a kernel is taken.
    """
    _check("gelu", x, bias)
    return activation(x, 0, bias, backend)


def gelu_tanh(x: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """h * (1 + tanh(sqrt(2 / pi) * (h + 0.044715 h^3))) / 2 with h = x + bias. Otherwise as `gelu`."""
    _check("gelu_tanh", x, bias)
    return activation(x, 1, bias, backend)


def quick_gelu(x: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """h * sigmoid(1.702 h) with h = x + bias, the approximation in CLIP. Otherwise as `gelu`."""
    _check("quick_gelu", x, bias)
    return activation(x, 2, bias, backend)


def silu(x: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """h * sigmoid(h) with h = x + bias. Otherwise as `gelu`."""
    _check("silu", x, bias)
    return activation(x, 3, bias, backend)


def activation(x: Tensor, kind: int, bias: Tensor | None = None, backend: str | None = None) -> Tensor:
    """The function KINDS[name] == kind, without the checks of its public face: for backward passes written by hand."""
    chosen = _loader.choose_backend("activation", x, backend, KERNELS)
    if chosen != "reference" and bias is not None and bias.requires_grad and torch.is_grad_enabled():
        if backend is not None:
            raise ValueError(
                f"activation: backend {backend!r} gives gradients for x alone, but bias requires grad; expected "
                "backend=None or 'reference'"
            )
        chosen = "reference"
    if chosen == "reference":
        return reference.activation(x, kind, bias)
    return _loader.op("activation", chosen)(x, bias, kind)


def activation_input_grad(
    grad: Tensor, x: Tensor, kind: int, bias: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """The gradient of `activation` for x, from the gradient of its result. Shapes and dtypes as there, not checked."""
    chosen = _loader.choose_backend("activation_input_grad", x, backend, KERNELS)
    if chosen == "reference":
        return reference.activation_input_grad(grad, x, kind, bias)
    return _loader.op("activation_input_grad", chosen)(grad, x, bias, kind)


def _check(op: str, x: Tensor, bias: Tensor | None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x: expected a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{op}: x: expected a floating-point dtype, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{op}: x: expected a strided (dense) tensor, got layout {x.layout}")
    if bias is None:
        return
    check_like(op, "bias", bias, x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x: expected shape [..., C] where there is a bias, got []")
    if bias.dim() != 1 or bias.shape[0] != x.shape[-1]:
        raise ValueError(f"{op}: bias: expected shape [{x.shape[-1]}], got {shape_of(bias)}")


def register(namespace: str) -> None:
    """Fake kernels (shapes only) and autograd for the compiled ops of a namespace."""
    input_grad = getattr(torch.ops, namespace).activation_input_grad

    @torch.library.register_fake(f"{namespace}::activation")
    def _(x, bias, kind):
        return x.new_empty(x.shape)

    @torch.library.register_fake(f"{namespace}::activation_input_grad")
    def _(grad, x, bias, kind):
        return x.new_empty(x.shape)

    def setup_context(ctx, inputs, output):
        x, bias, ctx.kind = inputs
        ctx.save_for_backward(x, bias)

    def backward(ctx, grad):
        if ctx.needs_input_grad[1]:
            raise RuntimeError(
                "activation: the kernel gives gradients for x alone; call the functions of stitchvm_ext.ops instead"
            )
        x, bias = ctx.saved_tensors
        return input_grad(grad, x, bias, ctx.kind), None, None

    torch.library.register_autograd(f"{namespace}::activation", backward, setup_context=setup_context)

    def no_second_derivative(ctx, grad):
        raise RuntimeError(SECOND_DERIVATIVE.format(op="activation"))

    torch.library.register_autograd(f"{namespace}::activation_input_grad", no_second_derivative)


if _loader.HAS_OPS:
    register(_loader.NAMESPACE)
