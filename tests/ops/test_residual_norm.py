"""residual_norm and its faces: values, gradients, memory safety, registration and messages."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

from stitchvm_ext.ops import (
    _loader,
    adaln,
    gated_residual,
    gated_residual_adaln,
    layer_norm,
    reference,
    residual_norm,
)
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

# (B, N, C). The wide ones go with three variants only; the last does not fit the registers of a CUDA block.
SHAPES = [(2, 5, 31), (3, 1, 32), (1, 3, 257)]
WIDE = [(1, 2, 1536), (1, 1, 8200)]
EMPTY = [(0, 3, 8), (2, 0, 8), (2, 3, 0)]

ACTIVATIONS = ("x", "branch", "branch2")
TABLES = ("gate", "gate2", "scale", "shift", "scale2", "shift2")

# What each variant passes beside x.
VARIANTS = {
    "norm": {"scale", "shift"},
    "norm without shift": {"scale", "affine"},
    "affine norm": {"scale", "shift", "affine"},
    "two norms": {"scale", "shift", "scale2", "shift2", "rows"},
    "branch": {"branch"},
    "gated branch": {"branch", "gate", "rows"},
    "two branches": {"branch", "gate", "branch2", "gate2"},
    "branch and norm": {"branch", "scale", "shift", "affine"},
    "gated branch and norm": {"branch", "gate", "scale", "shift", "rows"},
    "half-gated branches and norm": {"branch", "branch2", "gate2", "scale", "shift", "scale2"},
    "everything": {"branch", "branch2", "rows", *TABLES},
}


def shapes_of(variant):
    return SHAPES + (WIDE if variant in ("norm", "gated branch", "everything") else [])


def inputs(variant, shape, dtype=torch.float64, device="cpu", seed=0):
    """Arguments of residual_norm for a variant: tables of one row per sample, or of five rows with `rows`."""
    b, n, c = shape
    names = VARIANTS[variant]
    g = torch.Generator().manual_seed(seed)

    def randn(*size, std=1.0, mean=0.0):
        return (std * torch.randn(*size, generator=g, dtype=torch.float64) + mean).to(dtype).to(device)

    kwargs = {"x": randn(b, n, c, std=3.0, mean=1.0)}
    kwargs |= {name: randn(b, n, c) for name in ACTIVATIONS if name in names}
    kwargs |= {name: randn(5 if "rows" in names else b, c, std=0.5) for name in TABLES if name in names}
    if "rows" in names:
        kwargs["rows"] = torch.randint(5, (b,), generator=g).to(device)
    return kwargs | {"affine": "affine" in names, "eps": 1e-6}


def convert(kwargs, dtype):
    floating = {k: t.to(dtype) for k, t in kwargs.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    return kwargs | floating


def eager(
    x,
    branch=None,
    gate=None,
    branch2=None,
    gate2=None,
    scale=None,
    shift=None,
    scale2=None,
    shift2=None,
    rows=None,
    affine=False,
    eps=1e-6,
):
    """The form in diffusers' transformer blocks; results that are None are left out."""

    def per_token(t):
        return (t if rows is None else t[rows])[:, None]

    h = x
    for b, g in ((branch, gate), (branch2, gate2)):
        if b is not None:
            h = h + (b if g is None else per_token(g) * b)
    results = [] if branch is None else [h]
    if scale is not None:
        n = F.layer_norm(h, h.shape[-1:], eps=eps)
        for s, t in ((scale, shift), (scale2, shift2)):
            if s is not None:
                y = n * (per_token(s) if affine else 1 + per_token(s))
                results.append(y if t is None else y + per_token(t))
    return tuple(results)


def present(results):
    return tuple(t for t in results if t is not None)


def gradients(f, kwargs, grads):
    """Results of f, and the gradients for its activations."""
    leaves = {name: kwargs[name].detach().requires_grad_() for name in ACTIVATIONS if name in kwargs}
    results = present(f(**kwargs | leaves))
    return dict(zip(leaves, torch.autograd.grad(results, list(leaves.values()), grads), strict=True))


def random_like(tensors, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype).to(t.device) for t in tensors]


