// adaln kernels: one block per row. A row is at most a few tens of kilobytes, so the second and third pass over it are
// served by L1/L2 and device memory sees one read and one write. No torch headers.
#pragma once

#include "../common/adaln.h"
#include "reduce.cuh"
#include "types.cuh"

namespace stitchvm {

constexpr int kAdalnMaxThreads = 256;

struct AdalnStats {
  float mean;
  float rstd;
};

template <int kVec, class T>
__device__ __forceinline__ AdalnStats adaln_stats(const T* x, int channels, float eps, float* scratch) {
  const int start = static_cast<int>(threadIdx.x) * kVec;
  const int stride = static_cast<int>(blockDim.x) * kVec;
  float v[kVec];
  float sum = 0.0f;
  for (int c = start; c < channels; c += stride) {
    load<kVec>(x + c, v);
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum += v[i];
  }
  const float mean = block_sum(sum, scratch) / static_cast<float>(channels);
  // Squares of deviations, not E[x^2] - mean^2: activations of diffusion transformers have large outlier channels.
  float square = 0.0f;
  for (int c = start; c < channels; c += stride) {
    load<kVec>(x + c, v);
#pragma unroll
    for (int i = 0; i < kVec; ++i) square += (v[i] - mean) * (v[i] - mean);
  }
  const float variance = block_sum(square, scratch) / static_cast<float>(channels);
  return {mean, 1.0f / sqrtf(variance + eps)};
}

// grid: p.rows blocks. kVec > 1 needs every row of every tensor aligned to kVec elements and channels % kVec == 0.
template <class T, int kVec>
__global__ void __launch_bounds__(kAdalnMaxThreads) adaln_forward(const AdalnParams<T> p) {
  __shared__ float scratch[32];
  const int64_t row = blockIdx.x;
  const int64_t sample = row / p.rows_per_sample;
  const int channels = static_cast<int>(p.channels);
  const T* x = p.x + row * p.channels;
  const T* scale = p.scale + sample * p.scale_stride;
  const T* shift = p.shift + sample * p.shift_stride;
  T* y = p.y + row * p.channels;
  const AdalnStats s = adaln_stats<kVec>(x, channels, static_cast<float>(p.eps), scratch);
  for (int c = static_cast<int>(threadIdx.x) * kVec; c < channels; c += static_cast<int>(blockDim.x) * kVec) {
    float xv[kVec], sv[kVec], hv[kVec], out[kVec];
    load<kVec>(x + c, xv);
    load<kVec>(scale + c, sv);
    load<kVec>(shift + c, hv);
#pragma unroll
    for (int i = 0; i < kVec; ++i) out[i] = adaln_value(xv[i], s.mean, s.rstd, sv[i], hv[i]);
    store<kVec>(y + c, out);
  }
}

// The same launch rules as adaln_forward.
template <class T, int kVec>
__global__ void __launch_bounds__(kAdalnMaxThreads) adaln_backward(const AdalnGradParams<T> p) {
  __shared__ float scratch[32];
  const int64_t row = blockIdx.x;
  const int channels = static_cast<int>(p.channels);
  const int start = static_cast<int>(threadIdx.x) * kVec;
  const int stride = static_cast<int>(blockDim.x) * kVec;
  const T* x = p.x + row * p.channels;
  const T* grad = p.grad + row * p.channels;
  const T* scale = p.scale + row / p.rows_per_sample * p.scale_stride;
  T* grad_x = p.grad_x + row * p.channels;
  const AdalnStats s = adaln_stats<kVec>(x, channels, static_cast<float>(p.eps), scratch);
  float sum_g = 0.0f;
  float sum_gn = 0.0f;
  for (int c = start; c < channels; c += stride) {
    float xv[kVec], gv[kVec], sv[kVec];
    load<kVec>(x + c, xv);
    load<kVec>(grad + c, gv);
    load<kVec>(scale + c, sv);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float g = gv[i] * (1.0f + sv[i]);
      sum_g += g;
      sum_gn += g * ((xv[i] - s.mean) * s.rstd);
    }
  }
  const float mean_g = block_sum(sum_g, scratch) / static_cast<float>(channels);
  const float mean_gn = block_sum(sum_gn, scratch) / static_cast<float>(channels);
  for (int c = start; c < channels; c += stride) {
    float xv[kVec], gv[kVec], sv[kVec], out[kVec];
    load<kVec>(x + c, xv);
    load<kVec>(grad + c, gv);
    load<kVec>(scale + c, sv);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float g = gv[i] * (1.0f + sv[i]);
      out[i] = adaln_grad_value(g, (xv[i] - s.mean) * s.rstd, s.rstd, mean_g, mean_gn);
    }
    store<kVec>(grad_x + c, out);
  }
}

}  // namespace stitchvm
