"""qk_norm: values, gradients, layouts, memory safety, registration and messages."""

from __future__ import annotations

import itertools

import pytest
import torch

from stitchvm_ext.ops import _loader, qk_norm, reference
from stitchvm_ext.ops.qk_norm import qk_norm_input_grad
from tests.ops.op_helpers import (
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

# B, Nq, N, Mq (None: the context has no q), M (None: no context), H, D
CASES = {
    "one": (1, 1, 1, None, None, 1, 1),
    "image": (2, 3, 3, None, None, 2, 64),
    "joint": (2, 5, 5, 3, 3, 3, 64),
    "pruned": (2, 5, 5, None, 3, 2, 32),
    "fewer queries": (1, 2, 7, 1, 4, 2, 128),
    "odd head": (2, 3, 3, 2, 2, 5, 7),
    "many heads": (1, 2, 2, 1, 1, 35, 16),
    "wide head": (1, 2, 2, 1, 1, 2, 257),
    "33": (2, 3, 3, 1, 1, 2, 33),
    "no image": (2, 0, 0, 2, 2, 2, 8),
    "no text": (2, 3, 3, 0, 0, 2, 8),
    "no batch": (0, 3, 3, 2, 2, 2, 8),
}
EPS = 1e-6


def inputs(case, dtype=torch.float64, device="cpu", rotary=False, absent=(), seed=0):
    """The tensors of a case by their names in the schema; `absent` names weights that are left out."""
    b, nq, n, mq, m, heads, dim = CASES[case]
    g = torch.Generator().manual_seed(seed)

    def randn(*shape, scale=1.0, shift=0.0):
        return (scale * torch.randn(shape, generator=g, dtype=torch.float64) + shift).to(dtype).to(device)

    t = {"q": randn(b, nq, heads * dim, scale=2), "k": randn(b, n, heads * dim), "v": randn(b, n, heads * dim)}
    t["context_q"] = None if mq is None else randn(b, mq, heads * dim)
    t["context_k"] = None if m is None else randn(b, m, heads * dim, scale=3)
    t["context_v"] = None if m is None else randn(b, m, heads * dim)
    for name in ("q_weight", "k_weight", "context_q_weight", "context_k_weight"):
        w = randn(dim, scale=0.3, shift=1.0)
        t[name] = None if name in absent else w
    tokens = n + (m or 0)
    angle = 6 * torch.rand(tokens, dim // 2, generator=g).repeat_interleave(2, 1)
    t["cos"] = angle.cos().to(device) if rotary else None
    t["sin"] = angle.sin().to(device) if rotary else None
    return t, heads


STREAMS = ("q", "k", "v", "context_q", "context_k", "context_v")


def eager(t, heads, context_first):
    """diffusers: RMSNorm, apply_rotary_emb and torch.cat of JointAttnProcessor2_0 and FluxAttnProcessor."""

    def norm(x, weight):
        if x is None:
            return None
        x = x.unflatten(-1, (heads, -1))
        if weight is None:
            return x
        variance = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32).pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + EPS)
        return x.to(weight.dtype) * weight

    def join(image, text):
        if text is None:
            return image
        return torch.cat([text, image] if context_first else [image, text], dim=1)

    def rotate(x):
        if t["cos"] is None:
            return x
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack([-imaginary, real], dim=-1).flatten(3)
        return (x.to(wide) * t["cos"][:, None] + rotated.to(wide) * t["sin"][:, None]).to(x.dtype)

    q = rotate(join(norm(t["q"], t["q_weight"]), norm(t["context_q"], t["context_q_weight"])))
    k = rotate(join(norm(t["k"], t["k_weight"]), norm(t["context_k"], t["context_k_weight"])))
    return q, k, join(norm(t["v"], None), norm(t["context_v"], None))


def ours(t, heads, context_first, backend):
    return qk_norm(
        *(t["q"], t["k"], t["v"]),
        heads=heads,
        context=None if t["context_k"] is None else (t["context_q"], t["context_k"], t["context_v"]),
        **{name: t[name] for name in t if name.endswith("_weight")},
        rotary=None if t["cos"] is None else (t["cos"], t["sin"]),
        context_first=context_first,
        eps=EPS,
        backend=backend,
    )


