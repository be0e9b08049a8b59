"""Fixtures of the op tests."""

from __future__ import annotations

import pytest
import torch

from stitchvm_ext.ops import _loader
from tests.ops import emulator
from tests.ops.op_helpers import KERNEL_BACKENDS, C


@pytest.fixture
def use_backend(monkeypatch):
    """A function that makes a backend of op_helpers usable and returns the name that the ops take.

    It skips where there is no CUDA device, and where the emulator cannot be built. For "emulated", torch.ops.stitchvm
    is the emulator's namespace too. A CPU level and the namespace are restored when the test ends.
    """

    def use(backend: str) -> str:
        if backend == "cuda":
            if not _loader.library_cuda.loaded:
                pytest.skip(_loader.library_cuda.reason)
            if not torch.cuda.is_available():
                pytest.skip("no CUDA device")
        if backend == "emulated":
            emulator.load_or_skip()
            monkeypatch.setattr(torch.ops, _loader.NAMESPACE, getattr(torch.ops, _loader.EMULATED))
        if backend.startswith("cpu-"):
            C.set_cpu_level(backend.removeprefix("cpu-"))
            return "cpu"
        return backend

    yield use
    if C is not None:
        C.set_cpu_level(C.detected_cpu_level())


def pytest_generate_tests(metafunc):
    """`kernel` runs over the compiled backends, `backend` over these and the reference; "cuda" carries its marker."""
    for argument, names in (("kernel", KERNEL_BACKENDS), ("backend", ["reference", *KERNEL_BACKENDS])):
        if argument in metafunc.fixturenames:
            params = [pytest.param(n, marks=pytest.mark.cuda) if n == "cuda" else n for n in names]
            metafunc.parametrize(argument, params)
