// qk_norm: from tensors to checked params. Shape and dtype errors are raised in Python; these guard direct calls of the
// op.
#pragma once

#include <optional>
#include <tuple>

#include "../common/qk_norm.h"
#include "args.h"

namespace stitchvm {

using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

inline int64_t qk_tokens(const OptionalTensor& t) { return t ? t->size(1) : 0; }

inline void check_qk_rows(const char* op, const Tensor& q, const Tensor& t, const char* name) {
  check_like(op, q, t, name);
  STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == q.size(0) && t.size(2) == q.size(2), op, ": ", name,
                  " must be [B, N, C] with the batch and channels of q");
}

inline void check_qk_weight(const char* op, const Tensor& q, const OptionalTensor& t, int64_t dim, const char* name) {
  if (!t) return;
  check_like(op, q, *t, name);
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == dim, op, ": ", name, " must have one element per channel of a head");
}

// cos and sin for `tokens` joint tokens.
inline void check_rotary(const char* op, const Tensor& q, const OptionalTensor& cos, const OptionalTensor& sin,
                         int64_t q_tokens, int64_t k_tokens, int64_t dim) {
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), op, ": cos and sin must be given together");
  if (!cos) return;
  STD_TORCH_CHECK(q_tokens == k_tokens && dim % 2 == 0, op, ": rotary needs as many queries as keys and an even head");
  for (const Tensor* t : {&*cos, &*sin}) {
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->device() == q.device() && t->dim() == 2 &&
                        t->size(0) == q_tokens && t->size(1) == dim,
                    op, ": cos and sin must be float32 [tokens, channels of a head] on the device of q");
  }
}

// The inputs of qk_norm, checked, with contiguous channels; undefined where absent.
struct QkNormInputs {
  Tensor q, k, v, context_q, context_k, context_v;
  Tensor q_weight, k_weight, context_q_weight, context_k_weight, cos, sin;
  int64_t heads;
  bool context_first;
  double eps;
};

inline Tensor qk_rows(const Tensor& t) { return t.size(2) <= 1 || t.stride(2) == 1 ? t : torch::stable::contiguous(t); }
inline Tensor qk_rows(const OptionalTensor& t) { return t ? qk_rows(*t) : Tensor(); }

inline Tensor contiguous_or_none(const OptionalTensor& t) { return t ? torch::stable::contiguous(*t) : Tensor(); }

inline void check_qk_norm(const Tensor& q, const Tensor& k, const OptionalTensor& v, const OptionalTensor& context_q,
                          const OptionalTensor& context_k, const OptionalTensor& context_v,
                          const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                          const OptionalTensor& context_q_weight, const OptionalTensor& context_k_weight,
                          const OptionalTensor& cos, const OptionalTensor& sin, int64_t heads) {
  const char* op = "qk_norm";
  STD_TORCH_CHECK(q.dim() == 3 && heads >= 1 && q.size(2) >= 1 && q.size(2) % heads == 0, op,
                  ": q must be [B, N, heads * D]");
  const int64_t dim = q.size(2) / heads;
  check_qk_rows(op, q, k, "k");
  if (v) check_qk_rows(op, q, *v, "v");
  if (context_q) check_qk_rows(op, q, *context_q, "context_q");
  if (context_k) check_qk_rows(op, q, *context_k, "context_k");
  if (context_v) check_qk_rows(op, q, *context_v, "context_v");
  STD_TORCH_CHECK(!v || v->size(1) == k.size(1), op, ": v must have the tokens of k");
  STD_TORCH_CHECK(context_k || !context_q, op, ": context_q needs context_k");
  STD_TORCH_CHECK(context_v.has_value() == (v.has_value() && context_k.has_value()), op,
                  ": context_v must be given where v and context_k are");
  STD_TORCH_CHECK(!context_v || context_v->size(1) == context_k->size(1), op,
                  ": context_v must have the tokens of context_k");
  check_qk_weight(op, q, q_weight, dim, "q_weight");
  check_qk_weight(op, q, k_weight, dim, "k_weight");
  check_qk_weight(op, q, context_q_weight, dim, "context_q_weight");
  check_qk_weight(op, q, context_k_weight, dim, "context_k_weight");
  check_rotary(op, q, cos, sin, q.size(1) + qk_tokens(context_q), k.size(1) + qk_tokens(context_k), dim);
}