def in_double(t):
    return {name: None if x is None else x.double() if x.dtype != torch.float64 else x for name, x in t.items()}


def gradients(f, t, grads):
    """The gradients of q, k, v (tuples of f's first three results) for every stream that is there."""
    t = dict(t)
    names = [name for name in STREAMS if t[name] is not None]
    for name in names:
        t[name] = t[name].detach().requires_grad_()
    return torch.autograd.grad(f(t)[:3], [t[name] for name in names], grads)


ROTARY_CASES = {"joint", "image", "no text", "no batch"}
WEIGHTS = [(), ("q_weight", "context_k_weight"), ("q_weight", "k_weight", "context_q_weight", "context_k_weight")]


def variants():
    for case in CASES:
        for rotary, context_first, absent in itertools.product((False, True), (False, True), WEIGHTS):
            if rotary and case not in ROTARY_CASES:
                continue
            if case not in ("joint", "odd head") and (absent == WEIGHTS[1] or (context_first and absent)):
                continue
            yield case, rotary, context_first, absent


def test_values_and_gradients(backend, use_backend):
    chosen = use_backend(backend)
    for dtype, (case, rotary, first, absent) in itertools.product(dtypes_of(backend), variants()):
        t, heads = inputs(case, dtype, device_of(backend), rotary, absent)
        got = ours(t, heads, first, chosen)
        exact, reachable = eager(in_double(t), heads, first), eager(t, heads, first)
        for name, result, a, b in zip("qkv", got, exact, reachable, strict=False):
            assert result.is_contiguous(), name
            assert_accurate(result, a, b)
        g = torch.Generator().manual_seed(1)
        grads = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(dtype).to(x.device) for x in got[:3]]
        results = gradients(lambda t, h=heads, f=first: ours(t, h, f, chosen), t, grads)
        exact = gradients(lambda t, h=heads, f=first: eager(t, h, f), in_double(t), [x.double() for x in grads])
        reachable = gradients(lambda t, h=heads, f=first: eager(t, h, f), t, grads)
        for result, a, b in zip(results, exact, reachable, strict=True):
            if case == "one":  # a single channel is normalised to +-1: only rounding is left of the gradient
                assert (result - a).abs().max() <= 4 * torch.finfo(dtype).eps * grads[0].abs().max() + 1e-5
            else:
                assert_gradient(result, a, b)


def test_saved_rms(backend, use_backend):
    chosen = use_backend(backend)
    t, heads = inputs("joint", torch.bfloat16, device_of(backend), absent=("context_q_weight",))
    out = ours(t, heads, True, chosen)
    assert out.q_rstd.dtype == out.k_rstd.dtype == torch.float32 and not out.q_rstd.requires_grad
    expected = torch.rsqrt(t["q"].float().unflatten(-1, (heads, -1)).square().mean(-1) + EPS)
    torch.testing.assert_close(out.q_rstd[:, 3:], expected)
    assert (out.q_rstd[:, :3] == 1).all()


def test_v_is_optional(backend, use_backend):
    chosen = use_backend(backend)
    t, heads = inputs("joint", torch.float32, device_of(backend))
    full = ours(t, heads, False, chosen)
    out = ours(t | {"v": None, "context_v": None}, heads, False, chosen)
    assert out.v is None and torch.equal(out.q, full.q) and torch.equal(out.k, full.k)
    t["q"].requires_grad_()
    out = ours(t | {"v": None, "context_v": None}, heads, False, chosen)
    (grad,) = torch.autograd.grad(out.q.sum(), t["q"])
    assert torch.isfinite(grad).all()


