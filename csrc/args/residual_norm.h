// residual_norm: from tensors to checked params. Errors that a user can make are raised in Python; these guard direct
// calls of the op.
#pragma once

#include <optional>
#include <tuple>

#include "../common/residual_norm.h"
#include "args.h"

namespace stitchvm {

using MaybeTensor = std::optional<Tensor>;

// The tensors of one call, checked and contiguous (tables: with contiguous rows). They own any copy that was needed.
struct ResidualNormTensors {
  Tensor x;
  MaybeTensor branch, gate, branch2, gate2, scale, shift, scale2, shift2, rows;
  MaybeTensor residual, y, y2;
};

struct ResidualNormGradTensors {
  Tensor like;  // any of the gradients: gives the shape, dtype and device
  MaybeTensor grad_residual, grad_y, grad_y2, residual, gate, gate2, scale, scale2, rows;
  MaybeTensor grad_x, grad_branch, grad_branch2;
};

inline void check_needs(const char* op, const MaybeTensor& t, const char* name, const MaybeTensor& other,
                        const char* other_name) {
  STD_TORCH_CHECK(!t.has_value() || other.has_value(), op, ": ", name, " needs ", other_name);
}

inline MaybeTensor checked_activation(const char* op, const Tensor& x, const MaybeTensor& t, const char* name) {
  if (!t.has_value()) return t;
  check_same_shape(op, x, *t, name);
  return torch::stable::contiguous(*t);
}

inline MaybeTensor checked_table(const char* op, const Tensor& x, const MaybeTensor& t, const MaybeTensor& rows,
                                 const char* name) {
  if (!t.has_value()) return t;
  check_like(op, x, *t, name);
  STD_TORCH_CHECK(t->dim() == 2 && t->size(1) == x.size(2), op, ": ", name, " must be [R, C]");
  STD_TORCH_CHECK(rows.has_value() || t->size(0) == x.size(0) || t->size(0) == 1, op, ": ", name,
                  " must have one row per sample or one in all, or rows must be given");
  return with_contiguous_rows(*t);
}

inline MaybeTensor checked_rows(const char* op, const Tensor& x, const MaybeTensor& rows) {
  if (!rows.has_value()) return rows;
  STD_TORCH_CHECK(rows->scalar_type() == torch::headeronly::ScalarType::Long && rows->dim() == 1 &&
                      rows->size(0) == x.size(0) && rows->device() == x.device(),
                  op, ": rows must be int64 [B] on the device of x");
  return torch::stable::contiguous(*rows);
}

inline MaybeTensor checked_result(const char* op, const Tensor& x, const MaybeTensor& out, bool wanted,
                                  const char* name) {
  STD_TORCH_CHECK(out.has_value() == wanted, op, ": ", name, " must be ", wanted ? "given" : "absent");
  if (wanted) {
    check_same_shape(op, x, *out, name);
    STD_TORCH_CHECK(out->is_contiguous(), op, ": ", name, " must be contiguous");
  }
  return out;
}

inline ResidualNormTensors residual_norm_tensors(const Tensor& x, const MaybeTensor& branch, const MaybeTensor& gate,
                                                 const MaybeTensor& branch2, const MaybeTensor& gate2,
                                                 const MaybeTensor& scale, const MaybeTensor& shift,
                                                 const MaybeTensor& scale2, const MaybeTensor& shift2,
                                                 const MaybeTensor& rows, const MaybeTensor& residual,
                                                 const MaybeTensor& y, const MaybeTensor& y2) {
  constexpr const char* kOp = "residual_norm";
  STD_TORCH_CHECK(x.dim() == 3, kOp, ": x must be [B, N, C]");
  STD_TORCH_CHECK(branch.has_value() || scale.has_value(), kOp, ": expected a branch to add, a scale, or both");
  check_needs(kOp, gate, "gate", branch, "branch");
  check_needs(kOp, branch2, "branch2", branch, "branch");
  check_needs(kOp, gate2, "gate2", branch2, "branch2");
  check_needs(kOp, shift, "shift", scale, "scale");
  check_needs(kOp, scale2, "scale2", scale, "scale");
  check_needs(kOp, shift2, "shift2", scale2, "scale2");
  return {torch::stable::contiguous(x),
          checked_activation(kOp, x, branch, "branch"),
          checked_table(kOp, x, gate, rows, "gate"),
          checked_activation(kOp, x, branch2, "branch2"),
          checked_table(kOp, x, gate2, rows, "gate2"),
          checked_table(kOp, x, scale, rows, "scale"),
          checked_table(kOp, x, shift, rows, "shift"),
          checked_table(kOp, x, scale2, rows, "scale2"),
          checked_table(kOp, x, shift2, rows, "shift2"),
          checked_rows(kOp, x, rows),
          checked_result(kOp, x, residual, branch.has_value(), "residual"),
          checked_result(kOp, x, y, scale.has_value(), "y"),
          checked_result(kOp, x, y2, scale2.has_value(), "y2")};
}

inline const Tensor& any_gradient(const MaybeTensor& grad_residual, const MaybeTensor& grad_y,
                                  const MaybeTensor& grad_y2) {
  STD_TORCH_CHECK(grad_residual.has_value() || grad_y.has_value() || grad_y2.has_value(),
                  "residual_norm_input_grad: expected at least one gradient");
  return grad_residual.has_value() ? *grad_residual : grad_y.has_value() ? *grad_y : *grad_y2;
}

// A lone grad_y2 takes the place of grad_y, with its scale.
inline ResidualNormGradTensors residual_norm_grad_tensors(const MaybeTensor& grad_residual, const MaybeTensor& grad_y,
                                                          const MaybeTensor& grad_y2, const MaybeTensor& residual,
                                                          const MaybeTensor& gate, const MaybeTensor& gate2,
                                                          const MaybeTensor& scale, const MaybeTensor& scale2,
                                                          const MaybeTensor& rows, const MaybeTensor& grad_x,
                                                          const MaybeTensor& grad_branch,
                                                          const MaybeTensor& grad_branch2) {
  constexpr const char* kOp = "residual_norm_input_grad";
  const Tensor& like = any_gradient(grad_residual, grad_y, grad_y2);
  STD_TORCH_CHECK(like.dim() == 3, kOp, ": gradients must be [B, N, C]");
  check_needs(kOp, grad_y, "grad_y", scale, "scale");
  check_needs(kOp, grad_y2, "grad_y2", scale2, "scale2");
  const bool norm = grad_y.has_value() || grad_y2.has_value();
  STD_TORCH_CHECK(!norm || residual.has_value(), kOp, ": grad_y needs residual");
  MaybeTensor g = checked_activation(kOp, like, grad_y, "grad_y");
  MaybeTensor g2 = checked_activation(kOp, like, grad_y2, "grad_y2");
  MaybeTensor s, s2;
  if (g.has_value()) s = checked_table(kOp, like, scale, rows, "scale");
  if (g2.has_value()) s2 = checked_table(kOp, like, scale2, rows, "scale2");
  if (!g.has_value()) {
    g.swap(g2);
    s.swap(s2);
  }
  return {like,
          checked_activation(kOp, like, grad_residual, "grad_residual"),
          g,
          g2,
          norm ? checked_activation(kOp, like, residual, "residual") : MaybeTensor(),
          checked_table(kOp, like, gate, rows, "gate"),
          checked_table(kOp, like, gate2, rows, "gate2"),
          s,
          s2,
          checked_rows(kOp, like, rows),
          checked_result(kOp, like, grad_x, norm, "grad_x"),
          checked_result(kOp, like, grad_branch, gate.has_value(), "grad_branch"),
          checked_result(kOp, like, grad_branch2, gate2.has_value(), "grad_branch2")};
}

template <class T>
const T* const_data(const MaybeTensor& t) {
  return t.has_value() ? const_data<T>(*t) : nullptr;
}

template <class T>
T* mutable_data(const MaybeTensor& t) {
  return t.has_value() ? mutable_data<T>(*t) : nullptr;
}

// Without rows, a table of a single row is shared by the batch.
template <class T>
RowTable<T> row_table(const MaybeTensor& t, const MaybeTensor& rows) {
  if (!t.has_value()) return {nullptr, 0};
  return {const_data<T>(*t), rows.has_value() ? t->stride(0) : batch_stride(*t)};
}

inline RowLayout row_layout(const Tensor& x, const MaybeTensor& rows,
                            std::initializer_list<const MaybeTensor*> tables) {
  int64_t table_rows = INT64_MAX;
  for (const MaybeTensor* t : tables) {
    if (t->has_value() && (*t)->size(0) < table_rows) table_rows = (*t)->size(0);
  }
  return {x.size(0) * x.size(1), x.size(2), x.size(1), const_data<int64_t>(rows), table_rows};
}

template <class T>
ResidualNormParams<T> residual_norm_params(const ResidualNormTensors& t, bool affine, double eps) {
  return {const_data<T>(t.x),
          const_data<T>(t.branch),
          const_data<T>(t.branch2),
          row_table<T>(t.gate, t.rows),
          row_table<T>(t.gate2, t.rows),
          row_table<T>(t.scale, t.rows),
          row_table<T>(t.shift, t.rows),
          row_table<T>(t.scale2, t.rows),
          row_table<T>(t.shift2, t.rows),
          mutable_data<T>(t.residual),
          mutable_data<T>(t.y),
          mutable_data<T>(t.y2),
          row_layout(t.x, t.rows, {&t.gate, &t.gate2, &t.scale, &t.shift, &t.scale2, &t.shift2}),
          affine,
          eps};
}

template <class T>
ResidualNormGradParams<T> residual_norm_grad_params(const ResidualNormGradTensors& t, bool affine, double eps) {
  return {const_data<T>(t.grad_residual),
          const_data<T>(t.grad_y),
          const_data<T>(t.grad_y2),
          const_data<T>(t.residual),
          row_table<T>(t.gate, t.rows),
          row_table<T>(t.gate2, t.rows),
          row_table<T>(t.scale, t.rows),
          row_table<T>(t.scale2, t.rows),
          mutable_data<T>(t.grad_x),
          mutable_data<T>(t.grad_branch),
          mutable_data<T>(t.grad_branch2),
          row_layout(t.like, t.rows, {&t.gate, &t.gate2, &t.scale, &t.scale2}),
          affine,
          eps};
}

// The functional ops, over the `.out` ones of a backend: results that are not wanted are empty.
inline MaybeTensor wanted_result(const Tensor& x, bool wanted) {
  return wanted ? MaybeTensor(empty_contiguous(x)) : MaybeTensor();
}

inline Tensor result_or_empty(const Tensor& x, const MaybeTensor& t) {
  const int64_t none[] = {0};
  return t.has_value() ? *t : torch::stable::new_empty(x, {none, 1});
}

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

template <auto kOut>
ThreeTensors residual_norm_functional(const Tensor& x, const MaybeTensor& branch, const MaybeTensor& gate,
                                      const MaybeTensor& branch2, const MaybeTensor& gate2, const MaybeTensor& scale,
                                      const MaybeTensor& shift, const MaybeTensor& scale2, const MaybeTensor& shift2,
                                      const MaybeTensor& rows, bool affine, double eps) {
  const MaybeTensor residual = wanted_result(x, branch.has_value());
  const MaybeTensor y = wanted_result(x, scale.has_value());
  const MaybeTensor y2 = wanted_result(x, scale2.has_value());
  kOut(x, branch, gate, branch2, gate2, scale, shift, scale2, shift2, rows, affine, eps, residual, y, y2);
  return {result_or_empty(x, residual), result_or_empty(x, y), result_or_empty(x, y2)};
}

template <auto kOut>
ThreeTensors residual_norm_input_grad_functional(const MaybeTensor& grad_residual, const MaybeTensor& grad_y,
                                                 const MaybeTensor& grad_y2, const MaybeTensor& residual,
                                                 const MaybeTensor& gate, const MaybeTensor& gate2,
                                                 const MaybeTensor& scale, const MaybeTensor& scale2,
                                                 const MaybeTensor& rows, bool affine, double eps) {
  const Tensor& like = any_gradient(grad_residual, grad_y, grad_y2);
  const MaybeTensor grad_x = wanted_result(like, grad_y.has_value() || grad_y2.has_value());
  const MaybeTensor grad_branch = wanted_result(like, gate.has_value());
  const MaybeTensor grad_branch2 = wanted_result(like, gate2.has_value());
  kOut(grad_residual, grad_y, grad_y2, residual, gate, gate2, scale, scale2, rows, affine, eps, grad_x, grad_branch,
       grad_branch2);
  return {result_or_empty(like, grad_x), result_or_empty(like, grad_branch), result_or_empty(like, grad_branch2)};
}

}  // namespace stitchvm
