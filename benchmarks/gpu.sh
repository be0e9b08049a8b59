#!/bin/sh
# Everything that needs a GPU, in one command: build, correctness, compute-sanitizer, benchmarks. Made to take about ten
# minutes; bfloat16 only, since that is what one samples in.
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

# step NAME COMMAND...: its output goes to NAME.txt, and is shown when it ends; a failure ends the script.
step() {
    name=$1
    shift
    echo "== $name"
    status=0
    "$@" >"$results/$name.txt" 2>&1 || status=$?
    tail -n 60 "$results/$name.txt"
    [ "$status" -eq 0 ] || exit "$status"
}

STITCHVM_BUILD_CUDA=1 step build "$python" setup.py build_ext --inplace
export PYTHONPATH="$PWD" STITCHVM_RESULTS="$results"
step info "$python" -m stitchvm_ext.cli info
step correctness "$python" -m pytest -m cuda -q tests
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
if [ -x "$sanitizer" ]; then
    for tool in memcheck racecheck; do
        step "$tool" timeout 120 "$sanitizer" --tool "$tool" --error-exitcode 1 "$python" benchmarks/sanitize.py
    done
else
    echo "== compute-sanitizer is not installed: skipped"
fi
step ops "$python" benchmarks/bench_ops.py --device cuda --side 64 --seconds 0.3 --dtypes bfloat16
step value_gradient \
    "$python" benchmarks/bench_value_gradient.py --device cuda --side 64 --dtypes bfloat16 --rounds 20
step denoiser \
    "$python" benchmarks/bench_denoiser.py --device cuda --blocks 24 --side 64 --dtypes bfloat16 --rounds 20
echo "results are in $results"
