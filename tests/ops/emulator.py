"""The CUDA kernels as ops on CPU tensors: builds the emulator's library (csrc/emulator) and defines its ops.

The library is compiled when a test first asks for it and kept in build/emulator, under a hash of everything that goes
into it. It registers every op under `stitchvm_emulated_once`. What the tests call is `stitchvm_emulated`: the same ops,
each run under every thread schedule, with results that must agree to the bit.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stitchvm_ext.ops import _info, _loader
from tests.setup_script import ROOT, load_setup

CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "emulator"
ONCE = "_once"
SCHEDULES = ("forward", "reverse", "shuffled")  # csrc/emulator/emulator.h

# No optimisation beyond -O1: compiling takes longer than running the tests.
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-DSTITCHVM_EMULATE"]

_keep: list[torch.library.Library] = []  # ops defined in Python live as long as their Library


class CannotBuild(Exception):
    """Why there is no emulator here."""


def compiler() -> str:
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise CannotBuild(f"no C++ compiler: {name} is not on PATH")
    return name


def cuda_headers() -> Path:
    """The CUDA toolkit's headers, or those of the nvidia packages, where they are complete."""
    setup = load_setup()
    try:
        folders = [setup.find_toolkit() / "include"]
    except (setup.CannotBuildCuda, OSError, subprocess.CalledProcessError):
        folders = []
    folders += sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/include"))
    for folder in folders:
        if all((folder / name).exists() for name in ("cuda_bf16.h", "crt/host_defines.h", "nv/target")):
            return folder
    raise CannotBuild("no CUDA headers: neither nvcc nor a complete set of the nvidia packages is installed")


def build(
    sources: Iterable[Path], output: str, flags: Iterable[str] = (), cache: Path = CACHE, csrc: Path = CSRC
) -> Path:
    """Compiles and links sources that may include csrc/cuda/*.cuh, two at a time; returns the path of the result.

    Args:
        sources: C++ and CUDA files; csrc/emulator/{emulator,fiber}.cpp are added.
        output: the file's name; "x.so" gives a library, "x" an executable. The result lies in a folder per hash of
            the flags, the compiler, the sources and all that they may include.
        flags: further flags, for compiling and linking.
        cache: where that folder lies.
        csrc: the folder of the emulator and the kernels; a test that edits them has a copy.

    Raises:
        CannotBuild: no compiler or no CUDA headers.
        RuntimeError: the compiler's messages.
    """
    cxx, headers = compiler(), cuda_headers()
    sources = [*sources, csrc / "emulator" / "emulator.cpp", csrc / "emulator" / "fiber.cpp"]
    flags = [*FLAGS, f"-fmacro-prefix-map={csrc.parent}/=", "-isystem", str(headers), *flags]
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True).stdout
    if "clang" not in version:  # g++ would let two libraries share the shared memory of kernels of the same name
        flags.append("-fno-gnu-unique")
    digest = hashlib.sha256("\n".join([*flags, version, torch.__version__]).encode())
    headers_too = (p for part in ("args", "common", "cuda", "emulator") for p in (csrc / part).iterdir())
    for path in sorted({*sources, *headers_too}):
        digest.update(str(path).encode() + path.read_bytes())
    folder = cache / digest.hexdigest()[:16]
    if (folder / output).exists():
        return folder / output

    def run(command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")

    def compile_one(source: Path) -> str:
        language = ["-include", str(csrc / "emulator" / "device.h")] if source.parent != csrc / "emulator" else []
        target = str(partial / f"{source.name}.o")
        run([cxx, *flags, *language, "-x", "c++", "-c", str(source), "-o", target])
        return target

    partial = cache / f"{folder.name}-{os.getpid()}"  # so that an interrupted or a parallel build leaves no half files
    partial.mkdir(parents=True, exist_ok=True)
    try:
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_one, sources))
        kind = ["-shared", "-Wl,-Bsymbolic"] if output.endswith(".so") else ["-rdynamic"]
        run([cxx, *objects, *kind, *flags, "-ldl", "-o", str(partial / output)])
        folder.mkdir(parents=True, exist_ok=True)
        os.replace(partial / output, folder / output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder / output


def build_ops() -> Path:
    """The library with every op of csrc/cuda."""
    home = Path(torch.__file__).parent
    flags = [*load_setup().COMMON_FLAGS, f"-DSTITCHVM_NAMESPACE={_loader.EMULATED}{ONCE}"]
    flags += ["-isystem", str(home / "include"), f"-L{home / 'lib'}", "-ltorch_cpu"]
    return build([CSRC / "schema.cpp", *sorted((CSRC / "cuda").glob("*.cu"))], "ops.so", flags)


def load_ops(path: Path, namespace: str) -> None:
    """Loads a library of ops of `<namespace>_once` and defines them in `namespace`, under every schedule."""
    torch.ops.load_library(str(path))
    set_schedule = ctypes.CDLL(str(path)).stitchvm_emulator_set_schedule
    library = torch.library.Library(namespace, "DEF")
    _keep.append(library)
    for qualified in torch._C._dispatch_get_all_op_names():
        space, _, name = qualified.partition("::")
        if space == namespace + ONCE:
            packet, _, overload = name.partition(".")
            once = getattr(getattr(getattr(torch.ops, space), packet), overload or "default")
            library.define(str(once._schema).removeprefix(f"{space}::"))
            library.impl(name, under_every_schedule(once, set_schedule), "CPU")


@functools.cache
def load() -> Exception | None:
    """Makes backend="emulated" usable, or returns why it is not: CannotBuild, or kernels that do not compile."""
    try:
        path = build_ops()
    except (CannotBuild, RuntimeError) as reason:
        return reason
    load_ops(path, _loader.EMULATED)
    for op in _info.OPS:
        importlib.import_module(f"stitchvm_ext.ops.{op}").register(_loader.EMULATED)
    _loader.allow_emulated(str(path))
    return None


def load_or_skip() -> None:
    """Makes backend="emulated" usable, skips the test where that is not possible, and fails where it should be."""
    problem = load()
    if isinstance(problem, CannotBuild):
        pytest.skip(f"no emulator: {problem}")
    if problem is not None:
        raise problem


def under_every_schedule(op: torch._ops.OpOverload, set_schedule: Callable[[int], None]) -> Callable:
    """`op`, run once under each schedule; RuntimeError where two of them give other bits."""
    arguments = op._schema.arguments
    writes = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}

    def run(*args, **kwargs):
        named = {a.name: value for a, value in zip(arguments, args, strict=False)} | kwargs
        written = [t for name, t in named.items() if name in writes and t is not None]
        before = [t.clone() for t in written]
        first: list[Tensor] = []
        for i, schedule in enumerate(SCHEDULES):
            for t, old in zip(written, before, strict=True):
                t.copy_(old)
            set_schedule(i)
            results = op(*args, **kwargs)
            returned = results if isinstance(results, tuple) else () if results is None else (results,)
            tensors = [*written, *returned]
            first = first or [t.clone() for t in tensors]
            for k, (a, b) in enumerate(zip(first, tensors, strict=True)):
                if not torch.equal(bits(a), bits(b)):
                    raise RuntimeError(
                        f"{op}: result {k} is not the same under the schedules {SCHEDULES[0]} and {schedule}: a "
                        "barrier is missing, or shared memory is read before it is written"
                    )
        return results

    return run


def bits(t: Tensor) -> Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)
