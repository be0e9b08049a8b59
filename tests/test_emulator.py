"""The emulator of the CUDA kernels: it finds planted errors, and an error planted into the kernels themselves."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from stitchvm_ext import ops
from stitchvm_ext.ops import _loader
from tests.ops import emulator
from tests.setup_script import load_setup

HERE = emulator.CSRC / "emulator"

PLANTED = {  # kernel of planted.cpp -> what the emulator says about it
    "missing_barrier": r"missing_barrier: the result depends on the thread schedule",
    "uninitialised_shared": r"uninitialised_shared: the result depends on the thread schedule",
    "racing_blocks": r"racing_blocks: the result depends on the thread schedule",
    "barrier_after_return": r"block \(0,0,0\), thread \(0,0,0\): waits at __syncthreads at csrc/emulator/planted.cpp:"
    r"\d+, but thread \(40,0,0\) has returned",
    "divergent_barrier": r"waits at __syncthreads at .*:(\d+), but thread \(40,0,0\) waits at __syncthreads at "
    r".*:(?!\1)\d+",
    "divergent_shuffle": r"waits at __shfl_xor_sync at .*, but thread \(7,0,0\) waits at __shfl_down_sync",
    "shuffle_after_return": r"waits at __shfl_xor_sync at .*reduce.cuh:\d+, but thread \(31,0,0\) has returned",
    "shuffle_and_barrier": r"waits at __shfl_sync at .*, but thread \(33,0,0\) waits at __syncthreads",
    "shuffle_outside_mask": r"__shfl_xor_sync at .*: reads from a lane outside its mask",
    "shuffle_in_half_a_warp": r"thread \(32,0,0\): __shfl_xor_sync at .*: the mask names lane 16 of a warp of 16",
    "different_masks": r"waits at __shfl_sync at .*, but thread \(1,0,0\)",
    "misaligned_vector": r"thread \(8,0,0\): vector access: misaligned address",
    "out_of_bounds": r"out_of_bounds: wrote behind the output",
    "trap": r"block \(1,0,0\), thread \(6,0,0\): __trap at .*: stopped by the kernel",
    "deep_stack": r"needs more than the emulator's \d+ bytes of stack",
    "too_many_threads": r"blocks of \(2048,1,1\) threads cannot be launched",
}


def build(*args, **kwargs) -> Path:
    try:
        return emulator.build(*args, **kwargs)
    except emulator.CannotBuild as reason:
        pytest.skip(f"no emulator: {reason}")


def run(program: Path, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run([str(program), *args], capture_output=True, text=True)


@pytest.fixture(scope="module")
def planted() -> Path:
    return build([HERE / "planted.cpp"], "planted")


def test_every_planted_error_is_tested(planted):
    assert set(run(planted).stdout.split()) == {*PLANTED, "healthy"}


def test_a_healthy_kernel_passes(planted):
    done = run(planted, "healthy")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_found(planted, name):
    done = run(planted, name)
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert re.search("^emulator: .*" + PLANTED[name], done.stdout)


def test_the_portable_context_switch():
    """Processors other than x86-64 switch fibers by ucontext."""
    program = build([HERE / "planted.cpp"], "planted", ["-DSTITCHVM_EMULATOR_UCONTEXT"])
    assert run(program, "healthy").returncode == 0
    assert re.search(PLANTED["trap"], run(program, "trap").stdout)
    assert re.search(PLANTED["divergent_barrier"], run(program, "divergent_barrier").stdout)


def uses_block_sum(driver: Path) -> bool:
    kernels = emulator.CSRC / "cuda" / f"{driver.stem.removeprefix('test_')}.cuh"
    return kernels.exists() and "reduce.cuh" in kernels.read_text()


BARRIERS = (emulator.CSRC / "cuda" / "reduce.cuh").read_text().count("__syncthreads();")
DRIVERS = [driver.stem for driver in sorted(HERE.glob("test_*.cpp")) if uses_block_sum(driver)]


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["planted", *DRIVERS])
@pytest.mark.parametrize("barrier", range(BARRIERS))
def test_every_barrier_of_block_sum_is_needed(driver, barrier, tmp_path):
    """Kernels that are right, real ones among them, fail when one barrier of reduce.cuh is removed."""
    csrc = tmp_path / "csrc"
    shutil.copytree(emulator.CSRC, csrc)
    parts = (csrc / "cuda" / "reduce.cuh").read_text().split("__syncthreads();")
    parts[barrier : barrier + 2] = [parts[barrier] + parts[barrier + 1]]
    (csrc / "cuda" / "reduce.cuh").write_text("__syncthreads();".join(parts))
    program = build([csrc / "emulator" / f"{driver}.cpp"], driver, cache=tmp_path, csrc=csrc)
    done = run(program, *(["healthy"] if driver == "planted" else []))
    assert done.returncode == 1 and "depends on the thread schedule" in done.stdout, (done.stdout, done.stderr)


def test_errors_reach_python(tmp_path):
    """An op whose kernel fails, and one whose result depends on the schedule, raise RuntimeError; later calls work."""
    source = tmp_path / "planted_ops.cu"
    source.write_text(PLANTED_OPS)
    home = Path(torch.__file__).parent
    flags = [*load_setup().COMMON_FLAGS, "-DSTITCHVM_NAMESPACE=stitchvm_planted_once", f"-I{emulator.CSRC}"]
    flags += ["-isystem", str(home / "include"), f"-L{home / 'lib'}", "-ltorch_cpu"]
    emulator.load_ops(build([source], "planted_ops.so", flags, cache=tmp_path), "stitchvm_planted")
    planted = torch.ops.stitchvm_planted
    x = torch.arange(64.0)
    for _ in range(2):
        assert torch.equal(planted.reverse_(x.clone(), True), x.flip(0))
        with pytest.raises(RuntimeError, match=r"result 0 is not the same .* a barrier is missing"):
            planted.reverse_(x.clone(), False)
        with pytest.raises(
            RuntimeError, match=r"emulator: reverse<false>: block \(0,0,0\), thread \(0,0,0\): waits at"
        ):
            planted.reverse_(x[:40].clone(), False)


PLANTED_OPS = """
#include "args/args.h"
#include "cuda/launch.cuh"

