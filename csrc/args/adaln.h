// adaln: from tensors to checked params. Shape and dtype errors are raised in Python; these guard direct calls of the
// op.
#pragma once

#include "../common/adaln.h"
#include "args.h"

namespace stitchvm {

inline void check_adaln(const char* op, const Tensor& x, const Tensor& condition, const char* name) {
  check_like(op, x, condition, name);
  STD_TORCH_CHECK(x.dim() == 3, op, ": x must be [B, N, C]");
  STD_TORCH_CHECK(condition.dim() == 2 && condition.size(1) == x.size(2) &&
                      (condition.size(0) == x.size(0) || condition.size(0) == 1),
                  op, ": ", name, " must be [B, C] or [1, C]");
}

// All tensors have passed check_adaln; x and y are contiguous, scale and shift have contiguous rows.
template <class T>
AdalnParams<T> adaln_params(const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& y, double eps) {
  return {const_data<T>(x),
          const_data<T>(scale),
          const_data<T>(shift),
          mutable_data<T>(y),
          x.size(0) * x.size(1),
          x.size(2),
          x.size(1),
          batch_stride(scale),
          batch_stride(shift),
          eps};
}

template <class T>
AdalnGradParams<T> adaln_grad_params(const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& grad_x,
                                     double eps) {
  return {const_data<T>(grad),
          const_data<T>(x),
          const_data<T>(scale),
          mutable_data<T>(grad_x),
          x.size(0) * x.size(1),
          x.size(2),
          x.size(1),
          batch_stride(scale),
          eps};
}

}  // namespace stitchvm
