"""adaln: values, gradients, memory safety, registration and messages."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stitchvm_ext.ops import _loader, adaln, reference
from tests.ops.op_helpers import (
    OFFSETS,
    SENTINEL,
    USABLE_LEVELS,
    C,
    assert_accurate,
    assert_gradient,
    assert_untouched,
    device_of,
    dtypes_of,
    guarded,
)

needs_ops = pytest.mark.skipif(not _loader.HAS_OPS, reason=_loader.library_c.reason)

# (B, N, C, rows of scale and shift)
SHAPES = [(1, 1, 1, 1), (2, 3, 1, 2), (2, 5, 31, 2), (3, 1, 32, 1), (2, 7, 33, 2), (1, 31, 64, 1), (2, 33, 257, 1)]
SHAPES += [(2, 4, 1536, 2), (1, 2, 4099, 1)]
EMPTY = [(0, 3, 8, 0), (2, 0, 8, 2), (2, 3, 0, 2), (0, 3, 8, 1)]


def eager(x, scale, shift, eps=1e-6):
    """The form in diffusers' transformer blocks."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


def inputs(shape, dtype=torch.float64, device="cpu", seed=0):
    b, n, c, rows = shape
    g = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(b, n, c, generator=g, dtype=torch.float64) + 1
    scale = 0.5 * torch.randn(rows, c, generator=g, dtype=torch.float64)
    shift = torch.randn(rows, c, generator=g, dtype=torch.float64)
    return tuple(t.to(dtype).to(device) for t in (x, scale, shift))