def test_strided_inputs(backend, use_backend):
    """Chunks of one wide projection, gradients as attention's backward lays them out, and channels with a stride."""
    chosen = use_backend(backend)
    for dtype in dtypes_of(backend):
        t, heads = inputs("joint", dtype, device_of(backend), rotary=True)
        dense = ours(t, heads, True, chosen)
        wide = torch.cat([t["q"], t["k"], t["v"]], -1)
        q, k, v = wide.chunk(3, -1)
        context_k = t["context_k"].transpose(1, 2).contiguous().transpose(1, 2)
        strided = t | {"q": q, "k": k, "v": v, "context_k": context_k}
        strided["q_weight"] = torch.stack([t["q_weight"]] * 2, -1)[:, 0]
        assert not q.is_contiguous() and not context_k.is_contiguous()
        for a, b in zip(ours(strided, heads, True, chosen), dense, strict=True):
            torch.testing.assert_close(a, b)
        grads = [torch.randn_like(x) for x in dense[:3]]
        expected = gradients(lambda t, h=heads: ours(t, h, True, chosen), t, grads)
        for order in ((0, 2, 1, 3), (0, 1, 3, 2)):
            laid_out = [x.permute(order).contiguous().permute(order) for x in grads]
            got = gradients(lambda t, h=heads: ours(t, h, True, chosen), t, laid_out)
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b)


def test_input_grad_by_hand(backend, use_backend):
    """The function for backward passes written by hand gives what autograd gives, and None where there is nothing."""
    chosen = use_backend(backend)
    for case, rotary in (("joint", True), ("pruned", False), ("image", False)):
        t, heads = inputs(case, torch.float32, device_of(backend), rotary)
        out = ours(t, heads, False, chosen)
        grads = [torch.randn_like(x) for x in out[:2]]
        tokens = [0 if t[f"context_{x}"] is None else t[f"context_{x}"].shape[1] for x in "qk"]
        got = qk_norm_input_grad(
            *grads,
            out,
            **{name: t[name] for name in t if name.endswith("_weight")},
            rotary=(t["cos"], t["sin"]) if rotary else None,
            context_q_tokens=tokens[0],
            context_k_tokens=tokens[1],
            backend=chosen,
        )
        names = [name for name in ("q", "k", "context_q", "context_k") if t[name] is not None]
        expected = gradients(
            lambda t, h=heads: ours(t, h, False, chosen)[:2], t | {"v": None, "context_v": None}, grads
        )
        assert [x is None for x in got] == [t[name] is None for name in ("q", "k", "context_q", "context_k")]
        for a, b, _ in zip([x for x in got if x is not None], expected, names, strict=True):
            torch.testing.assert_close(a, b)


def test_scaled_rotary(backend, use_backend):
    """Cosines and sines that carry a scale are inverted, not transposed."""
    chosen = use_backend(backend)
    t, heads = inputs("image", torch.float32, device_of(backend), rotary=True)
    t["cos"], t["sin"] = 0.7 * t["cos"], 0.7 * t["sin"]
    grads = [torch.randn_like(x) for x in ours(t, heads, False, chosen)[:3]]
    got = gradients(lambda t: ours(t, heads, False, chosen), t, grads)
    exact = gradients(lambda t: eager(t, heads, False), in_double(t), [x.double() for x in grads])
    for a, b, c in zip(got, exact, gradients(lambda t: eager(t, heads, False), t, grads), strict=True):
        assert_gradient(a, b, c)


def test_zero_weight_is_loud(backend, use_backend):
    chosen = use_backend(backend)
    t, heads = inputs("image", torch.float32, device_of(backend))
    t["k_weight"][5] = 0
    out = ours(t, heads, False, chosen)
    grads = gradients(lambda t: ours(t, heads, False, chosen), t, [torch.ones_like(x) for x in out[:3]])
    if backend == "reference":  # plain autograd, which keeps the inputs
        return
    assert torch.isfinite(grads[0]).all()
    nan = grads[1].unflatten(-1, (heads, -1)).isnan()
    assert nan[..., 5].all() and nan.sum() == nan[..., 5].sum()


def test_non_finite_heads_stay_local(backend, use_backend):
    chosen = use_backend(backend)
    for dtype in dtypes_of(backend):
        t, heads = inputs("joint", dtype, device_of(backend))
        clean = ours(t, heads, False, chosen)
        t["context_k"][1, 2, 64 + 3] = float("nan")
        got = ours(t, heads, False, chosen)
        assert got.k[1, 7, 1].isnan().all()
        got.k[1, 7, 1] = clean.k[1, 7, 1]
        assert torch.equal(got.k, clean.k) and torch.equal(got.q, clean.q) and torch.equal(got.v, clean.v)


