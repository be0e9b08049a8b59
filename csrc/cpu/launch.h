// What every CPU op does after its checks: choose the element type, then run the kernel over rows on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>

#include "simd.h"
#include "types.h"

namespace stitchvm {

// Calls f(T{}) with the kernel type of `dtype`.
template <class F>
void dispatch_cpu_dtype(const char* op, torch::headeronly::ScalarType dtype, F&& f) {
  switch (dtype) {
    case torch::headeronly::ScalarType::Float:
      return f(float{});
    case torch::headeronly::ScalarType::Double:
      return f(double{});
    case torch::headeronly::ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      STD_TORCH_CHECK(false, op, ": the CPU kernel takes float32, float64 or bfloat16");
  }
}

// Runs Kernel over [0, rows). The grain keeps a thread's share above the cost of waking it.
template <class Kernel, class Params>
void parallel_rows(const Params& params, int64_t rows, int64_t elements_per_row) {
  if (rows == 0 || elements_per_row == 0) return;
  constexpr int64_t kGrainElements = 32768;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / elements_per_row);
  const auto kernel = pick_kernel<Kernel, Params>();
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

}  // namespace stitchvm
