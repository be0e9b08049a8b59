// residual_norm kernels: one block per row. Each thread keeps its part of the row in registers between the passes, so
// that device memory sees one read and one write; rows too wide for that are read again. No torch headers.
#pragma once

#include "../common/residual_norm.h"
#include "reduce.cuh"
#include "types.cuh"

namespace stitchvm {

constexpr int kResidualNormThreads = 512;
constexpr int kHeldVectors = 2;  // of a row, per thread, on the path that keeps the row in registers

// The row of every table for a sample. Like PyTorch's device asserts, an index outside the tables stops the kernel.
__device__ __forceinline__ int64_t table_row(const RowLayout& rows, int64_t row) {
  const int64_t sample = row / rows.tokens;
  if (rows.index == nullptr) return sample;
  const int64_t index = rows.index[sample];
  if (index < 0 || index >= rows.table_rows) __trap();
  return index;
}

// Calls f(j, c) for the j-th vector of this thread, which starts at channel c. With kHold > 0 the loop is unrolled, so
// that arrays indexed by j stay in registers; the block must then cover the row in kHold vectors per thread.
template <int kVec, int kHold, class F>
__device__ __forceinline__ void for_each_vector(int channels, F f) {
  const int start = static_cast<int>(threadIdx.x) * kVec;
  const int stride = static_cast<int>(blockDim.x) * kVec;
  if constexpr (kHold > 0) {
#pragma unroll
    for (int j = 0; j < kHold; ++j) {
      const int c = start + j * stride;
      if (c < channels) f(j, c);
    }
  } else {
    for (int c = start; c < channels; c += stride) f(0, c);
  }
}

// The j-th vector of this thread: from registers, or where the row is not held there, read again from p.
template <int kHold, int kVec, int kSlots, class T>
__device__ __forceinline__ Packed<T, kVec> held_or_load(const Packed<T, kVec> (&held)[kSlots], int j, const T* p) {
  if constexpr (kHold > 0) {
    return held[j];
  } else {
    return load_packed<kVec>(p);
  }
}

// residual = x + gate * branch (+ gate2 * branch2) at channel c; null gates are 1.
template <int kVec, int kBranches, class T>
__device__ __forceinline__ void residual_vector(const T* x, const T* branch, const T* gate, const T* branch2,
                                                const T* gate2, int c, float (&out)[kVec]) {
  float b[kVec], g[kVec];
  load<kVec>(x + c, out);
  load<kVec>(branch + c, b);
  if (gate != nullptr) {
    load<kVec>(gate + c, g);
#pragma unroll
    for (int i = 0; i < kVec; ++i) b[i] *= g[i];
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) out[i] += b[i];
  if constexpr (kBranches == 2) {
    load<kVec>(branch2 + c, b);
    if (gate2 != nullptr) {
      load<kVec>(gate2 + c, g);
#pragma unroll
      for (int i = 0; i < kVec; ++i) b[i] *= g[i];
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i) out[i] += b[i];
  }
}

// The residual alone. grid: p.rows.count blocks. kVec > 1 needs every row of every tensor aligned to kVec elements and
// channels % kVec == 0.
template <class T, int kVec, int kBranches>
__global__ void __launch_bounds__(kResidualNormThreads) residual_forward(const ResidualNormParams<T> p) {
  const int64_t row = blockIdx.x;
  const int64_t offset = row * p.rows.channels;
  const int64_t index = table_row(p.rows, row);
  const T* branch2 = kBranches == 2 ? p.branch2 + offset : nullptr;
  for_each_vector<kVec, 0>(static_cast<int>(p.rows.channels), [&](int, int c) {
    float h[kVec];
    residual_vector<kVec, kBranches>(p.x + offset, p.branch + offset, p.gate.row(index), branch2, p.gate2.row(index), c,
                                     h);
    store<kVec>(p.residual + offset + c, h);
  });
}

// y = n * (base + scale) + shift at channel c; a null shift is 0.
template <int kVec, class T>
__device__ __forceinline__ void store_modulated(const float (&n)[kVec], float base, const T* scale, const T* shift,
                                                T* y, int c) {
  float s[kVec], out[kVec];
  float t[kVec] = {};
  load<kVec>(scale + c, s);
  if (shift != nullptr) load<kVec>(shift + c, t);
#pragma unroll
  for (int i = 0; i < kVec; ++i) out[i] = n[i] * (base + s[i]) + t[i];
  store<kVec>(y + c, out);
}

// The residual of kBranches branches (0: x itself) and its norm. The launch rules of residual_forward; kHold > 0 needs
// channels <= kHold * kVec * blockDim.x.
template <class T, int kVec, int kHold, int kBranches>
__global__ void __launch_bounds__(kResidualNormThreads) residual_norm_forward(const ResidualNormParams<T> p) {
  __shared__ float scratch[32];
  const int64_t row = blockIdx.x;
  const int channels = static_cast<int>(p.rows.channels);
  const int64_t offset = row * p.rows.channels;
  const int64_t index = table_row(p.rows, row);
  const T* gate = p.gate.row(index);
  const T* gate2 = p.gate2.row(index);
  const T* source = kBranches > 0 ? p.residual + offset : p.x + offset;
  Packed<T, kVec> held[kHold > 0 ? kHold : 1];

  float sum = 0.0f;
  for_each_vector<kVec, kHold>(channels, [&](int j, int c) {
    Packed<T, kVec> h;
    if constexpr (kBranches > 0) {
      float value[kVec];
      residual_vector<kVec, kBranches>(p.x + offset, p.branch + offset, gate,
                                       kBranches == 2 ? p.branch2 + offset : nullptr, gate2, c, value);
      h = pack<T>(value);  // the norm is that of the rounded residual, which the backward pass sees too
      store_packed(p.residual + offset + c, h);
    } else {
      h = load_packed<kVec>(p.x + offset + c);
    }
    if constexpr (kHold > 0) held[j] = h;
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum += to_float(h.v[i]);
  });
  const float mean = block_sum(sum, scratch) / static_cast<float>(channels);

  // Squares of deviations, not E[h^2] - mean^2: activations of diffusion transformers have large outlier channels.
  float square = 0.0f;
  for_each_vector<kVec, kHold>(channels, [&](int j, int c) {
    const Packed<T, kVec> h = held_or_load<kHold>(held, j, source + c);
#pragma unroll
    for (int i = 0; i < kVec; ++i) square += (to_float(h.v[i]) - mean) * (to_float(h.v[i]) - mean);
  });
  const float variance = block_sum(square, scratch) / static_cast<float>(channels);
  const float rstd = 1.0f / sqrtf(variance + static_cast<float>(p.eps));

  const float base = scale_base<float>(p.affine);
  for_each_vector<kVec, kHold>(channels, [&](int j, int c) {
    const Packed<T, kVec> h = held_or_load<kHold>(held, j, source + c);
    float n[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) n[i] = (to_float(h.v[i]) - mean) * rstd;
    store_modulated<kVec>(n, base, p.scale.row(index), p.shift.row(index), p.y + offset, c);
    if (p.y2 != nullptr) {
      store_modulated<kVec>(n, base, p.scale2.row(index), p.shift2.row(index), p.y2 + offset, c);
    }
  });
}

// grad_branch = gate * grad at channel c, where there is a gate.
template <int kVec, class T>
__device__ __forceinline__ void store_gated(const float (&grad)[kVec], const T* gate, T* grad_branch, int c) {
  if (gate == nullptr) return;
  float g[kVec];
  load<kVec>(gate + c, g);
#pragma unroll
  for (int i = 0; i < kVec; ++i) g[i] *= grad[i];
  store<kVec>(grad_branch + c, g);
}

// The gated gradients where there is no norm. The launch rules of residual_forward.
template <class T, int kVec>
__global__ void __launch_bounds__(kResidualNormThreads) residual_backward(const ResidualNormGradParams<T> p) {
  const int64_t row = blockIdx.x;
  const int64_t offset = row * p.rows.channels;
  const int64_t index = table_row(p.rows, row);
  for_each_vector<kVec, 0>(static_cast<int>(p.rows.channels), [&](int, int c) {
    float grad[kVec];
    load<kVec>(p.grad_residual + offset + c, grad);
    store_gated<kVec>(grad, p.gate.row(index), p.grad_branch + offset, c);
    store_gated<kVec>(grad, p.gate2.row(index), p.grad_branch2 + offset, c);
  });
}

// The launch rules of residual_norm_forward.
template <class T, int kVec, int kHold>
__global__ void __launch_bounds__(kResidualNormThreads) residual_norm_backward(const ResidualNormGradParams<T> p) {
  __shared__ float scratch[32];
  const int64_t row = blockIdx.x;
  const int channels = static_cast<int>(p.rows.channels);
  const int64_t offset = row * p.rows.channels;
  const int64_t index = table_row(p.rows, row);
  const T* residual = p.residual + offset;
  const T* scale = p.scale.row(index);
  const T* scale2 = p.scale2.row(index);
  const float base = scale_base<float>(p.affine);
  Packed<T, kVec> held[kHold > 0 ? kHold : 1];
  float held_g[kHold > 0 ? kHold : 1][kVec];

  // The gradient of the normalised row at channel c.
  const auto norm_gradient = [&](int c, float (&g)[kVec]) {
    float s[kVec];
    load<kVec>(p.grad_y + offset + c, g);
    load<kVec>(scale + c, s);
#pragma unroll
    for (int i = 0; i < kVec; ++i) g[i] *= base + s[i];
    if (p.grad_y2 != nullptr) {
      float g2[kVec];
      load<kVec>(p.grad_y2 + offset + c, g2);
      load<kVec>(scale2 + c, s);
#pragma unroll
      for (int i = 0; i < kVec; ++i) g[i] += g2[i] * (base + s[i]);
    }
  };

  float sum = 0.0f;
  float sum_g = 0.0f;
  for_each_vector<kVec, kHold>(channels, [&](int j, int c) {
    const Packed<T, kVec> h = load_packed<kVec>(residual + c);
    float g[kVec];
    norm_gradient(c, g);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      sum += to_float(h.v[i]);
      sum_g += g[i];
      if constexpr (kHold > 0) held_g[j][i] = g[i];
    }
    if constexpr (kHold > 0) held[j] = h;
  });
  const float mean = block_sum(sum, scratch) / static_cast<float>(channels);
  const float mean_g = block_sum(sum_g, scratch) / static_cast<float>(channels);

