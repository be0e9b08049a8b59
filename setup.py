"""Builds stitchvm_ext._C (always) and stitchvm_ext._cuda (when a matching nvcc is found).

Environment:
  STITCHVM_BUILD_CUDA   0: without CUDA; 1: with CUDA, or fail saying why; auto (default): with CUDA where possible.
  STITCHVM_CUDA_ARCHS   architectures for _cuda, e.g. "80;90". Default: the known ones that nvcc supports.
  CUDA_HOME             the CUDA toolkit. Default: that of nvcc on PATH, then /usr/local/cuda.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup

try:
    import pybind11
    import torch
except ImportError as error:
    raise SystemExit(
        f"stitchvm_ext: the build needs {error.name}, which is not installed. Use `pip install .` (an isolated build "
        "brings its own), or install torch, pybind11 and ninja before `--no-build-isolation`."
    ) from error

ROOT = Path(__file__).resolve().parent
GENERATED = Path("build") / "generated"
TORCH_TARGET = (2, 10)  # the oldest torch that the built libraries run on

# Every compiler flag of the project. No fast-math and no contraction: the CPU kernels give the same bits with every
# instruction set. -fopenmp-simd honours `omp simd`; it links no OpenMP runtime, threads come from torch. -fno-wrapv
# takes back what Python's own flags add: with it, index arithmetic in a loop stays opaque and keeps it scalar.
COMMON_FLAGS = [f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000", "-DNDEBUG"]
FLAGS = {
    "cxx": [
        *COMMON_FLAGS,
        *["-O3", "-fno-wrapv", "-fopenmp-simd", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"],
        *["-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"],
    ],
    "nvcc": [*COMMON_FLAGS, "-O3", "-DUSE_CUDA", "-Xcompiler=-fvisibility=hidden", "-Xfatbin=-compress-all"],
    "link": ["-Wl,-s"],
}

# Architectures of a default build, as far as nvcc knows them. 86 and 89 could run the code of 80; they have less
# shared memory and fewer threads per SM than 80, so the compiler's choices for them differ.
DEFAULT_ARCHS = ["80", "86", "89", "90", "100", "120"]


class CannotBuildCuda(Exception):
    """Why _cuda is not built; the message ends up in the account."""


@dataclass
class CudaPlan:
    root: Path
    nvcc_version: str
    archs: list[str]
    cudart: Path

    def gencode(self) -> list[str]:
        """Machine code for every architecture, and PTX of the last one for GPUs newer than all of them."""
        flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.archs]
        last = self.archs[-1]
        return flags if last[-1].isalpha() else [*flags, f"-gencode=arch=compute_{last},code=compute_{last}"]


def read_version() -> str:
    return re.search(r'__version__ = "(.+?)"', (ROOT / "stitchvm_ext" / "_version.py").read_text()).group(1)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def find_toolkit() -> Path:
    """Root of the CUDA toolkit. nvcc on PATH may be a wrapper script, so the compiler itself is asked where it lies."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            root = Path(os.environ[name])
            if not (root / "bin" / "nvcc").exists():
                raise CannotBuildCuda(f"{name}={root} has no bin/nvcc")
            return root
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        here = re.search(r"_HERE_=(\S+)", run(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull))
        if here is None:
            raise CannotBuildCuda(f"{nvcc} does not say where its toolkit is; set CUDA_HOME")
        return Path(here.group(1)).parent
    if Path("/usr/local/cuda/bin/nvcc").exists():
        return Path("/usr/local/cuda")
    raise CannotBuildCuda("no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda")


def find_cudart(root: Path, major: str) -> Path:
    """The shared runtime to link: torch has loaded the same one (by name and major version) before _cuda is."""
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        for name in ("libcudart.so", f"libcudart.so.{major}"):
            if (root / folder / name).exists():
                return root / folder / name
    raise CannotBuildCuda(f"no libcudart.so under {root}")


def choose_archs(nvcc: Path) -> list[str]:
    known = re.findall(r"compute_(\w+)", run(str(nvcc), "--list-gpu-arch"))
    asked = os.environ.get("STITCHVM_CUDA_ARCHS", "").replace(",", ";")
    archs = [a.strip() for a in asked.split(";") if a.strip()]
    if not archs:
        return [a for a in DEFAULT_ARCHS if a in known]
    unknown = [a for a in archs if a.rstrip("af") not in known]
    if unknown:
        raise SystemExit(f"STITCHVM_CUDA_ARCHS: expected some of {';'.join(known)}, got {';'.join(unknown)}")
    return archs


