"""activation: values, gradients, the approximations behind them, memory safety, registration and messages."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from stitchvm_ext import ops
from stitchvm_ext.ops import _loader, reference
from stitchvm_ext.ops.activation import KINDS, activation, activation_input_grad
from tests.ops.op_helpers import (
    OFFSETS,
    SENTINEL,
    USABLE_LEVELS,
    assert_accurate,
    assert_gradient,
    assert_untouched,
    device_of,
    dtypes_of,
    guarded,
)

needs_ops = pytest.mark.skipif(not _loader.HAS_OPS, reason=_loader.library_c.reason)
each_kind = pytest.mark.parametrize("name", KINDS)

SHAPES = [(1,), (31,), (2, 3, 1), (5, 32), (2, 3, 33), (2, 2, 2, 65), (3, 1536)]
EMPTY = [(0,), (2, 0, 8), (2, 3, 0)]

EAGER = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
}


def eager(name, x, bias=None):
    return EAGER[name](x if bias is None else x + bias)


def inputs(shape, dtype=torch.float64, device="cpu", seed=0):
    """x, bias, grad; x covers both tails."""
    g = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(shape, generator=g, dtype=torch.float64)
    bias = torch.randn(shape[-1:], generator=g, dtype=torch.float64)
    grad = torch.randn(shape, generator=g, dtype=torch.float64)
    return tuple(t.to(dtype).to(device) for t in (x, bias, grad))


def gradient(f, x, grad):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x), x, grad)[0]


@each_kind
def test_reference_is_eager(name):
    x, bias, grad = inputs((3, 40))
    torch.testing.assert_close(reference.activation(x, KINDS[name], bias), eager(name, x, bias), rtol=1e-12, atol=1e-12)
    expected = gradient(lambda x: eager(name, x, bias), x, grad)
    got = reference.activation_input_grad(grad, x, KINDS[name], bias)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@each_kind
def test_values(backend, name, use_backend):
    chosen = use_backend(backend)
    for dtype, shape in itertools.product(dtypes_of(backend), SHAPES + EMPTY):
        x, bias, _ = inputs(shape, dtype, device_of(backend))
        for b in (None, bias):
            got = getattr(ops, name)(x, b, backend=chosen)
            assert got.is_contiguous()
            exact = eager(name, x.double(), None if b is None else b.double())
            assert_accurate(got, exact, eager(name, x, b))


@each_kind
def test_gradient(backend, name, use_backend):
    chosen = use_backend(backend)
    for dtype, shape in itertools.product(dtypes_of(backend), SHAPES + EMPTY):
        x, bias, grad = inputs(shape, dtype, device_of(backend))
        for b in (None, bias):
            got = gradient(lambda x, b=b: getattr(ops, name)(x, b, backend=chosen), x, grad)
            wide = None if b is None else b.double()
            exact = gradient(lambda x, b=wide: eager(name, x, b), x.double(), grad.double())
            assert_gradient(got, exact, gradient(lambda x, b=b: eager(name, x, b), x, grad))
            torch.testing.assert_close(got, activation_input_grad(grad, x, KINDS[name], b, chosen))


def test_scalar(backend, use_backend):
    chosen = use_backend(backend)
    x = torch.tensor(0.7, device=device_of(backend), requires_grad=True)
    y = ops.silu(x, backend=chosen)
    assert y.shape == () and torch.autograd.grad(y, x)[0].shape == ()
    torch.testing.assert_close(y, F.silu(x))


@each_kind
def test_far_from_zero(kernel, name, use_backend):
    """x on the right, 0 on the left, slopes 1 and 0: no infinity times 0, no large x times an almost vanished tail."""
    chosen = use_backend(kernel)
    top = torch.finfo(torch.float32).max
    x = torch.tensor([88.0, 89.0, 104.0, 128.0, 1e3, 1e10, 1e19, 1e30, top], device=device_of(kernel))
    kind = KINDS[name]
    for dtype in dtypes_of(kernel):
        right = x.to(dtype)
        right = right[torch.isfinite(right)]
        one = torch.ones_like(right)
        torch.testing.assert_close(activation(right, kind, None, chosen), right)
        assert activation(-right, kind, None, chosen).abs().max() <= 1e-30
        torch.testing.assert_close(activation_input_grad(one, right, kind, None, chosen), one)
        assert activation_input_grad(one, -right, kind, None, chosen).abs().max() <= 1e-9
    infinity = torch.tensor([math.inf], device=x.device)
    assert activation(infinity, kind, None, chosen).item() == math.inf
    nan = torch.tensor([math.nan] * 40, device=x.device)
    for dtype in dtypes_of(kernel):
        assert activation(nan.to(dtype), kind, None, chosen).isnan().all()
        assert activation_input_grad(torch.ones_like(nan).to(dtype), nan.to(dtype), kind, None, chosen).isnan().all()


def test_every_nan_stays_a_nan(kernel, use_backend):
    """bfloat16 rounding must not carry a NaN's mantissa into infinity."""
    chosen = use_backend(kernel)
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16).to(device_of(kernel))
    one = torch.ones_like(x)
    for kind in KINDS.values():
        assert activation(x, kind, None, chosen)[x.isnan()].isnan().all()
        assert activation_input_grad(one, x, kind, None, chosen)[x.isnan()].isnan().all()
        assert activation_input_grad(x, one, kind, None, chosen)[x.isnan()].isnan().all()


