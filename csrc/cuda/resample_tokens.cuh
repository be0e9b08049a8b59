// resample_tokens kernels: threadIdx.y picks a token of the result, threadIdx.x strides over its channels. The adjoint
// is a gather over the tokens that read an input token, so its sums have a fixed order. No torch headers.
#pragma once

#include "../common/resample_tokens.h"
#include "types.cuh"

namespace stitchvm {

constexpr int kResampleThreads = 128;

// grid: enough blocks for batch * out_h * out_w tokens, blockDim.y tokens each. kVec > 1 needs both pointers aligned to
// kVec elements and channels % kVec == 0.
template <class T, int kVec>
__global__ void __launch_bounds__(kResampleThreads) resample_forward(const ResampleParams<T> p) {
  const int64_t tokens = static_cast<int64_t>(p.out_h) * p.out_w;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.batch * tokens) return;
  const int token = static_cast<int>(row % tokens);
  const Tap<float> ty = bilinear_tap<float>(token / p.out_w, p.in_h, p.out_h);
  const Tap<float> tx = bilinear_tap<float>(token % p.out_w, p.in_w, p.out_w);
  const T* src = p.src + row / tokens * p.in_h * p.in_w * p.channels;
  const T* x00 = src + (static_cast<int64_t>(ty.first) * p.in_w + tx.first) * p.channels;
  const T* x01 = src + (static_cast<int64_t>(ty.first) * p.in_w + tx.second) * p.channels;
  const T* x10 = src + (static_cast<int64_t>(ty.second) * p.in_w + tx.first) * p.channels;
  const T* x11 = src + (static_cast<int64_t>(ty.second) * p.in_w + tx.second) * p.channels;
  const float w00 = (1.0f - ty.weight) * (1.0f - tx.weight);
  const float w01 = (1.0f - ty.weight) * tx.weight;
  const float w10 = ty.weight * (1.0f - tx.weight);
  const float w11 = ty.weight * tx.weight;
  T* dst = p.dst + row * p.channels;
  for (int64_t c = threadIdx.x * kVec; c < p.channels; c += blockDim.x * kVec) {
    float a[kVec], b[kVec], d[kVec], e[kVec], out[kVec];
    load<kVec>(x00 + c, a);
    load<kVec>(x01 + c, b);
    load<kVec>(x10 + c, d);
    load<kVec>(x11 + c, e);
#pragma unroll
    for (int i = 0; i < kVec; ++i) out[i] = w00 * a[i] + w01 * b[i] + w10 * d[i] + w11 * e[i];
    store<kVec>(dst + c, out);
  }
}

// grid: enough blocks for batch * in_h * in_w tokens. The same launch rules as resample_forward.
template <class T, int kVec>
__global__ void __launch_bounds__(kResampleThreads) resample_backward(const ResampleParams<T> p) {
  const int64_t tokens = static_cast<int64_t>(p.in_h) * p.in_w;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.batch * tokens) return;
  const int token = static_cast<int>(row % tokens);
  const int iy = token / p.in_w;
  const int ix = token % p.in_w;
  const int y_begin = reader_begin(iy, p.in_h, p.out_h);
  const int y_end = reader_end(iy, p.in_h, p.out_h);
  const int x_begin = reader_begin(ix, p.in_w, p.out_w);
  const int x_end = reader_end(ix, p.in_w, p.out_w);
  const T* src = p.src + row / tokens * p.out_h * p.out_w * p.channels;
  T* dst = p.dst + row * p.channels;
  for (int64_t c = threadIdx.x * kVec; c < p.channels; c += blockDim.x * kVec) {
    float sum[kVec] = {};
    for (int oy = y_begin; oy < y_end; ++oy) {
      const float wy = reader_weight<float>(oy, iy, p.in_h, p.out_h);
      for (int ox = x_begin; ox < x_end; ++ox) {
        const float w = wy * reader_weight<float>(ox, ix, p.in_w, p.out_w);
        float g[kVec];
        load<kVec>(src + (static_cast<int64_t>(oy) * p.out_w + ox) * p.channels + c, g);
#pragma unroll
        for (int i = 0; i < kVec; ++i) sum[i] += w * g[i];
      }
    }
    store<kVec>(dst + c, sum);
  }
}

}  // namespace stitchvm
