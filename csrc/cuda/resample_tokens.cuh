// resample_tokens kernels: threadIdx.y picks a token of the result, threadIdx.x strides over its channels. The adjoint
// is a gather over the tokens that read an input token, so its sums have a fixed order. No torch headers.
#pragma once

#include "../common/resample_tokens.h"
#include "types.cuh"

namespace stitchvm {

constexpr int kResampleThreads = 128;

template <int kVec, class T>
__device__ __forceinline__ void add(const T* p, float (&sum)[kVec]) {
  float v[kVec];
  load<kVec>(p, v);
#pragma unroll
  for (int i = 0; i < kVec; ++i) sum[i] += v[i];
}

// grid: enough blocks for batch * (prefix_tokens + out_h * out_w) tokens, blockDim.y tokens each. kVec > 1 needs all
// pointers aligned to kVec elements and channels % kVec == 0.
template <class T, int kVec>
__global__ void __launch_bounds__(kResampleThreads) resample_forward(const ResampleParams<T> p) {
  const int64_t patches = static_cast<int64_t>(p.out_h) * p.out_w;
  const int64_t tokens = p.prefix_tokens + patches;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.batch * tokens) return;
  const int64_t sample = row / tokens;
  const int64_t token = row % tokens;
  const int64_t patch = token - p.prefix_tokens;
  const bool same_grid = p.in_h == p.out_h && p.in_w == p.out_w;
  const bool interpolates = patch >= 0 && !same_grid;
  const T* x00 = patch < 0 ? p.prefix + token * p.channels : p.x + (sample * patches + patch) * p.channels;
  const T* x01 = nullptr;
  const T* x10 = nullptr;
  const T* x11 = nullptr;
  float w00 = 1.0f, w01 = 0.0f, w10 = 0.0f, w11 = 0.0f;
  if (interpolates) {
    const Tap<float> ty = bilinear_tap<float>(static_cast<int>(patch / p.out_w), p.in_h, p.out_h);
    const Tap<float> tx = bilinear_tap<float>(static_cast<int>(patch % p.out_w), p.in_w, p.out_w);
    const T* x = p.x + sample * p.in_h * p.in_w * p.channels;
    x00 = x + (static_cast<int64_t>(ty.first) * p.in_w + tx.first) * p.channels;
    x01 = x + (static_cast<int64_t>(ty.first) * p.in_w + tx.second) * p.channels;
    x10 = x + (static_cast<int64_t>(ty.second) * p.in_w + tx.first) * p.channels;
    x11 = x + (static_cast<int64_t>(ty.second) * p.in_w + tx.second) * p.channels;
    w00 = (1.0f - ty.weight) * (1.0f - tx.weight);
    w01 = (1.0f - ty.weight) * tx.weight;
    w10 = ty.weight * (1.0f - tx.weight);
    w11 = ty.weight * tx.weight;
  }
  const T* bias = patch < 0 ? nullptr : p.bias;
  const T* residual =
      patch < 0 || p.residual == nullptr ? nullptr : p.residual + (sample * patches + patch) * p.channels;
  const T* position = p.position == nullptr ? nullptr : p.position + token * p.channels;
  T* y = p.y + row * p.channels;
  for (int64_t c = threadIdx.x * kVec; c < p.channels; c += blockDim.x * kVec) {
    float out[kVec];
    load<kVec>(x00 + c, out);
    if (interpolates) {
      float b[kVec], d[kVec], e[kVec];
      load<kVec>(x01 + c, b);
      load<kVec>(x10 + c, d);
      load<kVec>(x11 + c, e);
#pragma unroll
      for (int i = 0; i < kVec; ++i) out[i] = w00 * out[i] + w01 * b[i] + w10 * d[i] + w11 * e[i];
    }
    if (bias != nullptr) add<kVec>(bias + c, out);
    if (residual != nullptr) add<kVec>(residual + c, out);
    if (position != nullptr) add<kVec>(position + c, out);
    store<kVec>(y + c, out);
  }
}

// grid: enough blocks for batch * in_h * in_w tokens. The same launch rules as resample_forward.
template <class T, int kVec>
__global__ void __launch_bounds__(kResampleThreads) resample_backward(const ResampleGradParams<T> p) {
  const int64_t tokens = static_cast<int64_t>(p.in_h) * p.in_w;
  const int64_t out_tokens = p.prefix_tokens + static_cast<int64_t>(p.out_h) * p.out_w;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.batch * tokens) return;
  const int token = static_cast<int>(row % tokens);
  const int iy = token / p.in_w;
  const int ix = token % p.in_w;
  const int y_begin = reader_begin(iy, p.in_h, p.out_h);
  const int y_end = reader_end(iy, p.in_h, p.out_h);
  const int x_begin = reader_begin(ix, p.in_w, p.out_w);
  const int x_end = reader_end(ix, p.in_w, p.out_w);
  const T* grad = p.grad + (row / tokens * out_tokens + p.prefix_tokens) * p.channels;
  T* grad_x = p.grad_x + row * p.channels;
  for (int64_t c = threadIdx.x * kVec; c < p.channels; c += blockDim.x * kVec) {
    float sum[kVec] = {};
    for (int oy = y_begin; oy < y_end; ++oy) {
      const float wy = reader_weight<float>(oy, iy, p.in_h, p.out_h);
      for (int ox = x_begin; ox < x_end; ++ox) {
        const float w = wy * reader_weight<float>(ox, ix, p.in_w, p.out_w);
        if (w == 0.0f) continue;  // between equal grids all but one
        float g[kVec];
        load<kVec>(grad + (static_cast<int64_t>(oy) * p.out_w + ox) * p.channels + c, g);
#pragma unroll
        for (int i = 0; i < kVec; ++i) sum[i] += w * g[i];
      }
    }
    store<kVec>(grad_x + c, sum);
  }
}

}  // namespace stitchvm
