"""guidance_step: values, scales, batches, memory safety, registration and messages."""

from __future__ import annotations

import pytest
import torch

from stitchvm_ext.ops import _loader, guidance_step, reference
from tests.ops.op_helpers import (
    CPU_BACKENDS,
    OFFSETS,
    SENTINEL,
    assert_accurate,
    assert_untouched,
    device_of,
    dtypes_of,
    guarded,
)

needs_ops = pytest.mark.skipif(not _loader.HAS_OPS, reason=_loader.library_c.reason)

OPTIONS = {"guidance_scale": 4.5, "strength": 0.3, "relative": True}
COEFS = {"latents_coef": 0.9, "velocity_coef": -0.05, "noise_coef": 0.2}
SHAPES = [(1, 1), (2, 31), (3, 1, 4, 8), (2, 3, 11), (1, 16, 33, 9), (2, 5000), (1, 9000)]
NAMES = ("uncond", "grad", "noise")
SUBSETS = [tuple(name for k, name in enumerate(NAMES) if number >> k & 1) for number in range(8)]


def inputs(shape, dtype, device, names=NAMES, seed=0):
    """Latents, grad and noise in float32 (float64 for a float64 model), cond and uncond in the model's dtype."""
    latents_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    g = torch.Generator().manual_seed(seed)
    made = {}
    for name in ("latents", "cond", *NAMES):
        t = torch.randn(*shape, generator=g, dtype=torch.float64)
        made[name] = t.to(dtype if name in ("cond", "uncond") else latents_dtype).to(device)
    return {name: t for name, t in made.items() if name in ("latents", "cond", *names)}


def coefs(tensors):
    return COEFS if "noise" in tensors else {**COEFS, "noise_coef": 0.0}


def eager(
    latents, cond, uncond=None, grad=None, noise=None, *, guidance_scale, strength, relative,
    latents_coef, velocity_coef, noise_coef,
):  # fmt: skip
    """A sampler's own code, in the latents' dtype."""
    norm = lambda x: torch.linalg.vector_norm(x.flatten(1), dim=1)  # noqa: E731
    u = cond.to(latents.dtype)
    if uncond is not None:
        u = uncond.to(latents.dtype) + guidance_scale * (u - uncond.to(latents.dtype))
    norms = [norm(u), torch.zeros_like(norm(u))]
    guided = u
    if grad is not None:
        norms[1] = norm(grad)
        c = strength * norms[0] / norms[1] if relative else torch.full_like(norms[0], strength)
        guided = u - c.view(-1, *[1] * (u.dim() - 1)) * grad
    out = latents_coef * latents + velocity_coef * guided
    return out if noise is None else out + noise_coef * noise, torch.stack(norms, 1)


def assert_step(got, tensors, **options):
    exact = eager(**{name: t.double() for name, t in tensors.items()}, **options)
    for ours, truth, plain in zip(got, exact, eager(**tensors, **options), strict=True):
        assert_accurate(ours, truth, plain)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_terms(backend, names, relative, use_backend):
    name = use_backend(backend)
    for dtype in dtypes_of(backend):
        tensors = inputs((2, 3, 5, 7), dtype, device_of(backend), names)
        options = {**OPTIONS, "relative": relative, **coefs(tensors)}
        assert_step(guidance_step(**tensors, **options, backend=name), tensors, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend, shape, use_backend):
    name = use_backend(backend)
    for dtype in dtypes_of(backend):
        tensors = inputs(shape, dtype, device_of(backend))
        out, norms = guidance_step(**tensors, **OPTIONS, **COEFS, backend=name)
        assert out.is_contiguous() and norms.shape == (shape[0], 2)
        assert_step((out, norms), tensors, **OPTIONS, **COEFS)


@pytest.mark.parametrize("shape", [(0, 4, 2), (2, 0, 3), (2, 4)], ids=str)
def test_empty(backend, shape, use_backend):
    name = use_backend(backend)
    out, norms = guidance_step(**inputs(shape, torch.float32, device_of(backend)), **OPTIONS, **COEFS, backend=name)
    assert out.shape == shape and norms.shape == (shape[0], 2)
    if out.numel() == 0:
        assert norms.eq(0).all()


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-25, 1e-12, 1e12, 1e25, 1e34])
def test_a_relative_strength_does_not_see_the_gradients_scale(backend, scale, use_backend):
    name = use_backend(backend)
    for dtype in dtypes_of(backend):
        tensors = inputs((2, 4, 40), dtype, device_of(backend))
        expected, _ = guidance_step(**tensors, **OPTIONS, **COEFS, backend=name)
        tensors["grad"] = tensors["grad"] * scale
        got, norms = guidance_step(**tensors, **OPTIONS, **COEFS, backend=name)
        # gradients of 1e-38 have lost digits of their own
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4 if scale < 1e-37 else 1e-6)
        torch.testing.assert_close(
            norms[:, 1].double(), tensors["grad"].double().flatten(1).norm(dim=1), rtol=1e-5, atol=0
        )


