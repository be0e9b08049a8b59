// adaln: y = LayerNorm(x) * (1 + scale) + shift, and the gradient for x. Shared by every backend; no torch headers.
#pragma once

#include <cstdint>

#include "macros.h"

namespace stitchvm {

// x and y are contiguous [rows, channels], rows = B * rows_per_sample. Row b of scale starts at scale + b *
// scale_stride, so that a chunk of a wider modulation tensor needs no copy, and a stride of 0 broadcasts one row over
// the batch.
template <class T>
struct AdalnParams {
  const T* x;
  const T* scale;
  const T* shift;
  T* y;
  int64_t rows;
  int64_t channels;
  int64_t rows_per_sample;
  int64_t scale_stride;
  int64_t shift_stride;
  double eps;
};

template <class T>
struct AdalnGradParams {
  const T* grad;
  const T* x;
  const T* scale;
  T* grad_x;
  int64_t rows;
  int64_t channels;
  int64_t rows_per_sample;
  int64_t scale_stride;
  double eps;
};

template <class A>
STITCHVM_INLINE A adaln_value(A x, A mean, A rstd, A scale, A shift) {
  return (x - mean) * rstd * (A(1) + scale) + shift;
}

// With g = grad * (1 + scale) and n = (x - mean) * rstd: dx = rstd * (g - mean(g) - n * mean(g * n)).
template <class A>
STITCHVM_INLINE A adaln_grad_value(A g, A n, A rstd, A mean_g, A mean_gn) {
  return rstd * (g - mean_g - n * mean_gn);
}

}  // namespace stitchvm
