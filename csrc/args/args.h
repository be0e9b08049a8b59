// Helpers between torch::stable::Tensor and the plain params structs of common/.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace stitchvm {

using torch::stable::Tensor;

inline void check_like(const char* op, const Tensor& x, const Tensor& other, const char* name) {
  STD_TORCH_CHECK(other.scalar_type() == x.scalar_type(), op, ": ", name, " must have the dtype of x");
  STD_TORCH_CHECK(other.device() == x.device(), op, ": ", name, " must be on the device of x");
}

inline void check_same_shape(const char* op, const Tensor& x, const Tensor& other, const char* name) {
  check_like(op, x, other, name);
  bool same = x.dim() == other.dim();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = x.size(d) == other.size(d);
  STD_TORCH_CHECK(same, op, ": ", name, " must have the shape of x");
}

inline void check_out(const char* op, const Tensor& x, const Tensor& out) {
  check_same_shape(op, x, out, "out");
  STD_TORCH_CHECK(out.is_contiguous(), op, ": out must be contiguous");
}

inline Tensor empty_contiguous(const Tensor& x) { return torch::stable::new_empty(x, x.sizes()); }

template <class T>
const T* const_data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// A [B, C] tensor whose rows are contiguous; a chunk of a wider tensor passes without a copy.
inline Tensor with_contiguous_rows(const Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

// Elements between two rows of a [B, C] tensor; 0 broadcasts a single row over the batch.
inline int64_t batch_stride(const Tensor& t) { return t.size(0) == 1 ? 0 : t.stride(0); }

}  // namespace stitchvm