namespace stitchvm {

struct ReverseParams {
  float* x;  // in place
  int n;
};

template <bool kBarrier>
__global__ void reverse(const ReverseParams p) {
  __shared__ float row[64];
  row[threadIdx.x] = p.x[threadIdx.x];
  if (kBarrier || (p.n < 64 && threadIdx.x < 32)) __syncthreads();
  p.x[threadIdx.x] = row[p.n - 1 - threadIdx.x];
}

Tensor reverse_op(Tensor x, bool barrier) {
  const ReverseParams p = {mutable_data<float>(x), static_cast<int>(x.numel())};
  launch(barrier ? reverse<true> : reverse<false>, dim3(1), dim3(static_cast<unsigned>(p.n)), x, p);
  return x;
}

}  // namespace stitchvm

#define DEFINE(ns, m) STABLE_TORCH_LIBRARY(ns, m)
DEFINE(STITCHVM_NAMESPACE, m) { m.def("reverse_(Tensor(a!) x, bool barrier) -> Tensor(a!)"); }
STITCHVM_DEVICE_IMPL(m) { m.impl("reverse_", TORCH_BOX(&stitchvm::reverse_op)); }
"""


def test_the_emulated_ops_are_checked_like_the_others():
    emulator.load_or_skip()
    assert "emulated" not in _loader.BACKENDS and "emulated" not in str(ops.info()["ops"])
    x = torch.zeros(1, 4, 8)
    for bad, error in ((x.double(), TypeError), (x.to("meta"), ValueError)):
        with pytest.raises(error, match="backend 'emulated' cannot be used"):
            ops.resample_tokens(bad, (2, 2), (1, 1), backend="emulated")
    assert ops.resample_tokens(x, (2, 2), (1, 1), backend="emulated").shape == (1, 1, 8)
