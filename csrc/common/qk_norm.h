// qk_norm: RMSNorm of every head of q and k, rotary embedding, and the joint image + text layout; and the gradient for
// the inputs. Shared by every backend; no torch headers.
#pragma once

#include <cstdint>

#include "macros.h"
#include "pair.h"

namespace stitchvm {

// Channel c of token n of sample b is data[b * batch_stride + n * token_stride + c], so that a chunk of a wider
// projection needs no copy.
template <class T>
struct QkRows {
  const T* data;
  int64_t batch_stride;
  int64_t token_stride;
};

// One of q, k and v. The result `joint` is a contiguous [batch, tokens + context_tokens, heads, dim], rstd a contiguous
// [batch, tokens + context_tokens, heads]. Tokens without a weight are not normalised. v has no weights and no rstd.
template <class T, class A>
struct QkStream {
  QkRows<T> image;
  QkRows<T> context;
  const T* weight;
  const T* context_weight;
  T* joint;
  A* rstd;
  int64_t tokens;
  int64_t context_tokens;
};

template <class T, class A>
struct QkNormParams {
  QkStream<T, A> q;
  QkStream<T, A> k;
  QkStream<T, A> v;  // no tokens where there is no v
  const float* cos;  // [tokens + context_tokens, dim], or null
  const float* sin;
  int64_t batch;
  int64_t heads;
  int64_t dim;
  bool context_first;
  double eps;
};

// One of q and k: the gradient of `joint`, whose head h of token n of sample b starts at grad + b * grad_batch_stride +
// n * grad_token_stride + h * grad_head_stride; the results are contiguous [batch, tokens, heads * dim].
template <class T, class A>
struct QkGradStream {
  const T* grad;
  int64_t grad_batch_stride;
  int64_t grad_token_stride;
  int64_t grad_head_stride;
  const T* joint;
  const A* rstd;
  const T* weight;
  const T* context_weight;
  T* grad_image;
  T* grad_context;
  int64_t tokens;
  int64_t context_tokens;
};

template <class T, class A>
struct QkNormGradParams {
  QkGradStream<T, A> q;
  QkGradStream<T, A> k;
  const float* cos;
  const float* sin;
  int64_t batch;
  int64_t heads;
  int64_t dim;
  bool context_first;
};

// Where a token of the joint sequence comes from.
struct QkToken {
  bool context;
  int64_t index;
};

STITCHVM_INLINE QkToken qk_token(int64_t joint_index, int64_t tokens, int64_t context_tokens, bool context_first) {
  const int64_t first = context_first ? context_tokens : tokens;
  const bool in_first = joint_index < first;
  return {in_first == context_first, in_first ? joint_index : joint_index - first};
}

// The rotary embedding of a pair of channels, out = x * cos + (-x.second, x.first) * sin, each channel with its own
// cosine and sine. Here and below, sums of products that alternate in sign are written as sums only: gcc 12 contracts
// the alternation (vfmaddsub) even where contraction is off.
template <class A>
STITCHVM_INLINE Pair<A> rotate(Pair<A> x, Pair<A> cos, Pair<A> sin) {
  return {x.first * cos.first + -x.second * sin.first, x.second * cos.second + x.first * sin.second};
}

// Its transpose, for gradients.
template <class A>
STITCHVM_INLINE Pair<A> rotate_transposed(Pair<A> g, Pair<A> cos, Pair<A> sin) {
  return {g.first * cos.first + g.second * sin.second, g.second * cos.second + -g.first * sin.first};
}

// Its inverse. The determinant is 1 for a rotation, but cosines and sines may carry a scale.
template <class A>
STITCHVM_INLINE Pair<A> rotate_inverse(Pair<A> y, Pair<A> cos, Pair<A> sin) {
  const A scale = A(1) / (cos.first * cos.second + sin.first * sin.second);
  return {(y.first * cos.second + y.second * sin.first) * scale,
          (y.second * cos.first + -y.first * sin.second) * scale};
}

// With z = w * n the weighted, normalised value (before the rotation) and g the gradient for z:
// dx = rstd * (g * w - n * mean(g * z)). The mean is that of gradient times result, which the rotation leaves alone.
template <class A>
STITCHVM_INLINE A qk_norm_grad_value(A g, A z, A weight, A inverse_weight, A rstd, A mean) {
  return rstd * (g * weight - z * inverse_weight * mean);
}

}  // namespace stitchvm