  // f(c, deviation, g) for the vectors of this thread.
  const auto for_each_pair = [&](auto f) {
    for_each_vector<kVec, kHold>(channels, [&](int j, int c) {
      const Packed<T, kVec> h = held_or_load<kHold>(held, j, residual + c);
      float d[kVec], g[kVec];
      if constexpr (kHold == 0) norm_gradient(c, g);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        d[i] = to_float(h.v[i]) - mean;
        if constexpr (kHold > 0) g[i] = held_g[j][i];
      }
      f(c, d, g);
    });
  };
  float square = 0.0f;
  float sum_gd = 0.0f;
  for_each_pair([&](int, const float (&d)[kVec], const float (&g)[kVec]) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      square += d[i] * d[i];
      sum_gd += g[i] * d[i];
    }
  });
  const float variance = block_sum(square, scratch) / static_cast<float>(channels);
  const float rstd = 1.0f / sqrtf(variance + static_cast<float>(p.eps));
  const float mean_gn = block_sum(sum_gd, scratch) / static_cast<float>(channels) * rstd;

  for_each_pair([&](int c, const float (&d)[kVec], const float (&g)[kVec]) {
    float out[kVec] = {};
    if (p.grad_residual != nullptr) load<kVec>(p.grad_residual + offset + c, out);
#pragma unroll
    for (int i = 0; i < kVec; ++i) out[i] += norm_grad_value(g[i], d[i] * rstd, rstd, mean_g, mean_gn);
    store<kVec>(p.grad_x + offset + c, out);
    store_gated<kVec>(out, p.gate.row(index), p.grad_branch + offset, c);
    store_gated<kVec>(out, p.gate2.row(index), p.grad_branch2 + offset, c);
  });
}

}  // namespace stitchvm
