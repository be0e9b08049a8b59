// activation kernels: one vector of elements per thread. No torch headers.
#pragma once

#include "../common/activation.h"
#include "types.cuh"

namespace stitchvm {

constexpr int kActivationThreads = 256;

// The functions that common/activation.h asks for, from the CUDA library.
struct DeviceMath {
  float high;

  __device__ __forceinline__ float clamp(float t) const { return t < -127.0f ? -127.0f : (t > high ? high : t); }
  __device__ __forceinline__ float exp2(float t) const { return exp2f(t); }
  __device__ __forceinline__ float gelu(float x) const { return x * (0.5f + 0.5f * erff(0.707106781f * x)); }
  __device__ __forceinline__ float gelu_slope(float x) const {
    return 0.5f + 0.5f * erff(0.707106781f * x) + 0.398942280f * x * expf(-0.5f * x * x);
  }
};

// The kind is the same for all threads: one kernel holds them all.
template <int kVec>
__device__ __forceinline__ void activation_values(Activation kind, const float (&x)[kVec], float (&y)[kVec]) {
  const DeviceMath math{128.0f};
  switch (kind) {
    case Activation::kGelu:
#pragma unroll
      for (int i = 0; i < kVec; ++i) y[i] = activation_value<Activation::kGelu>(x[i], math);
      break;
    case Activation::kGeluTanh:
#pragma unroll
      for (int i = 0; i < kVec; ++i) y[i] = activation_value<Activation::kGeluTanh>(x[i], math);
      break;
    case Activation::kQuickGelu:
#pragma unroll
      for (int i = 0; i < kVec; ++i) y[i] = activation_value<Activation::kQuickGelu>(x[i], math);
      break;
    case Activation::kSilu:
#pragma unroll
      for (int i = 0; i < kVec; ++i) y[i] = activation_value<Activation::kSilu>(x[i], math);
      break;
  }
}

template <int kVec>
__device__ __forceinline__ void activation_slopes(Activation kind, const float (&x)[kVec], float (&slope)[kVec]) {
  const DeviceMath math{127.0f};
  switch (kind) {
    case Activation::kGelu:
#pragma unroll
      for (int i = 0; i < kVec; ++i) slope[i] = activation_slope<Activation::kGelu>(x[i], math);
      break;
    case Activation::kGeluTanh:
#pragma unroll
      for (int i = 0; i < kVec; ++i) slope[i] = activation_slope<Activation::kGeluTanh>(x[i], math);
      break;
    case Activation::kQuickGelu:
#pragma unroll
      for (int i = 0; i < kVec; ++i) slope[i] = activation_slope<Activation::kQuickGelu>(x[i], math);
      break;
    case Activation::kSilu:
#pragma unroll
      for (int i = 0; i < kVec; ++i) slope[i] = activation_slope<Activation::kSilu>(x[i], math);
      break;
  }
}

// x + bias for the vector that starts at element `first`.
template <int kVec, class T>
__device__ __forceinline__ void load_biased(const T* x, const T* bias, int64_t first, int64_t channels,
                                            float (&out)[kVec]) {
  load<kVec>(x + first, out);
  if (bias == nullptr) return;
  float b[kVec];
  load<kVec>(bias + first % channels, b);
#pragma unroll
  for (int i = 0; i < kVec; ++i) out[i] += b[i];
}

// grid: enough blocks of kActivationThreads for size / kVec vectors. kVec > 1 needs all pointers aligned to kVec
// elements, size % kVec == 0 and, with a bias, channels % kVec == 0.
template <class T, int kVec>
__global__ void __launch_bounds__(kActivationThreads) activation_forward(const ActivationParams<T> p) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kActivationThreads + threadIdx.x) * kVec;
  if (first >= p.size) return;
  float x[kVec], y[kVec];
  load_biased<kVec>(p.x, p.bias, first, p.channels, x);
  activation_values<kVec>(p.kind, x, y);
  store<kVec>(p.y + first, y);
}

// The same launch rules as activation_forward.
template <class T, int kVec>
__global__ void __launch_bounds__(kActivationThreads) activation_backward(const ActivationGradParams<T> p) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kActivationThreads + threadIdx.x) * kVec;
  if (first >= p.size) return;
  float x[kVec], grad[kVec], slope[kVec];
  load_biased<kVec>(p.x, p.bias, first, p.channels, x);
  load<kVec>(p.grad + first, grad);
  activation_slopes<kVec>(p.kind, x, slope);
#pragma unroll
  for (int i = 0; i < kVec; ++i) grad[i] *= slope[i];
  store<kVec>(p.grad_x + first, grad);
}

}  // namespace stitchvm
