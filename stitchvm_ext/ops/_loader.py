"""Loads the compiled libraries, records why one is not loaded, and chooses the backend of a call."""

from __future__ import annotations

import importlib
import importlib.machinery
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("reference", "cpu", "cuda")
NAMESPACE = "stitchvm"
EMULATED = "stitchvm_emulated"
ADVICE = "run `pip install .` in the source folder to build it"


@dataclass(frozen=True)
class Library:
    """One compiled library: `reason` is empty when it is loaded, and says why not otherwise."""

    name: str
    loaded: bool
    reason: str = ""
    path: str = ""


def _find(name: str) -> Path | None:
    package = Path(__file__).resolve().parent.parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        if (package / f"{name}{suffix}").exists():
            return package / f"{name}{suffix}"
    return None


def _load_c() -> tuple[ModuleType | None, Library]:
    path = _find("_C")
    if path is None:
        return None, Library("_C", False, f"not in this installation; {ADVICE}")
    try:
        module = importlib.import_module("stitchvm_ext._C")
    except ImportError as error:
        reason = f"torch {torch.__version__} cannot load it (built for torch 2.10 or newer): {error}"
        return None, Library("_C", False, reason, str(path))
    return module, Library("_C", True, path=str(path))


def _load_cuda(build: dict[str, str] | None) -> Library:
    if build is None:
        return Library("_cuda", False, "needs _C, which is not loaded")
    path = _find("_cuda")
    if path is None:
        return Library("_cuda", False, f"not built ({build['account']})")
    if torch.version.cuda is None:
        return Library("_cuda", False, f"torch {torch.__version__} is built without CUDA", str(path))
    if torch.version.cuda.split(".")[0] != build["nvcc"].split(".")[0]:
        reason = f"built with CUDA {build['nvcc']}, torch {torch.__version__} uses CUDA {torch.version.cuda}"
        return Library("_cuda", False, reason, str(path))
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Library("_cuda", False, f"torch {torch.__version__} cannot load it: {error}", str(path))
    return Library("_cuda", True, path=str(path))


C, library_c = _load_c()
BUILD: dict[str, str] | None = C.build_info() if C is not None else None
library_cuda = _load_cuda(BUILD)
HAS_OPS = C is not None  # torch.ops.stitchvm exists
library_emulated = Library("emulator", False, "it is built and loaded by the tests alone")


def allow_emulated(path: str) -> None:
    """From here on, backend="emulated" runs the CUDA kernels on CPU tensors: the tests have defined its ops."""
    global library_emulated
    library_emulated = Library("emulator", True, path=path)


def op(name: str, backend: str) -> Any:
    """The compiled op of a chosen backend. The emulator (csrc/emulator) has a namespace of its own."""
    return getattr(getattr(torch.ops, EMULATED if backend == "emulated" else NAMESPACE), name)


def dtype_names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def _runs_on(capability: tuple[int, int]) -> bool:
    """Whether _cuda has code for a GPU: machine code of its major version, or PTX of an older architecture."""
    archs = [(int(a.rstrip("af")[:-1]), int(a.rstrip("af")[-1])) for a in BUILD["cuda_archs"].split(";")]
    same_major = any(major == capability[0] and minor <= capability[1] for major, minor in archs)
    has_ptx = not BUILD["cuda_archs"][-1].isalpha()
    return same_major or (has_ptx and archs[-1] <= capability)


def _requirements(
    backend: str, kernels: dict[str, tuple[torch.dtype, ...]]
) -> tuple[Library, str, tuple[torch.dtype, ...]]:
    """The library, the type of device and the dtypes that a compiled backend needs."""
    if backend == "emulated":
        return library_emulated, "cpu", kernels["cuda"]
    return (library_c if backend == "cpu" else library_cuda), backend, kernels[backend]


def why_not(backend: str, device: torch.device, dtype: torch.dtype, kernels: dict[str, tuple[torch.dtype, ...]]) -> str:
    """Why `backend` cannot run on tensors of this device and dtype; empty when it can."""
    library, device_type, dtypes = _requirements(backend, kernels)
    if not library.loaded:
        return f"{library.name} is not loaded: {library.reason}"
    if device.type != device_type:
        return f"it takes {device_type} tensors, got {device}"
    if dtype not in dtypes:
        return f"it takes {dtype_names(dtypes)}, got {dtype_names((dtype,))}"
    if backend == "cuda" and not _runs_on(torch.cuda.get_device_capability(device)):
        return f"built for sm {BUILD['cuda_archs']}, not for {torch.cuda.get_device_name(device)}"
    return ""


def choose_backend(op: str, x: Tensor, backend: str | None, kernels: dict[str, tuple[torch.dtype, ...]]) -> str:
    """The backend that a call uses.

    With `backend=None`, the compiled kernel for the device and dtype of `x` where there is one, else the reference.
    A backend that is named is used or refused, never replaced.

    Raises:
        ValueError: `backend` is no known name, or takes tensors of another device.
        TypeError: `backend` has no kernel for the dtype of `x`.
        RuntimeError: `backend` is not loaded here, or has no code for this GPU.
    """
    if backend is None:
        kind = x.device.type
        return kind if kind in kernels and not why_not(kind, x.device, x.dtype, kernels) else "reference"
    if backend not in BACKENDS and not (backend == "emulated" and library_emulated.loaded):
        raise ValueError(f"{op}: backend: expected None or one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "reference":
        return backend
    reason = why_not(backend, x.device, x.dtype, kernels)
    if reason:
        library, device_type, dtypes = _requirements(backend, kernels)
        error: Any = RuntimeError
        if library.loaded and x.device.type != device_type:
            error = ValueError
        elif library.loaded and x.dtype not in dtypes:
            error = TypeError
        raise error(f"{op}: backend {backend!r} cannot be used: {reason}")
    return backend
