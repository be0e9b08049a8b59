// qk_norm kernels: a block per token of q, k or v in the joint sequence, a power of two of lanes per head. A head is
// read twice, the second time from L1. No torch headers.
#pragma once

#include "../common/qk_norm.h"
#include "types.cuh"

namespace stitchvm {

constexpr int kQkThreads = 128;

// Elements that a lane takes at a time: 16 bytes, or single accesses to a pair, which rotary embedding needs together.
template <int kVec>
constexpr int kQkUnit = kVec == 1 ? 2 : kVec;

// The unit at channel c of a head of `dim` channels; 0 beyond its end.
template <int kVec, class T>
__device__ __forceinline__ void load_unit(const T* head, int c, int dim, float (&out)[kQkUnit<kVec>]) {
  if constexpr (kVec == 1) {
    out[0] = to_float(head[c]);
    out[1] = c + 1 < dim ? to_float(head[c + 1]) : 0.0f;
  } else {
    load<kVec>(head + c, out);
  }
}

template <int kVec, class T>
__device__ __forceinline__ void store_unit(T* head, int c, int dim, const float (&in)[kQkUnit<kVec>]) {
  if constexpr (kVec == 1) {
    head[c] = from_float<T>(in[0]);
    if (c + 1 < dim) head[c + 1] = from_float<T>(in[1]);
  } else {
    store<kVec>(head + c, in);
  }
}

// The same for cosines and sines, which are float and aligned to 16 bytes.
template <int kVec>
__device__ __forceinline__ void load_angles(const float* row, int c, float (&out)[kQkUnit<kVec>]) {
  if constexpr (kVec == 1) {
    out[0] = row[c];
    out[1] = row[c + 1];
  } else {
#pragma unroll
    for (int i = 0; i < kVec; i += 4) {
      float part[4];
      load<4>(row + c + i, part);
#pragma unroll
      for (int j = 0; j < 4; ++j) out[i + j] = part[j];
    }
  }
}

// The sum over the blockDim.x lanes of a head, returned to all of them. Every lane of the warp takes part.
__device__ __forceinline__ float head_sum(float v) {
  for (int distance = static_cast<int>(blockDim.x) / 2; distance > 0; distance >>= 1) {
    v += __shfl_xor_sync(0xffffffffu, v, distance);
  }
  return v;
}

// One token of q, k or v (without weights and angles), at position s of the joint sequence of a sample.
template <class T, int kVec>
__device__ __forceinline__ void qk_token_forward(const QkNormParams<T, float>& p, const QkStream<T, float>& stream,
                                                 int64_t row, bool is_v) {
  constexpr int kUnit = kQkUnit<kVec>;
  const int64_t tokens = stream.tokens + stream.context_tokens;
  const int64_t sample = row / tokens;
  const int64_t s = row % tokens;
  const int dim = static_cast<int>(p.dim);
  const int heads = static_cast<int>(p.heads);
  const QkToken token = qk_token(s, stream.tokens, stream.context_tokens, p.context_first);
  const QkRows<T> rows = token.context ? stream.context : stream.image;
  const T* weight = token.context ? stream.context_weight : stream.weight;
  const T* x = rows.data + sample * rows.batch_stride + token.index * rows.token_stride;
  T* out = stream.joint + row * heads * dim;
  const float* cos = p.cos == nullptr || is_v ? nullptr : p.cos + s * dim;
  const float* sin = p.sin + s * dim;
  const int start = static_cast<int>(threadIdx.x) * kUnit;
  const int stride = static_cast<int>(blockDim.x) * kUnit;
  // All threads of the block take every turn: the sums need whole warps.
  for (int first = 0; first < heads; first += static_cast<int>(blockDim.y)) {
    const int head = first + static_cast<int>(threadIdx.y);
    const bool active = head < heads;
    const T* xh = x + head * dim;
    float rstd = 1.0f;
    if (weight != nullptr) {
      float sum = 0.0f;
      for (int c = start; active && c < dim; c += stride) {
        float v[kUnit];
        load_unit<kVec>(xh, c, dim, v);
#pragma unroll
        for (int i = 0; i < kUnit; ++i) sum += v[i] * v[i];
      }
      rstd = 1.0f / sqrtf(head_sum(sum) / static_cast<float>(dim) + static_cast<float>(p.eps));
    }
    if (!active) continue;
    if (threadIdx.x == 0 && !is_v) stream.rstd[row * heads + head] = rstd;
    for (int c = start; c < dim; c += stride) {
      float v[kUnit];
      load_unit<kVec>(xh, c, dim, v);
      if (weight != nullptr) {
        float w[kUnit];
        load_unit<kVec>(weight, c, dim, w);
#pragma unroll
        for (int i = 0; i < kUnit; ++i) v[i] = v[i] * rstd * w[i];
      }
      if (cos != nullptr) {
        float cv[kUnit], sv[kUnit];
        load_angles<kVec>(cos, c, cv);
        load_angles<kVec>(sin, c, sv);
#pragma unroll
        for (int i = 0; i < kUnit; i += 2) {
          const Pair<float> r =
              rotate(Pair<float>{v[i], v[i + 1]}, Pair<float>{cv[i], cv[i + 1]}, Pair<float>{sv[i], sv[i + 1]});
          v[i] = r.first;
          v[i + 1] = r.second;
        }
      }
      store_unit<kVec>(out + head * dim, c, dim, v);
    }
  }
}

// grid: a block for each token of q, k and v in turn. block: (lanes per head, heads at a time), kQkThreads threads in
// all, blockDim.x a power of two of at most 32. kVec > 1 needs every head of every tensor, cos and sin aligned to 16
// bytes.
template <class T, int kVec>
__global__ void __launch_bounds__(kQkThreads) qk_norm_forward(const QkNormParams<T, float> p) {
  const int64_t row = blockIdx.x;
  const int64_t q_rows = p.batch * (p.q.tokens + p.q.context_tokens);
  const int64_t k_rows = p.batch * (p.k.tokens + p.k.context_tokens);
  if (row < q_rows) {
    qk_token_forward<T, kVec>(p, p.q, row, false);
  } else if (row < q_rows + k_rows) {
    qk_token_forward<T, kVec>(p, p.k, row - q_rows, false);
  } else {
    qk_token_forward<T, kVec>(p, p.v, row - q_rows - k_rows, true);
  }
}

template <class T, int kVec>
__device__ __forceinline__ void qk_token_backward(const QkNormGradParams<T, float>& p,
                                                  const QkGradStream<T, float>& stream, int64_t row) {
  constexpr int kUnit = kQkUnit<kVec>;
  const int64_t tokens = stream.tokens + stream.context_tokens;
  const int64_t sample = row / tokens;
  const int64_t s = row % tokens;
  const int dim = static_cast<int>(p.dim);
  const int heads = static_cast<int>(p.heads);
  const QkToken token = qk_token(s, stream.tokens, stream.context_tokens, p.context_first);
  const T* weight = token.context ? stream.context_weight : stream.weight;
  const T* grad = stream.grad + sample * stream.grad_batch_stride + s * stream.grad_token_stride;
  const T* y = stream.joint + row * heads * dim;
  T* out = token.context ? stream.grad_context + (sample * stream.context_tokens + token.index) * heads * dim
                         : stream.grad_image + (sample * stream.tokens + token.index) * heads * dim;
  const float* cos = p.cos == nullptr ? nullptr : p.cos + s * dim;
  const float* sin = p.sin + s * dim;
  const int start = static_cast<int>(threadIdx.x) * kUnit;
  const int stride = static_cast<int>(blockDim.x) * kUnit;
  for (int first = 0; first < heads; first += static_cast<int>(blockDim.y)) {
    const int head = first + static_cast<int>(threadIdx.y);
    const bool active = head < heads;
    const T* gh = grad + head * stream.grad_head_stride;
    const T* yh = y + head * dim;
    float rstd = 1.0f;
    float mean = 0.0f;
    if (weight != nullptr) {
      float sum = 0.0f;
      for (int c = start; active && c < dim; c += stride) {
        float gv[kUnit], yv[kUnit];
        load_unit<kVec>(gh, c, dim, gv);
        load_unit<kVec>(yh, c, dim, yv);
#pragma unroll
        for (int i = 0; i < kUnit; ++i) sum += gv[i] * yv[i];
      }
      mean = head_sum(sum) / static_cast<float>(dim);
      if (active) rstd = stream.rstd[row * heads + head];
    }
    if (!active) continue;
    for (int c = start; c < dim; c += stride) {
      float gv[kUnit], zv[kUnit];
      load_unit<kVec>(gh, c, dim, gv);
      load_unit<kVec>(yh, c, dim, zv);
      if (cos != nullptr) {
        float cv[kUnit], sv[kUnit];
        load_angles<kVec>(cos, c, cv);
        load_angles<kVec>(sin, c, sv);
#pragma unroll
        for (int i = 0; i < kUnit; i += 2) {
          const Pair<float> c2 = {cv[i], cv[i + 1]}, s2 = {sv[i], sv[i + 1]};
          const Pair<float> g2 = rotate_transposed(Pair<float>{gv[i], gv[i + 1]}, c2, s2);
          const Pair<float> z2 = rotate_inverse(Pair<float>{zv[i], zv[i + 1]}, c2, s2);
          gv[i] = g2.first;
          gv[i + 1] = g2.second;
          zv[i] = z2.first;
          zv[i + 1] = z2.second;
        }
      }
      if (weight != nullptr) {
        float w[kUnit];
        load_unit<kVec>(weight, c, dim, w);
#pragma unroll
        for (int i = 0; i < kUnit; ++i) gv[i] = qk_norm_grad_value(gv[i], zv[i], w[i], 1.0f / w[i], rstd, mean);
      }
      store_unit<kVec>(out + head * dim, c, dim, gv);
    }
  }
}

// grid: a block for each token of q and k in turn. The same launch rules as qk_norm_forward.
template <class T, int kVec>
__global__ void __launch_bounds__(kQkThreads) qk_norm_backward(const QkNormGradParams<T, float> p) {
  const int64_t row = blockIdx.x;
  const int64_t q_rows = p.batch * (p.q.tokens + p.q.context_tokens);
  if (row < q_rows) {
    qk_token_backward<T, kVec>(p, p.q, row);
  } else {
    qk_token_backward<T, kVec>(p, p.k, row - q_rows);
  }
}

}  // namespace stitchvm
