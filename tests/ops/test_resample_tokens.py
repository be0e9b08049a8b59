"""resample_tokens: values, adjoint, memory safety, registration and messages."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stitchvm_ext.ops import _loader, reference, resample_tokens
from stitchvm_ext.ops.resample_tokens import resample_tokens_input_grad
from tests.ops.op_helpers import (
    CPU_BACKENDS,
    OFFSETS,
    SENTINEL,
    assert_accurate,
    assert_gradient,
    assert_untouched,
    device_of,
    dtypes_of,
    guarded,
)

needs_ops = pytest.mark.skipif(not _loader.HAS_OPS, reason=_loader.library_c.reason)

# (B, grid, out_grid, C)
CASES = [
    (1, (1, 1), (1, 1), 1),
    (2, (1, 1), (3, 2), 31),
    (2, (5, 3), (1, 1), 32),
    (1, (4, 4), (4, 4), 33),
    (2, (8, 6), (3, 5), 1),
    (2, (3, 5), (8, 6), 7),
    (1, (31, 33), (7, 32), 8),
    (1, (2, 9), (33, 31), 5),
    (1, (16, 16), (7, 7), 300),
    (1, (7, 1), (1, 9), 64),
]
EMPTY = [(0, (2, 3), (4, 5), 8), (2, (2, 3), (4, 5), 0)]


def eager(x, grid, out_grid):
    image = x.unflatten(1, grid).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=out_grid, mode="bilinear", align_corners=False, antialias=False)
    return image.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def tokens(case, dtype=torch.float64, device="cpu", seed=0):
    b, (h, w), _, c = case
    g = torch.Generator().manual_seed(seed)
    return torch.randn(b, h * w, c, generator=g, dtype=torch.float64).to(dtype).to(device)


def eager_or_empty(x, grid, out_grid):
    """F.interpolate refuses empty batches and channels."""
    if x.numel() == 0:
        return x.new_empty(x.shape[0], out_grid[0] * out_grid[1], x.shape[2])
    return eager(x, grid, out_grid)


TERMS = ("bias", "position", "prefix", "residual")


def terms(case, names, dtype, device, prefix_tokens=2):
    """What is added to the resampled tokens, by argument name."""
    b, _, (h, w), c = case
    p = prefix_tokens if "prefix" in names else 0
    shapes = {"bias": (c,), "position": (p + h * w, c), "prefix": (p, c), "residual": (b, h * w, c)}
    g = torch.Generator().manual_seed(2)
    made = {name: torch.randn(*shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: t.to(dtype).to(device) for name, t in made.items() if name in names}


def eager_sum(x, grid, out_grid, bias=None, position=None, prefix=None, residual=None):
    y = eager_or_empty(x, grid, out_grid)
    y = y if bias is None else y + bias
    y = y if residual is None else y + residual
    y = y if prefix is None else torch.cat([prefix.expand(len(y), -1, -1), y], dim=1)
    return y if position is None else y + position


@pytest.mark.parametrize("case", CASES)
def test_reference_is_interpolate(case):
    _, grid, out_grid, _ = case
    x = tokens(case)
    torch.testing.assert_close(reference.resample_tokens(x, grid, out_grid), eager(x, grid, out_grid))


@pytest.mark.parametrize("case", CASES)
def test_reference_adjoint_is_autograd(case):
    _, grid, out_grid, _ = case
    x = tokens(case).requires_grad_()
    y = eager(x, grid, out_grid)
    grad = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(reference.resample_tokens_input_grad(grad, grid, out_grid), expected)


@pytest.mark.parametrize("case", CASES + EMPTY)
def test_values(backend, case, use_backend):
    _, grid, out_grid, _ = case
    name = use_backend(backend)
    for dtype in dtypes_of(backend):
        x = tokens(case, dtype, device_of(backend))
        got = resample_tokens(x, grid, out_grid, backend=name)
        assert got.is_contiguous()
        assert_accurate(got, eager_or_empty(x.double(), grid, out_grid), eager_or_empty(x, grid, out_grid))


SUBSETS = [tuple(name for k, name in enumerate(TERMS) if number >> k & 1) for number in range(1, 16)]


@pytest.mark.parametrize("out_grid", [(3, 5), (6, 4), (7, 4)])
@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_terms(backend, names, out_grid, use_backend):
    """Every combination of what is added, for a coarser, an equal and a finer grid."""
    name = use_backend(backend)
    case = (2, (6, 4), out_grid, 11)
    for dtype in dtypes_of(backend):
        x = tokens(case, dtype, device_of(backend))
        extra = terms(case, names, dtype, device_of(backend))
        got = resample_tokens(x, (6, 4), out_grid, **extra, backend=name)
        exact = eager_sum(x.double(), (6, 4), out_grid, **{k: t.double() for k, t in extra.items()})
        assert_accurate(got, exact, eager_sum(x, (6, 4), out_grid, **extra))
        assert got.is_contiguous()


@pytest.mark.parametrize("case", EMPTY)
def test_terms_of_empty_tensors(backend, case, use_backend):
    b, grid, out_grid, c = case
    name = use_backend(backend)
    extra = terms(case, TERMS, torch.float32, device_of(backend))
    x = tokens(case, torch.float32, device_of(backend))
    got = resample_tokens(x, grid, out_grid, **extra, backend=name)
    assert got.shape == (b, 2 + 20, c)


def test_no_prefix_tokens_and_strided_terms(backend, use_backend):
    name = use_backend(backend)
    case = (2, (3, 4), (5, 2), 12)
    x = tokens(case, torch.float32, device_of(backend))
    wide = terms((2, (3, 4), (5, 2), 24), TERMS, torch.float32, device_of(backend), prefix_tokens=0)
    extra = {k: t[..., ::2] for k, t in wide.items()}
    got = resample_tokens(x, (3, 4), (5, 2), **extra, backend=name)
    extra = {k: t.contiguous() for k, t in extra.items()}
    assert torch.equal(got, resample_tokens(x, (3, 4), (5, 2), **extra, backend=name))


def test_same_grid_is_exact(backend, use_backend):
    name = use_backend(backend)
    x = tokens((2, (5, 7), None, 9), torch.float32, device_of(backend))
    assert torch.equal(resample_tokens(x, (5, 7), (5, 7), backend=name), x)


@pytest.mark.parametrize("case", CASES + EMPTY)
def test_gradient(backend, case, use_backend):
    b, grid, out_grid, c = case
    name = use_backend(backend)
    for dtype in dtypes_of(backend):
        x = tokens(case, dtype, device_of(backend))
        grad = tokens((b, out_grid, None, c), dtype, device_of(backend), seed=1)

        def gradient(f, x, grad):
            x = x.detach().requires_grad_()
            return torch.autograd.grad(f(x, grid, out_grid), x, grad)[0]

        got = gradient(lambda *a: resample_tokens(*a, backend=name), x, grad)
        if x.numel() == 0:
            assert got.shape == x.shape
        else:
            assert_gradient(got, gradient(eager, x.double(), grad.double()), gradient(eager, x, grad))


@pytest.mark.parametrize("out_grid", [(3, 5), (6, 4), (7, 9)])
def test_gradients_with_terms(backend, out_grid, use_backend):
    """x and residual get their gradients from behind the prefix; from the kernels no other tensor gets one."""
    name = use_backend(backend)
    case = (2, (6, 4), out_grid, 11)
    for dtype in dtypes_of(backend):
        x, extra = tokens(case, dtype, device_of(backend)), terms(case, TERMS, dtype, device_of(backend))
        shape = (2, 2 + out_grid[0] * out_grid[1], 11)
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(x)

        def gradient(f, x, extra, grad):
            x, residual = x.detach().requires_grad_(), extra["residual"].detach().requires_grad_()
            return torch.autograd.grad(f(x, (6, 4), out_grid, **{**extra, "residual": residual}), (x, residual), grad)

        got, got_residual = gradient(lambda *a, **k: resample_tokens(*a, **k, backend=name), x, extra, grad)
        exact, _ = gradient(eager_sum, x.double(), {k: t.double() for k, t in extra.items()}, grad.double())
        assert_gradient(got, exact, gradient(eager_sum, x, extra, grad)[0])
        assert torch.equal(got_residual, grad[:, 2:])
        assert_gradient(resample_tokens_input_grad(grad, (6, 4), out_grid, 2, backend=name), exact, got)


def test_trained_terms_run_the_reference():
    case = (2, (3, 4), (5, 2), 8)
    x, extra = tokens(case).requires_grad_(), terms(case, TERMS, torch.float64, "cpu")
    for name in ("bias", "position", "prefix"):
        trained = {**extra, name: extra[name].requires_grad_()}
        resample_tokens(x, (3, 4), (5, 2), **trained).square().sum().backward()
        assert extra[name].grad.abs().sum() > 0
        if _loader.HAS_OPS:
            with pytest.raises(ValueError, match=f"gradients for x and residual alone, but {name} requires grad"):
                resample_tokens(x, (3, 4), (5, 2), **trained, backend="cpu")
            with torch.no_grad():
                resample_tokens(x, (3, 4), (5, 2), **trained, backend="cpu")
        extra[name] = extra[name].detach()


@pytest.mark.parametrize("case", CASES)
def test_adjoint_identity(backend, case, use_backend):
    """<R x, y> == <x, R' y> in float64, and every column of R' sums to what R spreads: R 1 = 1."""
    if torch.float64 not in dtypes_of(backend):
        pytest.skip("float64 runs on the reference there")
    b, grid, out_grid, c = case
    name = use_backend(backend)
    x = tokens(case).requires_grad_()
    y = tokens((b, out_grid, None, c), seed=1)
    out = resample_tokens(x, grid, out_grid, backend=name)
    (adjoint,) = torch.autograd.grad(out, x, y)
    torch.testing.assert_close((out * y).sum(), (x * adjoint).sum())
    torch.testing.assert_close(adjoint.sum(1), y.sum(1))


def test_strided_inputs(backend, use_backend):
    name = use_backend(backend)
    x = torch.randn(2, 24, 12, device=device_of(backend)).transpose(1, 2)
    got = resample_tokens(x, (3, 4), (5, 2), backend=name)
    assert_accurate(got, eager(x.double(), (3, 4), (5, 2)), eager(x, (3, 4), (5, 2)))


@needs_ops
@pytest.mark.parametrize("channels", [1, 31, 32, 33])
def test_every_start_offset(kernel, channels, use_backend):
    """Inputs lie between NaNs and outputs between sentinels: reading or writing outside shows."""
    use_backend(kernel)
    grid, out_grid = (3, 4), (5, 2)
    for dtype in dtypes_of(kernel):
        x0 = tokens((2, grid, None, channels), dtype, device_of(kernel))
        extra0 = terms((2, grid, out_grid, channels), TERMS, dtype, device_of(kernel)).values()
        expected = torch.ops.stitchvm.resample_tokens(x0, *extra0, *grid, *out_grid)
        g0 = expected.clone()
        expected_grad = torch.ops.stitchvm.resample_tokens_input_grad(g0, 2, *grid, *out_grid)
        for offset in OFFSETS:
            x, g, *extra = (guarded(t, offset, float("nan"))[0] for t in (x0, g0, *extra0))
            out, buffer = guarded(torch.full_like(g, SENTINEL), offset, SENTINEL)
            torch.ops.stitchvm.resample_tokens.out(x, *extra, *grid, *out_grid, out=out)
            torch.testing.assert_close(out, expected)
            assert_untouched(buffer, offset, out.numel())
            out, buffer = guarded(torch.full_like(x, SENTINEL), offset, SENTINEL)
            torch.ops.stitchvm.resample_tokens_input_grad.out(g, 2, *grid, *out_grid, out=out)
            torch.testing.assert_close(out, expected_grad)
            assert_untouched(buffer, offset, out.numel())


@needs_ops
def test_gradient_bits_repeat(kernel, use_backend):
    """The gather has a fixed order of summation, whatever the run and the number of threads."""
    use_backend(kernel)
    grad = torch.randn(2, 49, 256, device=device_of(kernel))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = torch.ops.stitchvm.resample_tokens_input_grad(grad, 0, 16, 16, 7, 7)
        torch.set_num_threads(3)
        second = torch.ops.stitchvm.resample_tokens_input_grad(grad, 0, 16, 16, 7, 7)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(first, second)


@needs_ops
def test_every_pair_of_sides_gathers_what_it_scattered():
    """The range of readers in the adjoint must miss no output position, for any pair of sides."""
    for size in range(1, 18):
        for out_size in range(1, 18):
            grad = torch.randn(1, out_size, 1, dtype=torch.float64)
            got = torch.ops.stitchvm.resample_tokens_input_grad(grad, 0, size, 1, out_size, 1)
            expected = reference.resample_tokens_input_grad(grad, (size, 1), (out_size, 1))
            torch.testing.assert_close(got, expected, msg=f"{size} -> {out_size}")


@needs_ops
def test_largest_side():
    x = torch.arange(32767, dtype=torch.float64).view(1, -1, 1)
    torch.testing.assert_close(resample_tokens(x, (32767, 1), (32766, 1)), eager(x, (32767, 1), (32766, 1)))


@needs_ops
def test_second_derivative_raises_with_advice():
    x = tokens((1, (2, 3), None, 4)).requires_grad_()
    (grad,) = torch.autograd.grad(resample_tokens(x, (2, 3), (4, 2)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.sum().backward()
    y = resample_tokens(x, (2, 3), (4, 2), backend="reference").square().sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    grad.square().sum().backward()
    assert x.grad.abs().sum() > 0


@needs_ops
@pytest.mark.parametrize(("grid", "out_grid"), [((3, 4), (5, 2)), ((4, 4), (3, 6))])
def test_gradcheck(grid, out_grid):
    x = tokens((2, grid, None, 3)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: resample_tokens(x, grid, out_grid, backend="cpu"), x)


@needs_ops
def test_opcheck():
    x = tokens((2, (3, 4), None, 5), torch.float32)
    bias, position, prefix, residual = terms((2, (3, 4), (5, 2), 5), TERMS, torch.float32, "cpu").values()
    op = torch.ops.stitchvm.resample_tokens.default
    torch.library.opcheck(op, (x.requires_grad_(), None, None, None, None, 3, 4, 5, 2))
    torch.library.opcheck(op, (x, bias, position, prefix, residual.requires_grad_(), 3, 4, 5, 2))
    grad = tokens((2, (4, 3), None, 5), torch.float32)
    torch.library.opcheck(torch.ops.stitchvm.resample_tokens_input_grad.default, (grad, 2, 3, 4, 5, 2))


@needs_ops
@pytest.mark.slow
def test_compiles_in_one_graph():
    x = tokens((2, (3, 4), None, 5), torch.float32)
    compiled = torch.compile(lambda x: 2 * resample_tokens(x, (3, 4), (5, 2)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), 2 * resample_tokens(x, (3, 4), (5, 2)))


@needs_ops
def test_dtype_without_a_kernel():
    x = tokens((2, (3, 4), None, 5), torch.float16)
    assert_accurate(resample_tokens(x, (3, 4), (5, 2)), eager(x.double(), (3, 4), (5, 2)), eager(x, (3, 4), (5, 2)))
    with pytest.raises(TypeError, match="float32, bfloat16, float64, got float16"):
        resample_tokens(x, (3, 4), (5, 2), backend="cpu")


@needs_ops
def test_levels_and_threads_give_equal_bits(use_backend):
    for dtype in dtypes_of("cpu"):
        for out_grid in ((7, 7), (16, 16), (24, 20)):
            case = (2, (16, 16), out_grid, 70)
            x, extra = tokens(case, dtype), terms(case, TERMS, dtype, "cpu")
            results = []
            before = torch.get_num_threads()
            try:
                for level in CPU_BACKENDS:
                    use_backend(level)
                    for threads in (1, 3):
                        torch.set_num_threads(threads)
                        y = resample_tokens(x, (16, 16), out_grid, **extra)
                        results.append((y, resample_tokens_input_grad(y, (16, 16), out_grid, 2)))
            finally:
                torch.set_num_threads(before)
            for y, grad in results[1:]:
                assert torch.equal(y, results[0][0]) and torch.equal(grad, results[0][1])


def test_not_a_number_stays_where_it_is(backend, use_backend):
    name = use_backend(backend)
    for dtype in dtypes_of(backend):
        for value in (float("nan"), float("inf")):
            x = torch.ones(1, 16, 33, dtype=dtype, device=device_of(backend))
            x[0, 5, 32] = value
            y = resample_tokens(x, (4, 4), (4, 4), backend=name)
            assert (~y.isfinite()).sum() == 1 and not y[0, 5, 32].isfinite()
            y = resample_tokens(x, (4, 4), (2, 2), backend=name)
            assert (~y.isfinite()).sum() == 1 and not y[0, 0, 32].isfinite()
            grad = resample_tokens_input_grad(x, (2, 2), (4, 4), backend=name)
            assert not grad[0, 0, 32].isfinite() and grad[..., :32].isfinite().all()


X = torch.zeros(2, 12, 4)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (([1.0], (3, 4), (2, 2)), TypeError, "x: expected a tensor, got list"),
        ((X.int(), (3, 4), (2, 2)), TypeError, "x: expected a floating-point dtype, got torch.int32"),
        ((X[0], (3, 4), (2, 2)), ValueError, r"x: expected shape \[B, N, C\], got \[12, 4\]"),
        ((X, (3, 5), (2, 2)), ValueError, r"x: expected \[B, 3 \* 5 = 15, C\] for the grid, got \[2, 12, 4\]"),
        ((X, (3, 4, 1), (2, 2)), ValueError, "grid: expected two integers"),
        ((X, 12, (2, 2)), ValueError, "grid: expected two integers"),
        ((X, (3, 4.0), (2, 2)), TypeError, "grid: expected two integers"),
        ((X, (3, 4), (0, 2)), ValueError, r"out_grid: expected sides in \[1, 32767\], got \(0, 2\)"),
        ((X, (3, 4), (2, 40000)), ValueError, "out_grid: expected sides in"),
    ],
)
def test_bad_input(args, error, message):
    with pytest.raises(error, match="resample_tokens: " + message):
        resample_tokens(*args)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("bias", [1.0], TypeError, "expected a tensor, got list"),
        ("bias", X[0, 0].double(), TypeError, "expected the dtype of x, torch.float32, got torch.float64"),
        ("bias", X[0], ValueError, r"expected shape \[4\], got \[12, 4\]"),
        ("bias", X[0, 0].to("meta"), ValueError, "expected the device of x, cpu, got meta"),
        ("position", X[0], ValueError, r"expected shape \[10, 4\], got \[12, 4\]"),
        ("prefix", X[0, :, :3], ValueError, r"expected shape \[P, 4\], got \[12, 3\]"),
        ("prefix", X, ValueError, r"expected shape \[P, 4\], got \[2, 12, 4\]"),
        ("residual", X, ValueError, r"expected shape \[2, 10, 4\], got \[2, 12, 4\]"),
    ],
)
def test_bad_terms(name, value, error, message):
    with pytest.raises(error, match=f"resample_tokens: {name}: {message}"):
        resample_tokens(X, (3, 4), (5, 2), **{name: value})


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((1.0, (3, 4), (5, 2)), TypeError, "grad: expected a tensor"),
        ((X, (3, 4), (5, 2)), ValueError, r"grad: expected \[B, 0 \+ 5 \* 2 = 10, C\]"),
        ((X, (3, 4), (5, 2), 2.0), TypeError, "prefix_tokens: expected an integer, got float"),
        ((X, (3, 4), (5, 2), -1), ValueError, "prefix_tokens: expected at least 0, got -1"),
    ],
)
def test_bad_gradients(args, error, message):
    with pytest.raises(error, match="resample_tokens_input_grad: " + message):
        resample_tokens_input_grad(*args)


@needs_ops
def test_direct_calls_of_the_op_are_checked():
    none = [None] * 4
    op, grad_op = torch.ops.stitchvm.resample_tokens, torch.ops.stitchvm.resample_tokens_input_grad
    for x, *sides in (
        (X, 3, 5, 2, 2),
        (X[0], 3, 4, 2, 2),
        (X, 3, 4, 0, 2),
        (X.half(), 3, 4, 2, 2),
        (X, 3, 4, 1, 40000),
    ):
        with pytest.raises(RuntimeError):
            op(x, *none, *sides)
    for k in range(4):
        with pytest.raises(RuntimeError):
            op(X, *none[:k], X[:1], *none[k + 1 :], 3, 4, 5, 2)
    for bad in ((X, 0, 3, 4, 5, 2), (X, -1, 3, 4, 5, 2), (X[0], 0, 3, 4, 3, 4), (X, 2, 3, 0, 5, 2)):
        with pytest.raises(RuntimeError):
            grad_op(*bad)
