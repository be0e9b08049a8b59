"""The build: its decisions, the ABI of what it makes, loading without it, and the resources of the CUDA kernels."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stitchvm_ext import ops
from stitchvm_ext._version import __version__
from stitchvm_ext.ops import _loader

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = [lib for lib in (_loader.library_c, _loader.library_cuda) if lib.path]


@pytest.fixture
def build(monkeypatch):
    """setup.py as a module (it builds only when run), in an environment without the build's settings."""
    for name in ("STITCHVM_BUILD_CUDA", "STITCHVM_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    pytest.importorskip("pybind11")
    spec = importlib.util.spec_from_file_location("stitchvm_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def fake_nvcc(folder: Path, release: str) -> Path:
    """A toolkit whose nvcc answers the build's questions, and has what the build looks for."""
    for name in ("bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart.so"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        f"  --version) echo 'Cuda compilation tools, release {release}, V{release}.1';;\n"
        "  --list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\n';;\n"
        f"  --dryrun) echo '#$ _HERE_={folder}/bin' >&2;;\n"
        "esac\n"
    )
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    return nvcc


def test_the_compiled_library_is_loaded():
    assert _loader.library_c.loaded, f"{_loader.library_c.reason}; the tests are about the compiled library too"
    assert ops.info()["build"]["version"] == __version__


def test_cuda_off(build, monkeypatch):
    monkeypatch.setenv("STITCHVM_BUILD_CUDA", "0")
    assert build.decide() == (None, "CPU only: STITCHVM_BUILD_CUDA=0")


def test_unknown_setting(build, monkeypatch):
    monkeypatch.setenv("STITCHVM_BUILD_CUDA", "yes")
    with pytest.raises(SystemExit, match="expected 0, 1 or auto, got 'yes'"):
        build.decide()


def test_cuda_impossible(build, monkeypatch, tmp_path):
    """auto builds without CUDA and says why; 1 stops with the same reason."""
    monkeypatch.setattr(torch.version, "cuda", None)
    plan, account = build.decide()
    assert plan is None and re.match(r"CPU only: torch .* has no CUDA", account)
    monkeypatch.setenv("STITCHVM_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="cannot be built: torch .* has no CUDA"):
        build.decide()


def test_nvcc_of_another_major(build, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path, "12.9").parent.parent))
    assert build.decide() == (None, f"CPU only: nvcc 12.9 does not match CUDA 13.2 of torch {torch.__version__}")


def test_toolkit_is_found_through_a_wrapper(build, monkeypatch, tmp_path):
    """nvcc on PATH is a script elsewhere: the toolkit is where the compiler says, not beside the script."""
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    nvcc = fake_nvcc(tmp_path / "toolkit", "13.0")
    wrapper = tmp_path / "wrappers" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}")
    plan, account = build.decide()
    assert plan.root == tmp_path / "toolkit"
    assert account == "CPU and CUDA: nvcc 13.0, sm_80 sm_90, for torch with CUDA 13"
    assert plan.gencode()[-1] == "-gencode=arch=compute_90,code=compute_90"


def test_chosen_archs(build, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path, "13.0").parent.parent))
    monkeypatch.setenv("STITCHVM_CUDA_ARCHS", "75; 90a")
    plan, _ = build.decide()
    assert plan.archs == ["75", "90a"]
    assert plan.gencode() == ["-gencode=arch=compute_75,code=sm_75", "-gencode=arch=compute_90a,code=sm_90a"]
    monkeypatch.setenv("STITCHVM_CUDA_ARCHS", "80;61")
    with pytest.raises(SystemExit, match="expected some of 75;80;90, got 61"):
        build.decide()


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda lib: lib.name)
def test_only_stable_symbols(library):
    """No C++ symbol of torch is needed, so that one file serves many versions of it."""
    command = ["nm", "-D", "--undefined-only", "--demangle", library.path]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "aoti_torch_library_init_impl" in names  # the list is the right one
    assert not re.findall(r".*\b(?:at|c10|torch|caffe2)::.*", names)