// The inputs of the op, checked.
inline QkNormInputs qk_norm_inputs(const Tensor& q, const Tensor& k, const OptionalTensor& v,
                                   const OptionalTensor& context_q, const OptionalTensor& context_k,
                                   const OptionalTensor& context_v, const OptionalTensor& q_weight,
                                   const OptionalTensor& k_weight, const OptionalTensor& context_q_weight,
                                   const OptionalTensor& context_k_weight, const OptionalTensor& cos,
                                   const OptionalTensor& sin, int64_t heads, bool context_first, double eps) {
  check_qk_norm(q, k, v, context_q, context_k, context_v, q_weight, k_weight, context_q_weight, context_k_weight, cos,
                sin, heads);
  return {qk_rows(q),
          qk_rows(k),
          qk_rows(v),
          qk_rows(context_q),
          qk_rows(context_k),
          qk_rows(context_v),
          contiguous_or_none(q_weight),
          contiguous_or_none(k_weight),
          contiguous_or_none(context_q_weight),
          contiguous_or_none(context_k_weight),
          contiguous_or_none(cos),
          contiguous_or_none(sin),
          heads,
          context_first,
          eps};
}

inline void check_qk_result(const char* op, const Tensor& t, ScalarType dtype, const Tensor& q,
                            std::initializer_list<int64_t> sizes, const char* name) {
  bool same = t.dim() == static_cast<int64_t>(sizes.size()) && t.scalar_type() == dtype && t.device() == q.device();
  int64_t d = 0;
  for (const int64_t size : sizes) {
    same = same && t.size(d) == size;
    ++d;
  }
  STD_TORCH_CHECK(same && t.is_contiguous(), op, ": ", name, " must be contiguous, of the result's shape and dtype");
}

// The dtype of the saved 1 / RMS.
inline ScalarType rstd_dtype(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor new_empty_sized(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, dtype);
}

using QkNormResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

inline QkNormResult empty_qk_norm(const Tensor& q, const Tensor& k, const OptionalTensor& v,
                                  const OptionalTensor& context_q, const OptionalTensor& context_k, int64_t heads) {
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && heads >= 1, "qk_norm: q and k must be [B, N, heads * D]");
  const ScalarType dtype = q.scalar_type(), wide = rstd_dtype(q);
  const int64_t b = q.size(0), dim = q.size(2) / heads;
  const int64_t sq = q.size(1) + qk_tokens(context_q), sk = k.size(1) + qk_tokens(context_k);
  return {new_empty_sized(q, {b, sq, heads, dim}, dtype), new_empty_sized(q, {b, sk, heads, dim}, dtype),
          v ? new_empty_sized(q, {b, sk, heads, dim}, dtype) : new_empty_sized(q, {0}, dtype),
          new_empty_sized(q, {b, sq, heads}, wide), new_empty_sized(q, {b, sk, heads}, wide)};
}

inline void check_qk_norm_results(const Tensor& q, const Tensor& k, const OptionalTensor& v,
                                  const OptionalTensor& context_q, const OptionalTensor& context_k, int64_t heads,
                                  const Tensor& joint_q, const Tensor& joint_k, const OptionalTensor& joint_v,
                                  const Tensor& q_rstd, const Tensor& k_rstd) {
  const char* op = "qk_norm";
  const ScalarType dtype = q.scalar_type(), wide = rstd_dtype(q);
  const int64_t b = q.size(0), dim = q.size(2) / heads;
  const int64_t sq = q.size(1) + qk_tokens(context_q), sk = k.size(1) + qk_tokens(context_k);
  check_qk_result(op, joint_q, dtype, q, {b, sq, heads, dim}, "joint_q");
  check_qk_result(op, joint_k, dtype, q, {b, sk, heads, dim}, "joint_k");
  STD_TORCH_CHECK(!v || joint_v, op, ": joint_v must be given where v is");
  if (v) check_qk_result(op, *joint_v, dtype, q, {b, sk, heads, dim}, "joint_v");
  check_qk_result(op, q_rstd, wide, q, {b, sq, heads}, "q_rstd");
  check_qk_result(op, k_rstd, wide, q, {b, sk, heads}, "k_rstd");
}

template <class T>
const T* data_or_null(const Tensor& t) {
  return t.defined() ? const_data<T>(t) : nullptr;
}

template <class T>
QkRows<T> qk_rows_of(const Tensor& t) {
  if (!t.defined()) return {nullptr, 0, 0};
  return {const_data<T>(t), t.stride(0), t.stride(1)};
}

template <class T, class A>
QkStream<T, A> qk_stream(const Tensor& image, const Tensor& context, const Tensor& weight, const Tensor& context_weight,
                         const Tensor& joint, A* rstd) {
  return {qk_rows_of<T>(image),    qk_rows_of<T>(context),
          data_or_null<T>(weight), data_or_null<T>(context_weight),
          mutable_data<T>(joint),  rstd,
          image.size(1),           context.defined() ? context.size(1) : 0};
}