@needs_ops
@pytest.mark.parametrize("case", ["joint", "odd head", "33"])
def test_every_start_offset(kernel, case, use_backend):
    """Inputs lie between NaNs and outputs between sentinels: reading or writing outside shows."""
    use_backend(kernel)
    op, grad_op = torch.ops.stitchvm.qk_norm, torch.ops.stitchvm.qk_norm_input_grad
    for dtype in dtypes_of(kernel):
        t, heads = inputs(case, dtype, device_of(kernel), rotary=case == "joint")
        expected = op(*t.values(), heads, False, EPS)
        grads = [torch.randn_like(x) for x in expected[:2]]
        m = t["context_k"].shape[1]
        weights = list(t.values())[6:]
        saved = (*expected[:2], *expected[3:])
        expected_grads = grad_op(*grads, *saved, *weights, m, m, False)
        names = ("joint_q", "joint_k", "joint_v", "q_rstd", "k_rstd")
        grad_names = ("grad_input_q", "grad_input_k", "grad_context_q", "grad_context_k")
        for offset in (0, 1, 2, 3, 4, 7, 8, 15):

            def moved(x, offset=offset):
                return None if x is None else guarded(x, offset, float("nan"))[0]

            outs = [guarded(torch.full_like(x, SENTINEL), offset, SENTINEL) for x in expected]
            op.out(*map(moved, t.values()), heads, False, EPS, **dict(zip(names, [o for o, _ in outs], strict=True)))
            grad_outs = [guarded(torch.full_like(x, SENTINEL), offset, SENTINEL) for x in expected_grads]
            results = dict(zip(grad_names, [o for o, _ in grad_outs], strict=True))
            grad_op.out(*map(moved, (*grads, *saved, *weights)), m, m, False, **results)
            for (out, buffer), x in zip(outs + grad_outs, (*expected, *expected_grads), strict=True):
                torch.testing.assert_close(out, x)
                assert_untouched(buffer, offset, out.numel())


def all_bits(t, heads, grads):
    """Results and gradients of the CPU kernel."""
    out = ours(t, heads, True, "cpu")
    return [*out, *gradients(lambda t: ours(t, heads, True, "cpu"), t, grads)]


@needs_ops
@pytest.mark.parametrize(("case", "rotary"), [("joint", True), ("joint", False), ("odd head", False)])
def test_instruction_sets_do_not_change_bits(case, rotary, use_backend):
    for dtype in dtypes_of("cpu"):
        t, heads = inputs(case, dtype, rotary=rotary)
        grads = [torch.randn_like(x) for x in eager(t, heads, True)]
        results = []
        for level in USABLE_LEVELS:
            use_backend(f"cpu-{level}")
            results.append(all_bits(t, heads, grads))
        for one in results[:-1]:
            assert all(torch.equal(a, b) for a, b in zip(one, results[-1], strict=True))