def plan_cuda() -> CudaPlan:
    if torch.version.cuda is None:
        raise CannotBuildCuda(f"torch {torch.__version__} of the build environment has no CUDA")
    root = find_toolkit()
    nvcc = root / "bin" / "nvcc"
    release = re.search(r"release (\d+)\.(\d+)", run(str(nvcc), "--version"))
    if release is None:
        raise CannotBuildCuda(f"{nvcc} --version names no release")
    major, version = release.group(1), ".".join(release.groups())
    if major != torch.version.cuda.split(".")[0]:
        raise CannotBuildCuda(f"nvcc {version} does not match CUDA {torch.version.cuda} of torch {torch.__version__}")
    if not (root / "include" / "cuda_runtime.h").exists():
        raise CannotBuildCuda(f"no include/cuda_runtime.h under {root}")
    return CudaPlan(root, version, choose_archs(nvcc), find_cudart(root, major))


def decide() -> tuple[CudaPlan | None, str]:
    """The plan for _cuda (None: do not build it) and the one-line account of the decision."""
    setting = os.environ.get("STITCHVM_BUILD_CUDA", "auto")
    if setting not in ("0", "1", "auto"):
        raise SystemExit(f"STITCHVM_BUILD_CUDA: expected 0, 1 or auto, got {setting!r}")
    if setting == "0":
        return None, "CPU only: STITCHVM_BUILD_CUDA=0"
    try:
        plan = plan_cuda()
    except (CannotBuildCuda, OSError, subprocess.CalledProcessError) as error:
        if setting == "1":
            raise SystemExit(f"STITCHVM_BUILD_CUDA=1, but CUDA kernels cannot be built: {error}") from error
        return None, f"CPU only: {error}"
    sms = " ".join(f"sm_{a}" for a in plan.archs)
    return plan, f"CPU and CUDA: nvcc {plan.nvcc_version}, {sms}, for torch with CUDA {plan.nvcc_version.split('.')[0]}"


def write_build_info(plan: CudaPlan | None, account: str) -> None:
    values = {
        "VERSION": read_version(),
        "TORCH": torch.__version__,
        "TARGET": ".".join(map(str, TORCH_TARGET)),
        "NVCC": plan.nvcc_version if plan else "",
        "ARCHS": ";".join(plan.archs) if plan else "",
        "ACCOUNT": account,
    }
    text = "".join(
        '#define STITCHVM_BUILD_{} "{}"\n'.format(key, value.replace("\\", "\\\\").replace('"', '\\"'))
        for key, value in values.items()
    )
    (ROOT / GENERATED).mkdir(parents=True, exist_ok=True)
    header = ROOT / GENERATED / "stitchvm_build_info.h"
    if not header.exists() or header.read_text() != text:
        header.write_text("#pragma once\n" + text)


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in (ROOT / "csrc").glob(pattern))


def make_extensions(plan: CudaPlan | None, include_paths, library_paths) -> list[Extension]:
    """Plain Extensions, not CppExtension: that would also link c10 and torch_python, whose symbols are not stable."""
    extensions = [
        Extension(
            "stitchvm_ext._C",
            sources("*.cpp", "cpu/*.cpp"),
            include_dirs=[str(ROOT / GENERATED), pybind11.get_include(), *include_paths()],
            library_dirs=library_paths(),
            libraries=["torch_cpu"],
            extra_compile_args={"cxx": FLAGS["cxx"]},
            extra_link_args=FLAGS["link"],
            language="c++",
        )
    ]
    if plan is not None:
        extensions.append(
            Extension(
                "stitchvm_ext._cuda",
                sources("cuda/*.cu"),
                include_dirs=include_paths(device_type="cuda"),
                library_dirs=library_paths(),
                libraries=["torch_cpu", "torch_cuda"],
                extra_objects=[str(plan.cudart)],
                extra_compile_args={"cxx": FLAGS["cxx"], "nvcc": [*FLAGS["nvcc"], *plan.gencode()]},
                extra_link_args=FLAGS["link"],
                language="c++",
            )
        )
    return extensions


def main() -> None:
    plan, account = decide()
    print(f"stitchvm_ext: {account}", flush=True)
    if plan is not None:
        os.environ["CUDA_HOME"] = str(plan.root)  # torch.utils.cpp_extension reads it when it is imported
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

    class BuildOps(BuildExtension):
        def build_extensions(self) -> None:
            compiler = self.compiler.compiler_cxx[0]
            if shutil.which(compiler) is None:
                raise SystemExit(
                    f"stitchvm_ext: no C++ compiler: {compiler} is not on PATH. Install g++ or clang, or set CXX; the "
                    "library also runs from the source folder without being built, on its plain PyTorch reference."
                )
            write_build_info(plan, account)
            super().build_extensions()

    setup(ext_modules=make_extensions(plan, include_paths, library_paths), cmdclass={"build_ext": BuildOps})


if __name__ == "__main__":
    main()