def test_norms_are_per_sample_and_a_zero_gradient_gives_no_guidance(backend, use_backend):
    name = use_backend(backend)
    tensors = inputs((3, 4, 40), torch.float32, device_of(backend))
    tensors["grad"][1] = 0
    tensors["grad"][2] *= 1e20
    got, norms = guidance_step(**tensors, **OPTIONS, **COEFS, backend=name)
    without, _ = guidance_step(**{**tensors, "grad": None}, **OPTIONS, **COEFS, backend=name)
    assert torch.equal(got[1], without[1]) and norms[1, 1] == 0 and norms[:, 0].ne(0).all()


def test_a_sample_does_not_depend_on_its_batch(backend, use_backend):
    name = use_backend(backend)
    for dtype in dtypes_of(backend):
        tensors = inputs((5, 3, 1700), dtype, device_of(backend))
        together = guidance_step(**tensors, **OPTIONS, **COEFS, backend=name)
        for b in range(5):
            alone = guidance_step(**{k: t[b : b + 1] for k, t in tensors.items()}, **OPTIONS, **COEFS, backend=name)
            assert torch.equal(alone[0], together[0][b : b + 1]) and torch.equal(alone[1], together[1][b : b + 1])


@pytest.mark.parametrize("broken", ["cond", "uncond", "grad"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_norms_tell_what_is_not_finite(backend, broken, value, use_backend):
    name = use_backend(backend)
    for dtype in dtypes_of(backend):
        tensors = inputs((3, 5000), dtype, device_of(backend))
        tensors[broken][1, 4321] = value
        got, norms = guidance_step(**tensors, **OPTIONS, **COEFS, backend=name)
        assert norms.isfinite().tolist() == [[True, True], [broken == "grad", broken != "grad"], [True, True]]
        assert got[[0, 2]].isfinite().all() and not got[1, 4321].isfinite()


def test_strided_inputs(backend, use_backend):
    name = use_backend(backend)
    tensors = inputs((2, 6, 5), torch.float32, device_of(backend))
    strided = {k: t.transpose(1, 2).contiguous().transpose(1, 2) for k, t in tensors.items()}
    for ours, theirs in zip(
        guidance_step(**strided, **OPTIONS, **COEFS, backend=name),
        guidance_step(**tensors, **OPTIONS, **COEFS, backend=name),
        strict=True,
    ):
        assert torch.equal(ours, theirs) and ours.is_contiguous()


NUMBERS = (4.5, 0.3, True, 0.9, -0.05, 0.2)


@needs_ops
@pytest.mark.parametrize("size", [1, 31, 32, 33])
def test_every_start_offset(kernel, size, use_backend):
    """Inputs lie between NaNs and outputs between sentinels: reading or writing outside shows."""
    use_backend(kernel)
    for dtype in dtypes_of(kernel):
        tensors = inputs((2, size), dtype, device_of(kernel)).values()
        expected, expected_norms = torch.ops.stitchvm.guidance_step(*tensors, *NUMBERS)
        for offset in OFFSETS:
            moved = (guarded(t, offset, float("nan"))[0] for t in tensors)
            out, buffer = guarded(torch.full_like(expected, SENTINEL), offset, SENTINEL)
            norms, norms_buffer = guarded(torch.full_like(expected_norms, SENTINEL), offset, SENTINEL)
            torch.ops.stitchvm.guidance_step.out(*moved, *NUMBERS, out=out, norms=norms)
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(norms, expected_norms)
            assert_untouched(buffer, offset, out.numel())
            assert_untouched(norms_buffer, offset, norms.numel())


@needs_ops
def test_levels_and_threads_give_equal_bits(use_backend):
    before = torch.get_num_threads()
    for dtype in dtypes_of("cpu"):
        tensors, results = inputs((2, 70001), dtype, "cpu"), []
        try:
            for level in CPU_BACKENDS:
                use_backend(level)
                for threads in (1, 3):
                    torch.set_num_threads(threads)
                    results.append(guidance_step(**tensors, **OPTIONS, **COEFS))
        finally:
            torch.set_num_threads(before)
        for out, norms in results[1:]:
            assert torch.equal(out, results[0][0]) and torch.equal(norms, results[0][1])


@needs_ops
def test_opcheck():
    for names in (NAMES, ()):
        tensors = inputs((2, 3, 5), torch.float32, "cpu", names)
        args = [tensors.get(name) for name in ("latents", "cond", *NAMES)]
        torch.library.opcheck(torch.ops.stitchvm.guidance_step.default, (*args, *NUMBERS))


@needs_ops
@pytest.mark.slow
def test_compiles_in_one_graph():
    tensors = inputs((2, 3, 5), torch.float32, "cpu")
    step = lambda latents: guidance_step(**{**tensors, "latents": latents}, **OPTIONS, **COEFS)  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tensors["latents"]), step(tensors["latents"]))


