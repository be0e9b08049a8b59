"""What the op tests share: the backends to run, and the measure of error."""

from __future__ import annotations

import torch
from torch import Tensor

from stitchvm_ext.ops import _loader

C = _loader.C
LEVELS = C.compiled_cpu_levels() if C is not None else []
USABLE_LEVELS = LEVELS[: LEVELS.index(C.detected_cpu_level()) + 1] if LEVELS else []

# "cpu-avx2" is the CPU backend held to that instruction-set level; "emulated" are the CUDA kernels on CPU tensors.
CPU_BACKENDS = [f"cpu-{level}" for level in USABLE_LEVELS]
KERNEL_BACKENDS = [*CPU_BACKENDS, "emulated", "cuda"]
BACKENDS = ["reference", *KERNEL_BACKENDS]

# Start offsets in elements: every residue of a 16-byte access for 2-byte elements, and one more than a cycle.
OFFSETS = range(17)

SENTINEL = -12345.0


def device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


def dtypes_of(backend: str) -> list[torch.dtype]:
    if backend in ("emulated", "cuda"):
        return [torch.float32, torch.bfloat16, torch.float16]
    return [torch.float32, torch.bfloat16, torch.float64]


def assert_accurate(got: Tensor, exact: Tensor, eager: Tensor, k: float = 2.0) -> None:
    """The error against float64 is at most k times that of eager code in the same dtype, plus a tiny absolute term.

    The tiny term is one unit in the last place of the largest exact value, since eager code can be exact by luck; for
    float64 itself, whose eager error counts as zero, it is 32 units.
    """
    assert got.dtype == eager.dtype and got.shape == exact.shape
    if exact.numel() == 0:
        return
    assert torch.isfinite(got).all()
    units = 32 if got.dtype == torch.float64 else 1
    tiny = units * torch.finfo(got.dtype).eps * exact.abs().max().item()
    bound = k * (eager.cpu().double() - exact.cpu()).abs().max().item() + tiny
    error = (got.cpu().double() - exact.cpu()).abs().max().item()
    assert error <= bound, f"error {error:.3e} > bound {bound:.3e}"


def assert_gradient(got: Tensor, exact: Tensor, eager: Tensor, k: float = 2.0) -> None:
    """assert_accurate, and the same rule for the relative L2 error; the cosine must agree with the error."""
    assert_accurate(got, exact, eager, k)
    norm = exact.norm().item()
    if norm == 0:
        return

    def relative(t: Tensor) -> float:
        return (t.cpu().double() - exact.cpu()).norm().item() / norm

    units = 32 if got.dtype == torch.float64 else 1
    assert relative(got) <= k * relative(eager) + units * torch.finfo(got.dtype).eps
    cosine = torch.nn.functional.cosine_similarity(got.cpu().double().flatten(), exact.cpu().flatten(), dim=0).item()
    assert cosine >= 1 - (k * relative(eager) + 1e-7) ** 2 - 1e-12


def guarded(t: Tensor, offset: int, fill: float) -> tuple[Tensor, Tensor]:
    """A contiguous copy of t that starts `offset` elements into a buffer filled with `fill`; returns (copy, buffer)."""
    buffer = torch.full((t.numel() + offset + 64,), fill, dtype=t.dtype, device=t.device)
    view = buffer[offset : offset + t.numel()].view(t.shape)
    view.copy_(t)
    return view, buffer


def assert_untouched(buffer: Tensor, offset: int, numel: int) -> None:
    """All of the buffer outside [offset, offset + numel) still holds the sentinel."""
    assert (buffer[:offset] == SENTINEL).all(), "wrote before the output"
    assert (buffer[offset + numel :] == SENTINEL).all(), "wrote behind the output"