@needs_ops
def test_bfloat16_is_rounded_once():
    """The short polynomials behind bfloat16 change the rounding of few values, and those by one unit."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.float().abs() < 1e4]
    for name, kind in KINDS.items():
        exact = eager(name, x.double()).to(torch.bfloat16)
        got = activation(x, kind, None, "cpu")
        body = (x > -3.0) & (x.abs() > 1e-37)  # of denormal numbers, one unit is a large part
        assert (got != exact)[body].float().mean() < 0.01
        assert ((got.double() - exact.double()).abs()[body] <= 2.0**-7 * exact.double().abs()[body]).all()


@needs_ops
def test_gelu_against_the_error_function():
    """The fits behind gelu and its slope, in float32; on the left its value has the absolute error of 1 + erf."""
    x = torch.linspace(-7, 7, 2801, dtype=torch.float32)
    one = torch.ones_like(x)
    cdf = torch.tensor([0.5 * math.erfc(-v / math.sqrt(2)) for v in x.tolist()], dtype=torch.float64)
    pdf = torch.tensor([math.exp(-v * v / 2) / math.sqrt(2 * math.pi) for v in x.tolist()], dtype=torch.float64)
    wide = x.double()
    error = (ops.gelu(x, backend="cpu").double() - wide * cdf).abs()
    assert (error[x > 0] <= 6 * 2.0**-24 * (wide * cdf)[x > 0]).all() and error[x < 0].max() <= 1e-6
    error = (activation_input_grad(one, x, 0, None, "cpu").double() - cdf - wide * pdf).abs()
    assert error.max() <= 3e-7 and (error <= 3e-6 * (cdf + wide.abs() * pdf)).all()


@needs_ops
@each_kind
def test_float_is_accurate_to_a_few_units(name):
    x = torch.linspace(-20, 20, 40001, dtype=torch.float32)
    exact = eager(name, x.double())
    error = (activation(x, KINDS[name], None, "cpu").double() - exact).abs()
    assert (error[x > 0] <= 6 * 2.0**-24 * exact[x > 0]).all()
    assert error[x < 0].max() <= (1e-6 if name == "gelu" else 1e-7)
    exact = gradient(lambda x: eager(name, x), x.double(), torch.ones_like(exact))
    error = (activation_input_grad(torch.ones_like(x), x, KINDS[name], None, "cpu").double() - exact).abs()
    assert error.max() <= 4e-7


def test_strided_inputs(backend, use_backend):
    chosen = use_backend(backend)
    x, _, grad = inputs((4, 6, 40), torch.float32, device_of(backend))
    x, grad = x.transpose(0, 1), grad.transpose(0, 1)
    bias = torch.randn(80, device=x.device)[::2]
    got = gradient(lambda x: ops.gelu_tanh(x, bias, backend=chosen), x, grad)
    exact = gradient(lambda x: eager("gelu_tanh", x, bias.double()), x.double(), grad.double())
    assert_gradient(got, exact, gradient(lambda x: eager("gelu_tanh", x, bias), x, grad))


@needs_ops
@pytest.mark.parametrize("channels", [1, 31, 32, 33, 64])
def test_every_start_offset(kernel, channels, use_backend):
    """Inputs lie between NaNs and outputs between sentinels: reading or writing outside shows."""
    use_backend(kernel)
    for dtype in dtypes_of(kernel):
        tensors = inputs((5, channels), dtype, device_of(kernel))
        x, bias, grad = tensors
        for kind in (0, 1):
            expected = torch.ops.stitchvm.activation(x, bias, kind)
            expected_grad = torch.ops.stitchvm.activation_input_grad(grad, x, bias, kind)
            for offset in OFFSETS:
                x_, bias_, grad_ = (guarded(t, offset, float("nan"))[0] for t in tensors)
                out, buffer = guarded(torch.full_like(x, SENTINEL), offset, SENTINEL)
                torch.ops.stitchvm.activation.out(x_, bias_, kind, out=out)
                torch.testing.assert_close(out, expected)
                torch.ops.stitchvm.activation_input_grad.out(grad_, x_, bias_, kind, out=out)
                torch.testing.assert_close(out, expected_grad)
                assert_untouched(buffer, offset, out.numel())


@needs_ops
@each_kind
def test_instruction_sets_do_not_change_bits(name, use_backend):
    for dtype in dtypes_of("cpu"):
        x, bias, grad = inputs((5, 391), dtype)
        results = []
        for level in USABLE_LEVELS:
            use_backend(f"cpu-{level}")
            y = activation(x, KINDS[name], bias, "cpu")
            results.append((y, activation_input_grad(grad, x, KINDS[name], bias, "cpu")))
        for y, grad_x in results[:-1]:
            assert torch.equal(y, results[-1][0]) and torch.equal(grad_x, results[-1][1])


@needs_ops
@each_kind
def test_threads_do_not_change_bits(name):
    x, bias, grad = inputs((299, 391), torch.bfloat16)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y = activation(x, KINDS[name], bias, "cpu")
            results.append((y, activation_input_grad(grad, x, KINDS[name], bias, "cpu")))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_bias_gradients_use_the_reference():
    x, bias, _ = (t.requires_grad_() for t in inputs((3, 5)))
    grads = torch.autograd.grad(ops.gelu(x, bias).square().sum(), (x, bias))
    expected = torch.autograd.grad(F.gelu(x + bias).square().sum(), (x, bias))
    torch.testing.assert_close(grads, expected)


@needs_ops
def test_bias_gradients_are_refused_by_a_named_kernel():
    x, bias, _ = inputs((3, 5))
    bias.requires_grad_()
    with pytest.raises(ValueError, match="gradients for x alone"):
        ops.gelu(x, bias, backend="cpu")
    with torch.no_grad():
        ops.gelu(x, bias, backend="cpu")
    with pytest.raises(RuntimeError, match="gradients for x alone"):
        torch.ops.stitchvm.activation(x.requires_grad_(), bias, 0).sum().backward()


@needs_ops
@each_kind
def test_second_derivative_raises_with_advice(name):
    x = inputs((2, 5))[0].requires_grad_()
    (grad,) = torch.autograd.grad(getattr(ops, name)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(getattr(ops, name)(x, backend="reference").square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert torch.isfinite(x.grad).all()


@needs_ops
@each_kind
def test_gradcheck(name):
    x, bias, _ = inputs((2, 7))
    assert torch.autograd.gradcheck(lambda x: getattr(ops, name)(x, bias, backend="cpu"), x.requires_grad_())


@needs_ops
def test_opcheck():
    x, bias, grad = inputs((2, 3, 5), torch.float32)
    torch.library.opcheck(torch.ops.stitchvm.activation.default, (x.requires_grad_(), None, 2))
    torch.library.opcheck(torch.ops.stitchvm.activation.default, (x.requires_grad_(), bias, 0))
    torch.library.opcheck(torch.ops.stitchvm.activation_input_grad.default, (grad, x.detach(), bias, 1))


@needs_ops
@pytest.mark.slow
def test_compiles_in_one_graph():
    x, bias, _ = inputs((2, 3, 32), torch.float32)
    compiled = torch.compile(lambda x, b: 2 * ops.gelu(x, b), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, bias), 2 * ops.gelu(x, bias))


@needs_ops
def test_dtype_without_a_kernel():
    x = inputs((2, 8), torch.float16)[0]
    assert_accurate(ops.silu(x), F.silu(x.double()), F.silu(x))
    with pytest.raises(TypeError, match="float32, bfloat16, float64, got float16"):
        ops.silu(x, backend="cpu")


X = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((1.0,), TypeError, "x: expected a tensor, got float"),
        ((X.long(),), TypeError, "x: expected a floating-point dtype, got torch.int64"),
        ((X.to_sparse(),), TypeError, "x: expected a strided"),
        ((X, 1.0), TypeError, "bias: expected a tensor, got float"),
        ((X, torch.zeros(3)), ValueError, r"bias: expected shape \[4\], got \[3\]"),
        ((X, torch.zeros(1, 4)), ValueError, r"bias: expected shape \[4\], got \[1, 4\]"),
        ((X[0, 0, 0], torch.zeros(1)), ValueError, r"x: expected shape \[..., C\] where there is a bias"),
        ((X, torch.zeros(4, dtype=torch.float64)), TypeError, "bias: expected the dtype of x, torch.float32"),
        ((X, torch.zeros(4, device="meta")), ValueError, "bias: expected the device of x, cpu, got meta"),
    ],
)
def test_bad_input(args, error, message):
    with pytest.raises(error, match="quick_gelu: " + message):
        ops.quick_gelu(*args)


@needs_ops
def test_direct_calls_of_the_op_are_checked():
    for bad in (
        (X, None, 4),
        (X, None, -1),
        (X, torch.zeros(3), 0),
        (X.half(), None, 0),
        (X, torch.zeros(4).double(), 0),
    ):
        with pytest.raises(RuntimeError):
            torch.ops.stitchvm.activation(*bad)
    with pytest.raises(RuntimeError):
        torch.ops.stitchvm.activation_input_grad(X[0], X, None, 0)