@pytest.mark.parametrize("name", ["latents", "cond", *NAMES])
def test_a_gradient_is_refused(backend, name, use_backend):
    chosen = use_backend(backend)
    tensors = inputs((2, 3), torch.float32, device_of(backend))
    tensors[name].requires_grad_()
    with pytest.raises(ValueError, match=f"guidance_step: {name}: it requires grad"):
        guidance_step(**tensors, **OPTIONS, **COEFS, backend=chosen)
    with torch.no_grad():
        assert not guidance_step(**tensors, **OPTIONS, **COEFS, backend=chosen)[0].requires_grad


@needs_ops
def test_a_gradient_of_the_op_is_refused():
    tensors = inputs((2, 3), torch.float32, "cpu")
    out, _ = torch.ops.stitchvm.guidance_step(
        tensors["latents"].requires_grad_(), *list(tensors.values())[1:], *NUMBERS
    )
    with pytest.raises(RuntimeError, match="guidance_step: it has no gradient"):
        out.sum().backward()


def test_dtypes_without_a_kernel_run_the_reference():
    tensors = inputs((2, 30), torch.float16, "cpu")
    assert_step(guidance_step(**tensors, **OPTIONS, **COEFS), tensors, **OPTIONS, **COEFS)
    tensors = {k: t.double() if k in ("cond", "uncond") else t.float() for k, t in tensors.items()}
    assert guidance_step(**tensors, **OPTIONS, **COEFS)[0].dtype == torch.float32
    if _loader.HAS_OPS:
        with pytest.raises(TypeError, match="float64 latents with a float64 model alone"):
            guidance_step(**tensors, **OPTIONS, **COEFS, backend="cpu")


def test_reference_in_float64_is_the_samplers_own_code():
    tensors = inputs((2, 3, 5), torch.float64, "cpu")
    got = reference.guidance_step(*tensors.values(), *NUMBERS)
    torch.testing.assert_close(got, eager(**tensors, **OPTIONS, **COEFS))


Z = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"latents": [1.0]}, TypeError, "latents: expected a tensor, got list"),
        ({"cond": None}, TypeError, "cond: expected a tensor, got NoneType"),
        ({"latents": Z.half()}, TypeError, "latents: expected float32 or float64, got torch.float16"),
        ({"cond": Z.int()}, TypeError, "cond: expected a floating-point dtype, got torch.int32"),
        ({"uncond": Z.half()}, TypeError, "uncond: expected the dtype of cond, torch.float32, got torch.float16"),
        ({"grad": Z.half()}, TypeError, "grad: expected the dtype of latents, torch.float32, got torch.float16"),
        ({"noise": Z.to("meta")}, ValueError, "noise: expected the device of latents, cpu, got meta"),
        ({"cond": Z[:1]}, ValueError, r"cond: expected the shape of latents, \[2, 3\], got \[1, 3\]"),
        ({"grad": Z.t()}, ValueError, r"grad: expected the shape of latents, \[2, 3\], got \[3, 2\]"),
        ({"latents": Z[0, 0], "cond": Z[0, 0]}, ValueError, r"latents: expected shape \[B, ...\]"),
        ({"strength": "1"}, TypeError, "strength: expected a number, got str"),
        ({"guidance_scale": float("nan")}, ValueError, "guidance_scale: expected a finite number, got nan"),
        ({"relative": 1}, TypeError, "relative: expected a bool, got int"),
        ({"noise_coef": 0.1}, ValueError, "noise: expected a tensor for noise_coef 0.1, got None"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match="guidance_step: " + message):
        guidance_step(**{"latents": Z, "cond": Z, **change})


@needs_ops
def test_direct_calls_of_the_op_are_checked():
    good = [Z, Z, Z, Z, Z]
    for k in range(5):
        for bad in (Z[:1], Z.half(), Z[0]):
            with pytest.raises(RuntimeError):
                torch.ops.stitchvm.guidance_step(*good[:k], bad, *good[k + 1 :], *NUMBERS)
