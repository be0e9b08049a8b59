#!/bin/sh
# Everything that needs a GPU, in one command of about ten minutes: build, correctness, compute-sanitizer, benchmarks.
#
#     benchmarks/gpu.sh [RESULTS]
#
# Needs a CUDA toolkit, and a PyTorch with CUDA of the same major version. Logs and JSON go to RESULTS, by default
# benchmarks/results/gpu. Stops at the first step that fails; the GPU's settings are left as they are.
set -eu
cd "$(dirname "$0")/.."
results=$(realpath -m "${1:-benchmarks/results/gpu}")
mkdir -p "$results"
python=${PYTHON:-python3}

echo "== build"
STITCHVM_BUILD_CUDA=1 "$python" setup.py build_ext --inplace >"$results/build.log" 2>&1
export PYTHONPATH="$PWD"
"$python" -m stitchvm_ext.cli info | tee "$results/info.txt"

echo "== correctness"
"$python" -m pytest -m cuda -q tests | tee "$results/pytest.txt"

echo "== compute-sanitizer"
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
if [ -x "$sanitizer" ]; then
    for tool in memcheck racecheck; do
        timeout 120 "$sanitizer" --tool "$tool" --error-exitcode 1 \
            "$python" benchmarks/sanitize.py >"$results/$tool.txt" 2>&1
        tail -n 1 "$results/$tool.txt"
    done
else
    echo "not installed: skipped"
fi

echo "== benchmarks"
export STITCHVM_RESULTS="$results"
"$python" benchmarks/bench_ops.py --device cuda --side 64 --seconds 0.3 | tee "$results/ops.txt"
"$python" benchmarks/bench_value_gradient.py --device cuda --side 64 --dtypes bfloat16 --rounds 20 |
    tee "$results/value_gradient.txt"
"$python" benchmarks/bench_denoiser.py --device cuda --blocks 24 --side 64 --dtypes bfloat16 --rounds 20 |
    tee "$results/denoiser.txt"
echo "results are in $results"
