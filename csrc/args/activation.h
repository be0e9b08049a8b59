// activation: from tensors to checked params. Shape and dtype errors are raised in Python; these guard direct calls of
// the op.
#pragma once

#include <optional>

#include "../common/activation.h"
#include "args.h"

namespace stitchvm {

inline void check_activation(const char* op, const Tensor& x, const std::optional<Tensor>& bias, int64_t kind) {
  STD_TORCH_CHECK(kind >= 0 && kind <= 3, op, ": kind must be 0 (gelu), 1 (gelu_tanh), 2 (quick_gelu) or 3 (silu)");
  if (!bias) return;
  check_like(op, x, *bias, "bias");
  STD_TORCH_CHECK(x.dim() >= 1 && bias->dim() == 1 && bias->size(0) == x.size(-1), op,
                  ": bias must have as many elements as the last dimension of x");
}

// The bias as a contiguous tensor; an undefined tensor where there is none.
inline Tensor contiguous_bias(const std::optional<Tensor>& bias) {
  return bias ? torch::stable::contiguous(*bias) : Tensor();
}

// x and y are contiguous.
template <class T>
ActivationParams<T> activation_params(const Tensor& x, const Tensor& bias, int64_t kind, const Tensor& y) {
  return {const_data<T>(x),
          bias.defined() ? const_data<T>(bias) : nullptr,
          mutable_data<T>(y),
          x.numel(),
          x.dim() == 0 ? 1 : x.size(-1),
          static_cast<Activation>(kind)};
}

template <class T>
ActivationGradParams<T> activation_grad_params(const Tensor& grad, const Tensor& x, const Tensor& bias, int64_t kind,
                                               const Tensor& grad_x) {
  return {const_data<T>(grad),          const_data<T>(x), bias.defined() ? const_data<T>(bias) : nullptr,
          mutable_data<T>(grad_x),      x.numel(),        x.dim() == 0 ? 1 : x.size(-1),
          static_cast<Activation>(kind)};
}

}  // namespace stitchvm