def test_runs_without_the_compiled_library(tmp_path):
    """A source tree that was never built imports, computes on the reference and says so."""
    ignore = shutil.ignore_patterns("*.so", "weights", "__pycache__")
    shutil.copytree(Path(ops.__file__).parent.parent, tmp_path / "stitchvm_ext", ignore=ignore)
    script = (
        "import torch, stitchvm_ext; from stitchvm_ext import ops\n"
        f"assert stitchvm_ext.__file__.startswith({str(tmp_path)!r})\n"
        "x = torch.randn(2, 6, 8, requires_grad=True); s = torch.randn(2, 8)\n"
        "ops.resample_tokens(ops.adaln(x, s, s), (2, 3), (4, 4)).sum().backward(); assert x.grad.isfinite().all()\n"
        "try: ops.adaln(x, s, s, backend='cpu')\n"
        "except RuntimeError as error: print(error)\n"
        "state = ops.info(); assert state['build'] is None and not state['libraries']['_C']['loaded']\n"
        "print(ops.format_info(state))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "adaln: backend 'cpu' cannot be used: _C is not loaded: not in this installation" in done.stdout
    assert "every op runs on the plain PyTorch reference" in done.stdout
    assert "no: _C is not loaded" in done.stdout


def test_info_names_every_op_and_backend():
    state = ops.info()
    text = ops.format_info(state)
    named = {name.removesuffix("_input_grad") for name in ops.__all__} - {"info", "format_info"}
    assert set(state["ops"]) == named
    for row in state["ops"].values():
        assert list(row) == list(_loader.BACKENDS)
    assert state["build"]["account"] in text
    for library in state["libraries"].values():
        assert library["loaded"] or library["reason"] in text


def test_the_table_of_kernels_is_true():
    """Every op and its gradient are registered for the devices that the table claims."""
    for op in ops.info()["ops"]:
        names = [op, f"{op}.out"]
        if op != "guidance_step":  # it has no gradient
            names += [f"{op}_input_grad", f"{op}_input_grad.out"]
        for name in names:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"stitchvm::{name}", "CPU")
            cuda = torch._C._dispatch_has_kernel_for_dispatch_key(f"stitchvm::{name}", "CUDA")
            assert cuda == _loader.library_cuda.loaded


def test_cuda_is_skipped_under_cpu_torch(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(_loader, "_find", lambda name: Path("_cuda.so"))
    library = _loader._load_cuda({"nvcc": "13.0", "account": ""})
    assert not library.loaded and "is built without CUDA" in library.reason
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    library = _loader._load_cuda({"nvcc": "13.0", "account": ""})
    assert not library.loaded and "uses CUDA 12.8" in library.reason
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    library = _loader._load_cuda({"nvcc": "13.0", "account": ""})
    assert not library.loaded and "cannot load it" in library.reason


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("arch", ["80", "90"])
def test_cuda_kernels_do_not_spill(build, arch, tmp_path):
    """Every kernel template, in every element type and vector width, compiles without spilling a register."""
    headers = sorted((ROOT / "csrc" / "cuda").glob("*.cuh"))
    lines = ["#include <cuda_runtime.h>", *(f'#include "{h}"' for h in headers if h.name != "launch.cuh")]
    lines.append("namespace stitchvm {")
    pattern = r"__global__ void __launch_bounds__\(\w+\) (\w+)\(const (\w+)<T> p\)"
    kernels = [kernel for header in headers for kernel in re.findall(pattern, header.read_text())]
    assert len(kernels) == sum(header.read_text().count("__global__") for header in headers) > 0
    for kernel, params in kernels:
        for dtype, wide in (("float", 4), ("__half", 8), ("__nv_bfloat16", 8)):
            lines += [f"template __global__ void {kernel}<{dtype}, {vec}>({params}<{dtype}>);" for vec in (1, wide)]
    unit = tmp_path / "unit.cu"
    unit.write_text("\n".join([*lines, "}"]))
    flags = [f for f in build.FLAGS["nvcc"] if "TORCH" not in f]
    output = ["-o", str(tmp_path / "unit.cubin")]
    command = ["nvcc", *flags, "-std=c++17", f"-arch=sm_{arch}", "-cubin", "-Xptxas=-v", *output, str(unit)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(spills) == 6 * len(kernels)
    assert set(spills) == {("0", "0")}, done.stderr