@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_is_eager_code(variant):
    for shape in [*SHAPES, *EMPTY]:
        kwargs = inputs(variant, shape)
        for got, expected in zip(present(reference.residual_norm(**kwargs)), eager(**kwargs), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def grad_arguments(kwargs, results, grads):
    """Arguments of residual_norm_input_grad from those of the op, its results and their gradients (all may be None)."""
    shared = ("gate", "gate2", "scale", "scale2", "rows", "affine", "eps")
    named = dict(zip(("grad_residual", "grad_y", "grad_y2"), grads, strict=True))
    residual = results[0] if results[0] is not None else kwargs["x"]
    return named | {"residual": residual} | {name: kwargs[name] for name in shared if name in kwargs}


@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_gradient_is_autograd(variant):
    for shape in SHAPES:
        kwargs = inputs(variant, shape)
        results = reference.residual_norm(**kwargs)
        made = iter(random_like(present(results)))
        grads = [None if t is None else next(made) for t in results]
        expected = gradients(eager, kwargs, present(grads))
        got = reference.residual_norm_input_grad(**grad_arguments(kwargs, results, grads))
        grad_x = grads[0] if got[0] is None else got[0]
        for name, grad in zip(ACTIVATIONS, (grad_x, *got[1:]), strict=True):
            if name in expected:
                torch.testing.assert_close(grad_x if grad is None else grad, expected[name], rtol=1e-9, atol=1e-9)


@functools.cache
def expectations(variant, shape, dtype, device):
    """Arguments, gradients of the results; exact and eager results; exact and eager gradients. Not to be changed."""
    kwargs = inputs(variant, shape, dtype, device)
    in_double = convert(kwargs, torch.float64)
    values = eager(**kwargs)
    grads = random_like(values)
    exact = gradients(eager, in_double, [g.double() for g in grads])
    return kwargs, grads, eager(**in_double), values, exact, gradients(eager, kwargs, grads)


@pytest.mark.parametrize("variant", VARIANTS)
def test_values(backend, variant, use_backend):
    name = use_backend(backend)
    for shape, dtype in itertools.product([(1, 1, 1), *shapes_of(variant), *EMPTY], dtypes_of(backend)):
        kwargs, _, exact_values, eager_values, _, _ = expectations(variant, shape, dtype, device_of(backend))
        got = residual_norm.residual_norm(**kwargs, backend=name)
        names = VARIANTS[variant]
        assert [t is not None for t in got] == ["branch" in names, "scale" in names, "scale2" in names]
        for t, exact, other in zip(present(got), exact_values, eager_values, strict=True):
            assert t.is_contiguous()
            assert_accurate(t, exact, other)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient(backend, variant, use_backend):
    name = use_backend(backend)
    for shape, dtype in itertools.product([*shapes_of(variant), *EMPTY], dtypes_of(backend)):
        kwargs, grads, _, _, exact, other = expectations(variant, shape, dtype, device_of(backend))
        got = gradients(lambda **kw: residual_norm.residual_norm(**kw, backend=name), kwargs, grads)
        for key in got:
            assert_gradient(got[key], exact[key], other[key])


def test_gradient_of_a_single_channel(backend, use_backend):
    """A single channel is its own mean: the gradient is zero, but for rounding times 1 / sqrt(eps)."""
    name = use_backend(backend)
    for dtype in dtypes_of(backend):
        kwargs = inputs("norm", (2, 3, 1), dtype, device_of(backend))
        (grad,) = random_like([kwargs["x"]])
        got = gradients(lambda **kw: residual_norm.residual_norm(**kw, backend=name), kwargs, [grad])["x"]
        assert got.abs().max() <= 4 * torch.finfo(dtype).eps * 1e3 * (grad * (1 + kwargs["scale"][:, None])).abs().max()


@pytest.mark.parametrize("given", [g for g in itertools.product((False, True), repeat=3) if any(g)])
def test_input_grad_of_some_results(backend, given, use_backend):
    """Every set of gradients that autograd or a hand-written backward pass may have; branches without a gate too."""
    name = use_backend(backend)
    dtype = dtypes_of(backend)[0]
    for gates in ((), ("gate",), ("gate2",), ("gate", "gate2")):
        kwargs = inputs("everything", (2, 3, 40), dtype, device_of(backend))
        grads = [g if use else None for g, use in zip(random_like([kwargs["x"]] * 3), given, strict=True)]
        arguments = grad_arguments(kwargs, (kwargs["x"], None, None), grads)
        arguments |= {gate: None for gate in ("gate", "gate2") if gate not in gates}
        if not (given[1] or given[2]):
            arguments["residual"] = None
        got = residual_norm.residual_norm_input_grad(**arguments, backend=name)
        expected = reference.residual_norm_input_grad(**arguments)
        assert [t is not None for t in got] == [given[1] or given[2], "gate" in gates, "gate2" in gates]
        for t, other in zip(got, expected, strict=True):
            if t is not None:
                torch.testing.assert_close(t, other, rtol=1e-5, atol=1e-5)


def test_input_grad_needs_a_gradient():
    with pytest.raises(ValueError, match="expected grad_residual, grad_y or grad_y2"):
        residual_norm.residual_norm_input_grad(scale=torch.zeros(1, 4))


def test_faces(backend, use_backend):
    name = use_backend(backend)
    dtype = dtypes_of(backend)[0]
    kw = inputs("everything", (2, 3, 40), dtype, device_of(backend))
    x, branch, branch2, rows = kw["x"], kw["branch"], kw["branch2"], kw["rows"]
    tables = {t: kw[t] for t in TABLES}
    gate, scale, shift = kw["gate"], kw["scale"], kw["shift"]
    at = {"rows": rows, "backend": name}

    def check(got, expected):
        for t, other in zip(got if isinstance(got, tuple) else (got,), expected, strict=True):
            torch.testing.assert_close(t, other, rtol=1e-5, atol=1e-5)

    norms = {t: tables[t] for t in TABLES[2:]}
    check(adaln(x, scale, shift, **at), eager(x, scale=scale, shift=shift, rows=rows))
    check(adaln(x, **norms, **at), eager(x, **norms, rows=rows))
    check(adaln(x, scale[:1], shift[:2], eps=0.1, backend=name), eager(x, scale=scale[:1], shift=shift[:2], eps=0.1))
    check(gated_residual(x, branch, backend=name), eager(x, branch))
    check(gated_residual(x, branch, gate, **at), eager(x, branch, gate, rows=rows))
    two = (x, branch, gate, branch2, kw["gate2"])
    check(gated_residual(*two, **at), eager(*two, rows=rows))
    check(
        gated_residual_adaln(x, branch, gate, scale, shift, **at),
        eager(x, branch, gate, scale=scale, shift=shift, rows=rows),
    )
    check(gated_residual_adaln(x, branch, branch2=branch2, **tables, **at), eager(*two, **norms, rows=rows))
    weight, bias = scale[0], shift[0]
    check(layer_norm(x, weight, bias, backend=name), [F.layer_norm(x, (40,), weight, bias)])
    check(layer_norm(x[0], weight, eps=0.1, backend=name), [F.layer_norm(x[0], (40,), weight, eps=0.1)])
    total = x + gate[:2, None] * branch
    check(
        layer_norm(x, weight, bias, residual=branch, gate=gate[:2], backend=name),
        (total, F.layer_norm(total, (40,), weight, bias)),
    )
    total = x[0] + branch[0]
    got = layer_norm(x[0], weight, bias, residual=branch[0], backend=name)
    check(got, (total, F.layer_norm(total, (40,), weight, bias)))


def test_norm_is_of_the_rounded_residual(backend, use_backend):
    """Bit for bit what the two ops give one after the other."""
    name = use_backend(backend)
    for dtype in dtypes_of(backend):
        kw = inputs("gated branch and norm", (2, 3, 72), dtype, device_of(backend))
        at = {"rows": kw["rows"], "backend": name}
        residual, y = gated_residual_adaln(kw["x"], kw["branch"], kw["gate"], kw["scale"], kw["shift"], **at)
        assert torch.equal(residual, gated_residual(kw["x"], kw["branch"], kw["gate"], **at))
        assert torch.equal(y, adaln(residual, kw["scale"], kw["shift"], **at))


def test_outlier_channels(backend, use_backend):
    """Large offsets, of all or some channels, and single large channels must not cancel in the variance."""
    name = use_backend(backend)
    kw = inputs("norm", (2, 9, 384), torch.float32, device_of(backend))
    x = kw.pop("x")
    head, ones = x[..., :32], torch.ones_like(x[..., :1])
    forward = lambda **kw: residual_norm.residual_norm(**kw, backend=name)  # noqa: E731
    for bad in (
        x + 1000.0,
        torch.cat([1e5 * ones, x[..., 1:]], -1),
        torch.cat([x[..., :200], 1e5 * ones, x[..., 201:]], -1),
        torch.cat([head + 300.0, x[..., 32:]], -1),
        torch.cat([1e-3 * head, 1e3 * x[..., 32:] - 1e4], -1),
    ):
        called, doubled = kw | {"x": bad}, convert(kw | {"x": bad}, torch.float64)
        assert_accurate(forward(**called)[1], eager(**doubled)[0], eager(**called)[0])
        grads = random_like([bad])
        exact = gradients(eager, doubled, [g.double() for g in grads])["x"]
        assert_gradient(gradients(forward, called, grads)["x"], exact, gradients(eager, called, grads)["x"])


def test_strided_inputs(backend, use_backend):
    """Transposed activations and gradients, and tables that are chunks of one modulation tensor."""
    name = use_backend(backend)
    for dtype, variant in itertools.product(dtypes_of(backend), ("everything", "half-gated branches and norm")):
        kw = inputs(variant, (2, 6, 40), dtype, device_of(backend))
        for key in ACTIVATIONS:
            kw[key] = kw[key].transpose(1, 2).contiguous().transpose(1, 2)
        present_tables = [t for t in TABLES if t in kw]
        chunks = torch.cat([kw[t] for t in present_tables], 1).chunk(len(present_tables), 1)
        kw |= dict(zip(present_tables, chunks, strict=True))
        if "rows" in kw:
            kw["rows"] = torch.stack([kw["rows"], kw["rows"]], 1)[:, 0]
        assert not any(t.is_contiguous() for t in kw.values() if isinstance(t, torch.Tensor) and t.dim() > 1)
        grads = [g.transpose(0, 1).contiguous().transpose(0, 1) for g in random_like(eager(**kw))]
        got = gradients(lambda **kw: residual_norm.residual_norm(**kw, backend=name), kw, grads)  # noqa: B023
        exact = gradients(eager, convert(kw, torch.float64), [g.double() for g in grads])
        other = gradients(eager, kw, grads)
        for key in got:
            assert_gradient(got[key], exact[key], other[key])
        results = residual_norm.residual_norm(**kw, backend=name)
        for t, a, b in zip(results, eager(**convert(kw, torch.float64)), eager(**kw), strict=True):
            assert_accurate(t, a, b)


def test_columns_as_tables(backend, use_backend):
    """A table whose rows are not contiguous is copied."""
    name = use_backend(backend)
    kw = inputs("norm", (2, 3, 40), dtypes_of(backend)[0], device_of(backend))
    expected = adaln(kw["x"], kw["scale"], kw["shift"], backend=name)
    columns = kw["scale"].t().contiguous().t()
    assert torch.equal(adaln(kw["x"], columns, kw["shift"], backend=name), expected)


@needs_ops
@pytest.mark.parametrize("channels", [1, 31, 32, 33, 64])
def test_every_start_offset(kernel, channels, use_backend):
    """Inputs lie between NaNs and outputs between sentinels: reading or writing outside shows."""
    use_backend(kernel)
    op, grad_op = torch.ops.stitchvm.residual_norm, torch.ops.stitchvm.residual_norm_input_grad
    for dtype in dtypes_of(kernel):
        kw = inputs("everything", (2, 2, channels), dtype, device_of(kernel))
        grads = random_like([kw["x"]] * 3)
        expected = op(**kw)
        grad_kw = grad_arguments(kw, expected, grads)
        expected_grads = grad_op(**grad_kw)

        def moved(kwargs, offset):
            return {
                k: guarded(t, offset, float("nan"))[0] if isinstance(t, torch.Tensor) and k != "rows" else t
                for k, t in kwargs.items()
            }

        def check(op, kwargs, names, expected, offset):
            outs = [guarded(torch.full_like(t, SENTINEL), offset, SENTINEL) for t in expected]
            op.out(**moved(kwargs, offset), **{n: out for n, (out, _) in zip(names, outs, strict=True)})
            for (out, buffer), t in zip(outs, expected, strict=True):
                torch.testing.assert_close(out, t)
                assert_untouched(buffer, offset, out.numel())

        for offset in OFFSETS:
            check(op, kw, ("residual", "y", "y2"), expected, offset)
            check(grad_op, grad_kw, ("grad_x", "grad_branch", "grad_branch2"), expected_grads, offset)


def both_passes(kwargs, backend="cpu"):
    results = residual_norm.residual_norm(**kwargs, backend=backend)
    grads = residual_norm.residual_norm_input_grad(
        **grad_arguments(kwargs, results, random_like(results)), backend=backend
    )
    return (*results, *grads)


@needs_ops
def test_instruction_sets_do_not_change_bits(use_backend):
    for dtype, channels in itertools.product(dtypes_of("cpu"), (391, 64)):
        kwargs = inputs("everything", (2, 5, channels), dtype)
        results = []
        for level in USABLE_LEVELS:
            use_backend(f"cpu-{level}")
            results.append(both_passes(kwargs))
        for other in results[:-1]:
            assert all(torch.equal(a, b) for a, b in zip(other, results[-1], strict=True))
    C.set_cpu_level(C.detected_cpu_level())


@needs_ops
def test_threads_do_not_change_bits():
    kwargs = inputs("everything", (2, 100, 384), torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = both_passes(kwargs)
        torch.set_num_threads(3)
        three = both_passes(kwargs)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_non_finite_rows_stay_local(backend, use_backend):
    name = use_backend(backend)
    for dtype in dtypes_of(backend):
        kw = inputs("gated branch and norm", (1, 3, 40), dtype, device_of(backend))
        clean = residual_norm.residual_norm(**kw, backend=name)
        kw["x"][0, 1, 5] = float("nan")
        residual, y, _ = residual_norm.residual_norm(**kw, backend=name)
        assert torch.isnan(residual[0, 1, 5]) and torch.isnan(residual).sum() == 1
        assert torch.isnan(y[0, 1]).all()
        assert torch.equal(y[0, [0, 2]], clean[1][0, [0, 2]])


def test_condition_gradients_use_the_reference():
    kw = inputs("everything", (2, 3, 5))
    leaves = [kw[name].requires_grad_() for name in (*ACTIVATIONS, *TABLES)]
    results = residual_norm.residual_norm(**kw)
    grads = torch.autograd.grad(sum(t.square().sum() for t in results), leaves)
    expected = torch.autograd.grad(sum(t.square().sum() for t in eager(**kw)), leaves)
    torch.testing.assert_close(grads, expected)


@needs_ops
def test_condition_gradients_are_refused_by_a_named_kernel():
    kw = inputs("norm", (2, 3, 5))
    x, scale, shift = kw["x"], kw["scale"].requires_grad_(), kw["shift"]
    with pytest.raises(ValueError, match="adaln: .*gradients of activations alone, but scale requires grad"):
        adaln(x, scale, shift, backend="cpu")
    with pytest.raises(ValueError, match="layer_norm: .* but weight requires grad"):
        layer_norm(x, scale[0], shift[0], backend="cpu")
    with torch.no_grad():
        adaln(x, scale, shift, backend="cpu")
    op = torch.ops.stitchvm.residual_norm
    _, y, _ = op(x.requires_grad_(), None, None, None, None, scale, shift, None, None, None, False, 1e-6)
    with pytest.raises(RuntimeError, match="gradients of activations alone"):
        y.sum().backward()


@needs_ops
def test_unused_results_have_no_gradient():
    """A result that nothing differentiates costs nothing, and leaves the others right."""
    for used in itertools.product((False, True), repeat=3):
        if not any(used):
            continue
        kw = inputs("everything", (2, 3, 7))
        leaves = [kw[name].requires_grad_() for name in ACTIVATIONS]

        def loss(results, used=used):
            return sum(t.square().sum() for t, use in zip(results, used, strict=True) if use)

        grads = torch.autograd.grad(loss(residual_norm.residual_norm(**kw, backend="cpu")), leaves)
        torch.testing.assert_close(grads, torch.autograd.grad(loss(eager(**kw)), leaves))


@needs_ops
def test_some_activations_need_no_gradient():
    for needed in ACTIVATIONS:
        kw = inputs("everything", (2, 3, 7))
        leaf = kw[needed].requires_grad_()
        results = residual_norm.residual_norm(**kw, backend="cpu")
        (grad,) = torch.autograd.grad(sum(t.square().sum() for t in results), leaf)
        torch.testing.assert_close(grad, torch.autograd.grad(sum(t.square().sum() for t in eager(**kw)), leaf)[0])


@needs_ops
def test_second_derivative_raises_with_advice():
    kw = inputs("norm", (1, 2, 5))
    x, scale, shift = kw["x"].requires_grad_(), kw["scale"], kw["shift"]
    (grad,) = torch.autograd.grad(adaln(x, scale, shift).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(adaln(x, scale, shift, backend="reference").square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert torch.isfinite(x.grad).all()


@needs_ops
@pytest.mark.parametrize("variant", ["norm", "branch", "half-gated branches and norm", "everything"])
def test_gradcheck(variant):
    kw = inputs(variant, (2, 2, 5))
    names = [name for name in ACTIVATIONS if name in kw]

    def f(*activations):
        changed = kw | dict(zip(names, activations, strict=True))
        return present(residual_norm.residual_norm(**changed, backend="cpu"))

    assert torch.autograd.gradcheck(f, [kw[name].requires_grad_() for name in names])


@needs_ops
@pytest.mark.parametrize("variant", ["norm", "gated branch", "everything"])
def test_opcheck(variant):
    kw = inputs(variant, (2, 3, 5), torch.float32)
    arguments = [kw.get(a.name) for a in torch.ops.stitchvm.residual_norm.default._schema.arguments]
    results = residual_norm.residual_norm(**kw)
    grads = [None if t is None else t.clone() for t in results]
    grad_kw = grad_arguments(kw, results, grads)
    op = torch.ops.stitchvm.residual_norm_input_grad.default
    torch.library.opcheck(op, tuple(grad_kw.get(a.name) for a in op._schema.arguments))
    kw["x"].requires_grad_()
    torch.library.opcheck(torch.ops.stitchvm.residual_norm.default, tuple(arguments))


@needs_ops
@pytest.mark.slow
def test_compiles_in_one_graph():
    kw = inputs("everything", (2, 3, 32), torch.float32)
    compiled = torch.compile(
        lambda: tuple(2 * t for t in residual_norm.residual_norm(**kw)), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(), tuple(2 * t for t in residual_norm.residual_norm(**kw)))


@needs_ops
def test_dtype_without_a_kernel():
    kw = inputs("norm", (2, 3, 8), torch.float16)
    args = kw["x"], kw["scale"], kw["shift"]
    assert_accurate(adaln(*args), eager(**convert(kw, torch.float64))[0], eager(**kw)[0])
    with pytest.raises(TypeError, match="float32, bfloat16, float64, got float16"):
        adaln(*args, backend="cpu")


def test_rows_outside_the_tables(backend, use_backend):
    if backend == "cuda":
        pytest.skip("the kernel traps, which ends the CUDA context")
    name = use_backend(backend)
    kw = inputs("everything", (2, 3, 8), dtypes_of(backend)[0])
    for row in (-1, 5):
        kw["rows"] = torch.tensor([0, row])
        with pytest.raises(ValueError, match=rf"rows: expected rows in \[0, 5\), .*, got {row}"):
            residual_norm.residual_norm(**kw, backend=name)
        with pytest.raises(ValueError, match=rf"rows: expected rows in \[0, 5\), .*, got {row}"):
            residual_norm.residual_norm_input_grad(kw["x"], gate=kw["gate"], rows=kw["rows"], backend=name)


@needs_ops
def test_rows_outside_the_tables_stop_a_kernel(kernel, use_backend):
    """Without the check in Python, the kernel itself refuses."""
    if kernel == "cuda":
        pytest.skip("the kernel traps, which ends the CUDA context")
    use_backend(kernel)
    kw = inputs("everything", (2, 3, 8), dtypes_of(kernel)[0])
    for row in (-1, 5):
        kw["rows"] = torch.tensor([0, row])
        with pytest.raises(RuntimeError):
            torch.ops.stitchvm.residual_norm(**kw)
        with pytest.raises(RuntimeError):
            torch.ops.stitchvm.residual_norm_input_grad(**grad_arguments(kw, [kw["x"]] * 3, [kw["x"]] * 3))


def t(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(*shape, dtype=dtype, device=device)


X, S = t(2, 3, 4), t(2, 4)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((1.0, S, S), {}, TypeError, "x: expected a tensor, got float"),
        ((X.long(), S, S), {}, TypeError, "x: expected a floating-point dtype, got torch.int64"),
        ((t(3, 4), S, S), {}, ValueError, r"x: expected shape \[B, N, C\], got \[3, 4\]"),
        ((X.to_sparse(), S, S), {}, TypeError, "x: expected a strided"),
        ((X, None, S), {}, TypeError, "scale: expected a tensor, got NoneType"),
        ((X, t(2, 5), S), {}, ValueError, r"scale: expected shape \[2, 4\] or \[1, 4\], got \[2, 5\]"),
        ((X, S, t(3, 4)), {}, ValueError, r"shift: expected shape \[2, 4\] or \[1, 4\], got \[3, 4\]"),
        ((X, t(2, 1, 4), S), {}, ValueError, r"scale: .* got \[2, 1, 4\]"),
        ((X, S.double(), S), {}, TypeError, "scale: expected the dtype of x, torch.float32, got"),
        ((X, S, t(2, 4, device="meta")), {}, ValueError, "shift: expected the device of x, cpu, got meta"),
        ((X, S, S, 1e-6), {}, TypeError, "scale2: expected a tensor, got float"),
        ((X, S, S, S), {}, TypeError, "shift2: expected a tensor, got NoneType"),
        ((X, S, S), {"shift2": S}, TypeError, "scale2: expected a tensor, got NoneType"),
        ((X, S, S), {"eps": -1.0}, ValueError, "eps: expected a finite number >= 0, got -1.0"),
        ((X, S, S), {"eps": float("nan")}, ValueError, "eps: expected a finite number"),
        ((X, S, S), {"eps": "1"}, TypeError, "eps: expected a number, got str"),
        ((X, S, S), {"backend": "gpu"}, ValueError, "backend: expected None or one of"),
        ((X, S, S), {"rows": [0, 1]}, TypeError, "rows: expected a tensor, got list"),
        ((X, S, S), {"rows": torch.zeros(2)}, TypeError, "rows: expected torch.int64, got torch.float32"),
        ((X, S, S), {"rows": torch.tensor([0])}, ValueError, r"rows: expected shape \[2\], got \[1\]"),
        ((X, S, S), {"rows": torch.tensor([0, 2])}, ValueError, r"rows: expected rows in \[0, 2\), .*, got 2"),
        (
            (X, S, S),
            {"rows": t(2, dtype=torch.int64, device="meta")},
            ValueError,
            "rows: expected the device of x, cpu, got meta",
        ),
        ((X, t(7, 5), S), {"rows": torch.tensor([0, 0])}, ValueError, r"scale: expected shape \[R, 4\], got \[7, 5\]"),
    ],
)
def test_bad_input_of_adaln(args, kwargs, error, message):
    with pytest.raises(error, match="adaln: " + message):
        adaln(*args, **kwargs)


@pytest.mark.parametrize(
    ("face", "args", "kwargs", "error", "message"),
    [
        (gated_residual, (X, None), {}, TypeError, "branch: expected a tensor, got NoneType"),
        (gated_residual, (X, X[:1]), {}, ValueError, r"branch: expected the shape of x, \[2, 3, 4\], got \[1, 3, 4\]"),
        (gated_residual, (X, X.double()), {}, TypeError, "branch: expected the dtype of x"),
        (gated_residual, (X, X, t(3, 4)), {}, ValueError, "gate: expected shape"),
        (gated_residual, (X, X, S, None, S), {}, ValueError, "gate2: expected None without branch2, got Tensor"),
        (gated_residual, (X, X, S, X, t(4)), {}, ValueError, r"gate2: expected shape .* got \[4\]"),
        (gated_residual, (X, X), {"rows": torch.tensor([0, 0])}, ValueError, "rows: expected None without a gate"),
        (gated_residual_adaln, (X, X, S, None, S), {}, TypeError, "scale: expected a tensor, got NoneType"),
        (gated_residual_adaln, (X, X, S, S, S), {"branch2": X[:, :1]}, ValueError, "branch2: expected the shape of x"),
        (gated_residual_adaln, (X, X, S, S, S), {"eps": True}, TypeError, "eps: expected a number, got bool"),
        (layer_norm, (X, None), {}, TypeError, "weight: expected a tensor, got NoneType"),
        (layer_norm, (X, S), {}, ValueError, r"weight: expected shape \[4\], got \[2, 4\]"),
        (layer_norm, (X, t(4), t(5)), {}, ValueError, r"bias: expected shape \[4\], got \[5\]"),
        (layer_norm, (t(4), t(4)), {}, ValueError, r"x: expected shape \[B, N, C\] or \[B, C\], got \[4\]"),
        (layer_norm, (X, t(4)), {"gate": S}, ValueError, "gate: expected None without residual"),
        (layer_norm, (X, t(4)), {"residual": X[0]}, ValueError, "residual: expected the shape of x"),
        (layer_norm, (X, t(4)), {"residual": X, "gate": t(4)}, ValueError, "gate: expected shape"),
    ],
)
def test_bad_input(face, args, kwargs, error, message):
    with pytest.raises(error, match=f"{face.__name__}: {message}"):
        face(*args, **kwargs)


@needs_ops
def test_direct_calls_of_the_op_are_checked():
    op, grad_op = torch.ops.stitchvm.residual_norm, torch.ops.stitchvm.residual_norm_input_grad
    kw = inputs("everything", (2, 3, 4), torch.float32)
    bad = [
        {"x": kw["x"][0]},
        {"branch": kw["branch"][:1]},
        {"branch": None},
        {"branch2": None},
        {"scale": None},
        {"scale2": None},
        {"scale": kw["scale"][:, :3]},
        {"gate2": kw["gate2"].double()},
        {"rows": None},
        {"rows": kw["rows"].int()},
        {"rows": kw["rows"][:1]},
        {name: t.half() for name, t in kw.items() if isinstance(t, torch.Tensor) and name != "rows"},
    ]
    for change in bad:
        with pytest.raises(RuntimeError):
            op(**kw | change)
    x, gate = kw["x"], kw["gate"][:2]
    with pytest.raises(RuntimeError, match="a branch to add, a scale, or both"):
        op(x, *(None,) * 9, False, 1e-6)
    shared = {name: None for name in ("gate", "gate2", "scale", "scale2", "rows")} | {"affine": False, "eps": 1e-6}
    for grads, change in (
        ((None, None, None, None), {}),
        ((None, x, None, x), {}),
        ((None, x, None, None), {"scale": gate}),
        ((x, x[:1], None, x), {"scale": gate}),
        ((x[0], None, None, None), {"gate": gate}),
    ):
        with pytest.raises(RuntimeError):
            grad_op(*grads, **shared | change)
    transposed = torch.empty(2, 4, 3).transpose(1, 2)
    arguments = {name: None for name in ("branch", "gate", "branch2", "gate2", "scale2", "shift2", "rows")}
    arguments |= {"x": x, "scale": gate, "shift": gate, "affine": False, "eps": 1e-6}
    with pytest.raises(RuntimeError, match="y must be contiguous"):
        op.out(**arguments, residual=None, y=transposed, y2=None)
    with pytest.raises(RuntimeError, match="y2 must be absent"):
        op.out(**arguments, residual=None, y=torch.empty_like(x), y2=torch.empty_like(x))
    with pytest.raises(RuntimeError, match="y must be given"):
        op.out(**arguments, residual=None, y=None, y2=None)