// `in` has passed check_qk_norm, the results check_qk_norm_results.
template <class T, class A>
QkNormParams<T, A> qk_norm_params(const QkNormInputs& in, const Tensor& joint_q, const Tensor& joint_k,
                                  const OptionalTensor& joint_v, const Tensor& q_rstd, const Tensor& k_rstd) {
  QkNormParams<T, A> p{};
  p.q = qk_stream<T, A>(in.q, in.context_q, in.q_weight, in.context_q_weight, joint_q, mutable_data<A>(q_rstd));
  p.k = qk_stream<T, A>(in.k, in.context_k, in.k_weight, in.context_k_weight, joint_k, mutable_data<A>(k_rstd));
  if (in.v.defined()) p.v = qk_stream<T, A>(in.v, in.context_v, Tensor(), Tensor(), *joint_v, nullptr);
  p.cos = data_or_null<float>(in.cos);
  p.sin = data_or_null<float>(in.sin);
  p.batch = in.q.size(0);
  p.heads = in.heads;
  p.dim = in.q.size(2) / in.heads;
  p.context_first = in.context_first;
  p.eps = in.eps;
  return p;
}

// The inputs of qk_norm_input_grad, checked; grad_q and grad_k have contiguous channels, the rest is contiguous.
struct QkNormGradInputs {
  Tensor grad_q, grad_k, joint_q, joint_k, q_rstd, k_rstd;
  Tensor q_weight, k_weight, context_q_weight, context_k_weight, cos, sin;
  int64_t context_q_tokens, context_k_tokens;
  bool context_first;
};

inline Tensor qk_heads(const Tensor& t) {
  return t.size(3) <= 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
}

inline void check_qk_norm_grad(const Tensor& grad_q, const Tensor& grad_k, const Tensor& joint_q, const Tensor& joint_k,
                               const Tensor& q_rstd, const Tensor& k_rstd, const OptionalTensor& q_weight,
                               const OptionalTensor& k_weight, const OptionalTensor& context_q_weight,
                               const OptionalTensor& context_k_weight, const OptionalTensor& cos,
                               const OptionalTensor& sin, int64_t context_q_tokens, int64_t context_k_tokens) {
  const char* op = "qk_norm_input_grad";
  STD_TORCH_CHECK(joint_q.dim() == 4 && joint_k.dim() == 4 && joint_q.size(3) >= 1, op,
                  ": joint_q and joint_k must be [B, S, H, D]");
  check_same_shape(op, joint_q, grad_q, "grad_q");
  check_same_shape(op, joint_k, grad_k, "grad_k");
  check_like(op, joint_q, joint_k, "joint_k");
  for (int64_t d : {0, 2, 3}) STD_TORCH_CHECK(joint_k.size(d) == joint_q.size(d), op, ": joint_k must fit joint_q");
  for (const auto& [rstd, joint] : {std::pair(&q_rstd, &joint_q), std::pair(&k_rstd, &joint_k)}) {
    STD_TORCH_CHECK(rstd->scalar_type() == rstd_dtype(joint_q) && rstd->device() == joint_q.device() &&
                        rstd->dim() == 3 && rstd->size(0) == joint->size(0) && rstd->size(1) == joint->size(1) &&
                        rstd->size(2) == joint->size(2),
                    op, ": q_rstd and k_rstd must be as qk_norm returns them");
  }
  STD_TORCH_CHECK(context_q_tokens >= 0 && context_q_tokens <= joint_q.size(1) && context_k_tokens >= 0 &&
                      context_k_tokens <= joint_k.size(1),
                  op, ": more context tokens than tokens");
  const int64_t dim = joint_q.size(3);
  check_qk_weight(op, joint_q, q_weight, dim, "q_weight");
  check_qk_weight(op, joint_q, k_weight, dim, "k_weight");
  check_qk_weight(op, joint_q, context_q_weight, dim, "context_q_weight");
  check_qk_weight(op, joint_q, context_k_weight, dim, "context_k_weight");
  check_rotary(op, joint_q, cos, sin, joint_q.size(1), joint_k.size(1), dim);
}

// The inputs of the gradient, checked.
inline QkNormGradInputs qk_norm_grad_inputs(const Tensor& grad_q, const Tensor& grad_k, const Tensor& joint_q,
                                            const Tensor& joint_k, const Tensor& q_rstd, const Tensor& k_rstd,
                                            const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                                            const OptionalTensor& context_q_weight,
                                            const OptionalTensor& context_k_weight, const OptionalTensor& cos,
                                            const OptionalTensor& sin, int64_t context_q_tokens,
                                            int64_t context_k_tokens, bool context_first) {
  check_qk_norm_grad(grad_q, grad_k, joint_q, joint_k, q_rstd, k_rstd, q_weight, k_weight, context_q_weight,
                     context_k_weight, cos, sin, context_q_tokens, context_k_tokens);
  return {qk_heads(grad_q),
          qk_heads(grad_k),
          torch::stable::contiguous(joint_q),
          torch::stable::contiguous(joint_k),
          torch::stable::contiguous(q_rstd),
          torch::stable::contiguous(k_rstd),
          contiguous_or_none(q_weight),
          contiguous_or_none(k_weight),
          contiguous_or_none(context_q_weight),
          contiguous_or_none(context_k_weight),
          contiguous_or_none(cos),
          contiguous_or_none(sin),
          context_q_tokens,
          context_k_tokens,
          context_first};
}

using QkNormGradResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

inline QkNormGradResult empty_qk_norm_grad(const Tensor& joint_q, const Tensor& joint_k, int64_t context_q_tokens,
                                           int64_t context_k_tokens) {
  STD_TORCH_CHECK(joint_q.dim() == 4 && joint_k.dim() == 4 && context_q_tokens >= 0 &&
                      context_q_tokens <= joint_q.size(1) && context_k_tokens >= 0 &&
                      context_k_tokens <= joint_k.size(1),
                  "qk_norm_input_grad: joint_q and joint_k must be [B, S, H, D] with at most S context tokens");
  const ScalarType dtype = joint_q.scalar_type();
  const int64_t b = joint_q.size(0), c = joint_q.size(2) * joint_q.size(3);
  const auto context = [&](int64_t tokens) {
    return tokens > 0 ? new_empty_sized(joint_q, {b, tokens, c}, dtype) : new_empty_sized(joint_q, {0}, dtype);
  };
  return {new_empty_sized(joint_q, {b, joint_q.size(1) - context_q_tokens, c}, dtype),
          new_empty_sized(joint_q, {b, joint_k.size(1) - context_k_tokens, c}, dtype), context(context_q_tokens),
          context(context_k_tokens)};
}

inline void check_qk_norm_grad_results(const Tensor& joint_q, const Tensor& joint_k, int64_t context_q_tokens,
                                       int64_t context_k_tokens, const Tensor& grad_input_q, const Tensor& grad_input_k,
                                       const OptionalTensor& grad_context_q, const OptionalTensor& grad_context_k) {
  const char* op = "qk_norm_input_grad";
  const ScalarType dtype = joint_q.scalar_type();
  const int64_t b = joint_q.size(0), c = joint_q.size(2) * joint_q.size(3);
  check_qk_result(op, grad_input_q, dtype, joint_q, {b, joint_q.size(1) - context_q_tokens, c}, "grad_input_q");
  check_qk_result(op, grad_input_k, dtype, joint_q, {b, joint_k.size(1) - context_k_tokens, c}, "grad_input_k");
  STD_TORCH_CHECK((context_q_tokens == 0 || grad_context_q) && (context_k_tokens == 0 || grad_context_k), op,
                  ": grad_context_q and grad_context_k must be given where there are context tokens");
  if (context_q_tokens > 0) {
    check_qk_result(op, *grad_context_q, dtype, joint_q, {b, context_q_tokens, c}, "grad_context_q");
  }
  if (context_k_tokens > 0) {
    check_qk_result(op, *grad_context_k, dtype, joint_q, {b, context_k_tokens, c}, "grad_context_k");
  }
}

template <class T, class A>
QkGradStream<T, A> qk_grad_stream(const Tensor& grad, const Tensor& joint, const Tensor& rstd, const Tensor& weight,
                                  const Tensor& context_weight, const Tensor& grad_image,
                                  const OptionalTensor& grad_context, int64_t context_tokens) {
  return {const_data<T>(grad),
          grad.stride(0),
          grad.stride(1),
          grad.stride(2),
          const_data<T>(joint),
          const_data<A>(rstd),
          data_or_null<T>(weight),
          data_or_null<T>(context_weight),
          mutable_data<T>(grad_image),
          context_tokens > 0 ? mutable_data<T>(*grad_context) : nullptr,
          joint.size(1) - context_tokens,
          context_tokens};
}

// `in` has passed check_qk_norm_grad, the results check_qk_norm_grad_results.
template <class T, class A>
QkNormGradParams<T, A> qk_norm_grad_params(const QkNormGradInputs& in, const Tensor& grad_input_q,
                                           const Tensor& grad_input_k, const OptionalTensor& grad_context_q,
                                           const OptionalTensor& grad_context_k) {
  return {qk_grad_stream<T, A>(in.grad_q, in.joint_q, in.q_rstd, in.q_weight, in.context_q_weight, grad_input_q,
                               grad_context_q, in.context_q_tokens),
          qk_grad_stream<T, A>(in.grad_k, in.joint_k, in.k_rstd, in.k_weight, in.context_k_weight, grad_input_k,
                               grad_context_k, in.context_k_tokens),
          data_or_null<float>(in.cos),
          data_or_null<float>(in.sin),
          in.joint_q.size(0),
          in.joint_q.size(2),
          in.joint_q.size(3),
          in.context_first};
}

}  // namespace stitchvm
