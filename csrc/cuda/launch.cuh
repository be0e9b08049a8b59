// What every CUDA op does after its checks: choose the element type and the vector width, and launch.
#pragma once

#ifndef STITCHVM_EMULATE
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "types.cuh"

namespace stitchvm {

// Calls f(T{}) with the kernel type of `dtype`.
template <class F>
void dispatch_cuda_dtype(const char* op, torch::headeronly::ScalarType dtype, F&& f) {
  switch (dtype) {
    case torch::headeronly::ScalarType::Float:
      return f(float{});
    case torch::headeronly::ScalarType::Half:
      return f(__half{});
    case torch::headeronly::ScalarType::BFloat16:
      return f(__nv_bfloat16{});
    default:
      STD_TORCH_CHECK(false, op, ": the CUDA kernel takes float32, float16 or bfloat16");
  }
}

// Calls f(width) with width a std::integral_constant: 16 bytes of T where every pointer and every row stride (in
// elements) allows it, one element otherwise.
template <class T, class F>
void dispatch_vector_width(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> strides, F&& f) {
  bool wide = true;
  for (const void* p : pointers) wide = wide && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  for (const int64_t s : strides) wide = wide && s % kWide<T> == 0;
  if (wide) {
    f(std::integral_constant<int, kWide<T>>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

#ifndef STITCHVM_EMULATE

using DeviceGuard = torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(const torch::stable::Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Launches a kernel that takes one params struct, on the current stream of t's device.
template <class Kernel, class Params>
void launch(Kernel kernel, dim3 grid, dim3 block, const torch::stable::Tensor& t, const Params& params) {
  kernel<<<grid, block, 0, current_stream(t)>>>(params);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Where the kernels of cuda/*.cu are registered.
#define STITCHVM_DEVICE_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(stitchvm, CUDA, m)

#else  // the emulator (csrc/emulator) runs the same kernels on CPU tensors

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

template <class Kernel, class Params>
void launch(Kernel kernel, dim3 grid, dim3 block, const torch::stable::Tensor&, const Params& params) {
  emulator::run(kernel, grid, block, params);
}

#define STITCHVM_EMULATED_IMPL(ns, m) STABLE_TORCH_LIBRARY_IMPL(ns, CPU, m)
#define STITCHVM_DEVICE_IMPL(m) STITCHVM_EMULATED_IMPL(STITCHVM_NAMESPACE, m)

#endif

inline void check_grid(const char* op, int64_t blocks) {
  STD_TORCH_CHECK(blocks <= INT32_MAX, op, ": too many rows for one launch: ", blocks);
}

}  // namespace stitchvm