@needs_ops
def test_threads_do_not_change_bits():
    g = torch.Generator().manual_seed(0)
    t, heads = inputs("image", torch.float32)
    for name in ("q", "k", "v"):
        t[name] = torch.randn(3, 301, heads * 64, generator=g)
    grads = [torch.randn_like(x) for x in eager(t, heads, True)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(all_bits(t, heads, grads))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_ops
def test_reference_input_grad_is_the_kernels():
    """Both work from the results; the reference's is checked against autograd through the kernels' tests."""
    t, heads = inputs("joint", rotary=True, absent=("context_k_weight",))
    out = ours(t, heads, True, "cpu")
    constants = [t[name] for name in ("q_weight", "k_weight", "context_q_weight", "context_k_weight", "cos", "sin")]
    args = (torch.randn_like(out.q), torch.randn_like(out.k), out.q, out.k, out.q_rstd, out.k_rstd, *constants)
    got = torch.ops.stitchvm.qk_norm_input_grad(*args, 3, 3, True)
    expected = reference.qk_norm_input_grad(*args, 3, 3, True)
    torch.testing.assert_close(got, tuple(expected))


def test_weight_gradients_use_the_reference():
    t, heads = inputs("joint")
    for name in ("q", "context_k", "k_weight"):
        t[name].requires_grad_()
    sources = [t[name] for name in ("q", "context_k", "k_weight")]
    got = torch.autograd.grad(sum(x.square().sum() for x in ours(t, heads, False, None)[:3]), sources)
    expected = torch.autograd.grad(sum(x.square().sum() for x in eager(t, heads, False)), sources)
    torch.testing.assert_close(got, expected)


@needs_ops
def test_weight_gradients_are_refused_by_a_named_kernel():
    t, heads = inputs("image")
    t["k_weight"].requires_grad_()
    with pytest.raises(ValueError, match="gradients for q, k, v and the context alone"):
        ours(t, heads, False, "cpu")
    with torch.no_grad():
        ours(t, heads, False, "cpu")
    out = torch.ops.stitchvm.qk_norm(*t.values(), heads, False, EPS)
    with pytest.raises(RuntimeError, match="gradients for q, k, v and the context alone"):
        out[1].sum().backward()


@needs_ops
def test_second_derivative_raises_with_advice():
    t, heads = inputs("image")
    q = t["q"].requires_grad_()
    (grad,) = torch.autograd.grad(ours(t, heads, False, None).q.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.sum().backward()
    y = ours(t, heads, False, "reference").q
    (grad,) = torch.autograd.grad((y * y.sin()).sum(), q, create_graph=True)
    grad.square().sum().backward()
    assert torch.isfinite(q.grad).all()


@needs_ops
def test_gradcheck():
    t, heads = inputs("odd head")
    streams = [t[name].requires_grad_() for name in STREAMS]

    def f(*streams):
        return ours(t | dict(zip(STREAMS, streams, strict=True)), heads, True, "cpu")[:3]

    assert torch.autograd.gradcheck(f, streams, fast_mode=True)


@needs_ops
def test_opcheck():
    t, heads = inputs("joint", torch.float32, rotary=True)
    out = torch.ops.stitchvm.qk_norm(*t.values(), heads, True, EPS)
    constants = list(t.values())[6:]
    args = (*(torch.randn_like(x) for x in out[:2]), *out[:2], *out[3:], *constants, 3, 3, True)
    torch.library.opcheck(torch.ops.stitchvm.qk_norm_input_grad.default, args)
    streams = [t[name].requires_grad_() for name in STREAMS]
    torch.library.opcheck(torch.ops.stitchvm.qk_norm.default, (*streams, *constants, heads, True, EPS))


@needs_ops
@pytest.mark.slow
def test_opcheck_of_absent_inputs():
    t, heads = inputs("pruned", torch.float32)
    t["v"] = t["context_v"] = t["k_weight"] = None
    t["q"].requires_grad_()
    torch.library.opcheck(torch.ops.stitchvm.qk_norm.default, (*t.values(), heads, False, EPS))


@needs_ops
@pytest.mark.slow
def test_compiles_in_one_graph():
    t, heads = inputs("joint", torch.float32)
    compiled = torch.compile(lambda t: ours(t, heads, False, None), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(t), ours(t, heads, False, None), strict=True):
        torch.testing.assert_close(a, b)


@needs_ops
def test_dtype_without_a_kernel():
    t, heads = inputs("joint", torch.float16)
    got, exact, reachable = ours(t, heads, False, None)[:3], eager(in_double(t), heads, False), eager(t, heads, False)
    for a, b, c in zip(got, exact, reachable, strict=True):
        assert_accurate(a, b, c)
    with pytest.raises(TypeError, match="float32, bfloat16, float64, got float16"):
        ours(t, heads, False, "cpu")


X = torch.zeros(2, 3, 8)
W = torch.zeros(4)
R = (torch.zeros(3, 4), torch.zeros(3, 4))


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((1.0, X), {}, TypeError, "q: expected a tensor, got float"),
        ((X.int(), X), {}, TypeError, "q: expected a floating-point dtype, got torch.int32"),
        ((X.to_sparse(), X), {}, TypeError, "q: expected a strided"),
        ((X[0], X), {}, ValueError, r"q: expected shape \[B, N, H\*D\], got \[3, 8\]"),
        ((X, None), {}, TypeError, "k: expected a tensor, got NoneType"),
        ((X, X.double()), {}, TypeError, "k: expected the dtype of q, torch.float32, got torch.float64"),
        ((X, X.to("meta")), {}, ValueError, "k: expected the device of q, cpu, got meta"),
        ((X, X[..., :4]), {}, ValueError, r"k: expected shape \[2, N, 8\], got \[2, 3, 4\]"),
        ((X, X, X[:, :2]), {}, ValueError, "v: expected the 3 tokens of k, got 2"),
        ((X, X), {"heads": 3}, ValueError, "heads: expected a divisor of the 8 channels of q, got 3"),
        ((X[..., :0], X[..., :0]), {}, ValueError, "heads: expected a divisor of the 0 channels of q, got 2"),
        ((X, X), {"heads": 2.0}, TypeError, "heads: expected an integer, got float"),
        ((X, X), {"context": (X, None, None)}, ValueError, "context k: expected a tensor"),
        ((X, X), {"context": (X, X, X)}, ValueError, "context v: expected None as for v, got a tensor"),
        ((X, X, X), {"context": (X, X, None)}, ValueError, "context v: expected a tensor as for v, got None"),
        ((X, X, X), {"context": (X, X, X[:, :1])}, ValueError, "context v: expected the 3 tokens of context k, got 1"),
        ((X, X), {"context": (X[:1], X, None)}, ValueError, r"context q: expected shape \[2, N, 8\]"),
        ((X, X), {"k_weight": torch.zeros(8)}, ValueError, r"k_weight: expected shape \[4\], got \[8\]"),
        ((X, X), {"q_weight": W.double()}, TypeError, "q_weight: expected the dtype of q"),
        ((X, X[:, :2]), {"rotary": R}, ValueError, "rotary: expected as many queries as keys, got 3 and 2"),
        ((X, X), {"rotary": R, "heads": 8}, ValueError, "rotary: expected heads of an even number of channels, got 1"),
        ((X, X), {"rotary": (R[0].double(), R[1])}, TypeError, "cos: expected torch.float32, got torch.float64"),
        ((X, X), {"rotary": (R[0], None)}, TypeError, "sin: expected a tensor, got NoneType"),
        ((X, X), {"rotary": (R[0], R[1][:2])}, ValueError, r"sin: expected shape \[3, 4\], got \[2, 4\]"),
        ((X, X), {"eps": -1.0}, ValueError, "eps: expected a finite number >= 0"),
        ((X, X), {"eps": "a"}, TypeError, "eps: expected a number, got str"),
    ],
)
def test_bad_input(args, kwargs, error, message):
    with pytest.raises(error, match="qk_norm: " + message):
        qk_norm(*args, **{"heads": 2, **kwargs})


