// residual_norm: residual = x + gate * branch + gate2 * branch2, then LayerNorm(residual) under one or two modulations,
// and the gradients for x and the branches. Shared by every backend; no torch headers.
#pragma once

#include <cstdint>

#include "macros.h"

namespace stitchvm {

// A [R, C] tensor of gates, scales or shifts: row r starts at data + r * stride, so that a chunk of a wider modulation
// tensor needs no copy, and a stride of 0 shares one row. data is null where the tensor is absent.
template <class T>
struct RowTable {
  const T* data;
  int64_t stride;

  STITCHVM_INLINE const T* row(int64_t r) const { return data == nullptr ? nullptr : data + r * stride; }
};

// Which rows a call works on. Activations are contiguous [count, channels] with count = samples * tokens; sample b uses
// row index[b] of every table, or row b where index is null.
struct RowLayout {
  int64_t count;
  int64_t channels;
  int64_t tokens;
  const int64_t* index;
  int64_t table_rows;  // the smallest table's
};

// Absent tensors are null. residual is null without a branch, y without a scale, y2 without a scale2.
template <class T>
struct ResidualNormParams {
  const T* x;
  const T* branch;
  const T* branch2;
  RowTable<T> gate;
  RowTable<T> gate2;
  RowTable<T> scale;
  RowTable<T> shift;
  RowTable<T> scale2;
  RowTable<T> shift2;
  T* residual;
  T* y;
  T* y2;
  RowLayout rows;
  bool affine;
  double eps;
};

// Absent tensors are null; grad_y is present wherever grad_y2 is. Without grad_y there is no norm to go through: grad_x
// is null, and the branches' gradients are those of gate * grad_residual.
template <class T>
struct ResidualNormGradParams {
  const T* grad_residual;
  const T* grad_y;
  const T* grad_y2;
  const T* residual;
  RowTable<T> gate;
  RowTable<T> gate2;
  RowTable<T> scale;
  RowTable<T> scale2;
  T* grad_x;
  T* grad_branch;
  T* grad_branch2;
  RowLayout rows;
  bool affine;
  double eps;
};

// The factor of the normalised value is base + scale: 1 + scale for a modulation, scale for an affine weight (0 + scale
// is exact).
template <class A>
STITCHVM_INLINE A scale_base(bool affine) {
  return affine ? A(0) : A(1);
}

template <class A>
STITCHVM_INLINE A norm_value(A h, A mean, A rstd, A factor, A shift) {
  return (h - mean) * rstd * factor + shift;
}

// With g = grad_y * factor (+ grad_y2 * factor2) and n = (h - mean) * rstd: rstd * (g - mean(g) - n * mean(g * n)).
template <class A>
STITCHVM_INLINE A norm_grad_value(A g, A n, A rstd, A mean_g, A mean_gn) {
  return rstd * (g - mean_g - n * mean_gn);
}

}  // namespace stitchvm