def in_double(tensors):
    return tuple(t.double() for t in tensors)


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_layer_norm(shape):
    args = inputs(shape)
    torch.testing.assert_close(reference.adaln(*args), eager(*args), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_gradient_is_autograd(shape):
    x, scale, shift = inputs(shape)
    grad = torch.randn_like(x)
    (expected,) = torch.autograd.grad(eager(x.requires_grad_(), scale, shift), x, grad)
    torch.testing.assert_close(reference.adaln_input_grad(grad, x.detach(), scale), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES + EMPTY)
def test_values(backend, shape, use_backend):
    name = use_backend(backend)
    for dtype in dtypes_of(backend):
        args = inputs(shape, dtype, device_of(backend))
        got = adaln(*args, backend=name)
        assert got.is_contiguous()
        assert_accurate(got, eager(*in_double(args)), eager(*args))


@pytest.mark.parametrize("shape", SHAPES + EMPTY)
def test_gradient(backend, shape, use_backend):
    name = use_backend(backend)
    for dtype in dtypes_of(backend):
        x, scale, shift = inputs(shape, dtype, device_of(backend))
        grad = torch.randn(x.shape, dtype=torch.float64).to(dtype).to(x.device)

        def gradient(f, x, scale, shift, grad):
            x = x.detach().requires_grad_()
            return torch.autograd.grad(f(x, scale, shift), x, grad)[0]

        got = gradient(lambda *a: adaln(*a, backend=name), x, scale, shift, grad)
        exact = gradient(eager, *in_double((x, scale, shift, grad)))
        if shape[2] == 1:  # a single channel is its own mean: the gradient is zero, but for rounding times 1/sqrt(eps)
            assert (exact == 0).all()
            assert got.abs().max() <= 4 * torch.finfo(got.dtype).eps * 1e3 * (grad * (1 + scale[:, None])).abs().max()
        else:
            assert_gradient(got, exact, gradient(eager, x, scale, shift, grad))


def test_outlier_channels(backend, use_backend):
    """Large common offsets and single large channels must not cancel in the variance."""
    name = use_backend(backend)
    x, scale, shift = inputs((2, 9, 384, 2), torch.float32, device_of(backend))
    for bad in (x + 1000.0, torch.cat([1e5 * torch.ones_like(x[..., :1]), x[..., 1:]], -1)):
        got = adaln(bad, scale, shift, backend=name)
        assert_accurate(got, eager(*in_double((bad, scale, shift))), eager(bad, scale, shift))


def test_strided_inputs(backend, use_backend):
    """Transposed x, and scale and shift as chunks of one modulation tensor."""
    name = use_backend(backend)
    x, _, _ = inputs((2, 6, 40, 2), torch.float32, device_of(backend))
    x = x.transpose(1, 2).contiguous().transpose(1, 2)
    _, scale, shift, _ = torch.randn(2, 160, device=x.device).chunk(4, 1)
    assert not x.is_contiguous() and not scale.is_contiguous()
    got = adaln(x, scale, shift, backend=name)
    assert_accurate(got, eager(*in_double((x, scale, shift))), eager(x, scale, shift))
    x.requires_grad_()
    got = adaln(x, scale, shift, backend=name)
    grad = torch.ones_like(got).transpose(0, 1).contiguous().transpose(0, 1)
    torch.autograd.grad(got, x, grad)


@needs_ops
@pytest.mark.parametrize("channels", [1, 31, 32, 33, 64])
def test_every_start_offset(kernel, channels, use_backend):
    """Inputs lie between NaNs and outputs between sentinels: reading or writing outside shows."""
    use_backend(kernel)
    for dtype in dtypes_of(kernel):
        args = inputs((2, 3, channels, 2), dtype, device_of(kernel))
        grad = args[0].flip(0)
        expected = torch.ops.stitchvm.adaln(*args, 1e-6)
        expected_grad = torch.ops.stitchvm.adaln_input_grad(grad, *args[:2], 1e-6)
        for offset in OFFSETS:
            x, scale, shift, g = (guarded(t, offset, float("nan"))[0] for t in (*args, grad))
            out, buffer = guarded(torch.full_like(x, SENTINEL), offset, SENTINEL)
            torch.ops.stitchvm.adaln.out(x, scale, shift, 1e-6, out=out)
            torch.testing.assert_close(out, expected)
            assert_untouched(buffer, offset, out.numel())
            torch.ops.stitchvm.adaln_input_grad.out(g, x, scale, 1e-6, out=out)
            torch.testing.assert_close(out, expected_grad)
            assert_untouched(buffer, offset, out.numel())


@needs_ops
def test_instruction_sets_do_not_change_bits():
    for dtype in dtypes_of("cpu"):
        x, scale, shift = inputs((2, 5, 391, 2), dtype)
        grad = x.flip(0)
        results = []
        for level in USABLE_LEVELS:
            C.set_cpu_level(level)
            y = torch.ops.stitchvm.adaln(x, scale, shift, 1e-6)
            results.append((y, torch.ops.stitchvm.adaln_input_grad(grad, x, scale, 1e-6)))
        for y, grad_x in results[:-1]:
            assert torch.equal(y, results[-1][0]) and torch.equal(grad_x, results[-1][1])


@needs_ops
def test_threads_do_not_change_bits():
    args = inputs((2, 200, 384, 2), torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = adaln(*args, backend="cpu")
        torch.set_num_threads(3)
        three = adaln(*args, backend="cpu")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, three)


def test_non_finite_rows_stay_local(backend, use_backend):
    name = use_backend(backend)
    x, scale, shift = inputs((1, 3, 40, 1), torch.float32, device_of(backend))
    clean = adaln(x, scale, shift, backend=name)
    x[0, 1, 5] = float("nan")
    got = adaln(x, scale, shift, backend=name)
    assert torch.isnan(got[0, 1]).all()
    assert torch.equal(got[0, [0, 2]], clean[0, [0, 2]])


def test_condition_gradients_use_the_reference():
    x, scale, shift = (t.requires_grad_() for t in inputs((2, 3, 5, 2)))
    grads = torch.autograd.grad(adaln(x, scale, shift).square().sum(), (x, scale, shift))
    expected = torch.autograd.grad(eager(x, scale, shift).square().sum(), (x, scale, shift))
    torch.testing.assert_close(grads, expected)


@needs_ops
def test_condition_gradients_are_refused_by_a_named_kernel():
    x, scale, shift = inputs((2, 3, 5, 2))
    with pytest.raises(ValueError, match="gradients for x alone"):
        adaln(x, scale.requires_grad_(), shift, backend="cpu")
    with torch.no_grad():
        adaln(x, scale, shift, backend="cpu")
    with pytest.raises(RuntimeError, match="gradients for x alone"):
        torch.ops.stitchvm.adaln(x.requires_grad_(), scale, shift, 1e-6).sum().backward()


@needs_ops
def test_second_derivative_raises_with_advice():
    x, scale, shift = inputs((1, 2, 5, 1))
    x.requires_grad_()
    (grad,) = torch.autograd.grad(adaln(x, scale, shift).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(adaln(x, scale, shift, backend="reference").square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert torch.isfinite(x.grad).all()


@needs_ops
def test_gradcheck():
    x, scale, shift = inputs((2, 3, 7, 2))
    assert torch.autograd.gradcheck(lambda x: adaln(x, scale, shift, backend="cpu"), x.requires_grad_())


@needs_ops
def test_opcheck():
    x, scale, shift = inputs((2, 3, 5, 1), torch.float32)
    torch.library.opcheck(torch.ops.stitchvm.adaln.default, (x.requires_grad_(), scale, shift, 1e-6))
    torch.library.opcheck(torch.ops.stitchvm.adaln_input_grad.default, (x.detach().clone(), x.detach(), scale, 1e-6))


@needs_ops
@pytest.mark.slow
def test_compiles_in_one_graph():
    args = inputs((2, 3, 32, 2), torch.float32)
    compiled = torch.compile(lambda *a: 2 * adaln(*a), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), 2 * adaln(*args))


@needs_ops
def test_dtype_without_a_kernel():
    args = inputs((2, 3, 8, 2), torch.float16)
    assert_accurate(adaln(*args), eager(*in_double(args)), eager(*args))
    with pytest.raises(TypeError, match="float32, bfloat16, float64, got float16"):
        adaln(*args, backend="cpu")


def t(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(*shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((1.0, t(2, 4), t(2, 4)), {}, TypeError, "x: expected a tensor, got float"),
        ((t(2, 3, 4).long(), t(2, 4), t(2, 4)), {}, TypeError, "x: expected a floating-point dtype, got torch.int64"),
        ((t(3, 4), t(2, 4), t(2, 4)), {}, ValueError, r"x: expected shape \[B, N, C\], got \[3, 4\]"),
        ((t(2, 3, 4).to_sparse(), t(2, 4), t(2, 4)), {}, TypeError, "x: expected a strided"),
        ((t(2, 3, 4), None, t(2, 4)), {}, TypeError, "scale: expected a tensor, got NoneType"),
        ((t(2, 3, 4), t(2, 5), t(2, 4)), {}, ValueError, r"scale: expected shape \[2, 4\] or \[1, 4\], got \[2, 5\]"),
        ((t(2, 3, 4), t(2, 4), t(3, 4)), {}, ValueError, r"shift: expected shape \[2, 4\] or \[1, 4\], got \[3, 4\]"),
        ((t(2, 3, 4), t(2, 1, 4), t(2, 4)), {}, ValueError, r"scale: .* got \[2, 1, 4\]"),
        ((t(2, 3, 4), t(2, 4).double(), t(2, 4)), {}, TypeError, "scale: expected the dtype of x, torch.float32, got"),
        (
            (t(2, 3, 4), t(2, 4), t(2, 4, device="meta")),
            {},
            ValueError,
            "shift: expected the device of x, cpu, got meta",
        ),
        ((t(2, 3, 4), t(2, 4), t(2, 4), -1.0), {}, ValueError, "eps: expected a finite number >= 0, got -1.0"),
        ((t(2, 3, 4), t(2, 4), t(2, 4), float("nan")), {}, ValueError, "eps: expected a finite number"),
        ((t(2, 3, 4), t(2, 4), t(2, 4), "1"), {}, TypeError, "eps: expected a number, got str"),
        ((t(2, 3, 4), t(2, 4), t(2, 4)), {"backend": "gpu"}, ValueError, "backend: expected None or one of"),
    ],
)
def test_bad_input(args, kwargs, error, message):
    with pytest.raises(error, match="adaln: " + message):
        adaln(*args, **kwargs)


@needs_ops
def test_direct_calls_of_the_op_are_checked():
    x, scale, shift = inputs((2, 3, 4, 2), torch.float32)
    for bad in ((x[0], scale, shift), (x, scale[:, :3], shift), (x, scale, shift.double()), (x.half(),) * 3):
        with pytest.raises(RuntimeError):
            torch.ops.stitchvm.adaln(*bad, 1e-6)
    with pytest.raises(RuntimeError, match="out must be contiguous"):
        torch.ops.stitchvm.adaln.out(x, scale, shift, 1e-6, out=torch.empty(2, 4, 3).transpose(1, 2))