@needs_ops
def test_direct_calls_of_the_op_are_checked():
    none = (None,) * 4

    def call(q, k, v=None, context=(None, None, None), weights=none, rotary=(None, None), heads=2):
        torch.ops.stitchvm.qk_norm(q, k, v, *context, *weights, *rotary, heads, False, EPS)

    call(X, X)
    for bad in (
        {"q": X[0], "k": X},
        {"q": X, "k": X.double()},
        {"q": X, "k": X, "heads": 3},
        {"q": X, "k": X, "heads": 0},
        {"q": X, "k": X, "v": X[:, :1]},
        {"q": X, "k": X, "context": (X, None, None)},
        {"q": X, "k": X, "weights": (X, None, None, None)},
        {"q": X, "k": X, "rotary": (R[0], None)},
        {"q": X, "k": X[:, :1], "rotary": R},
        {"q": X.half(), "k": X.half()},
    ):
        with pytest.raises(RuntimeError):
            call(**bad)
    out = torch.ops.stitchvm.qk_norm(X, X, None, None, None, None, *none, None, None, 2, False, EPS)
    joint = (out[0], out[1], out[3], out[4], *none, None, None)
    for bad in ((out[0][:, :1], out[1], *joint, 0, 0, False), (out[0], out[1], *joint, 4, 0, False)):
        with pytest.raises(RuntimeError):
            torch.ops.stitchvm.qk_norm_input_grad(*bad)
