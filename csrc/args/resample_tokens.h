// resample_tokens: from tensors to checked params. Shape errors are raised in Python; these guard direct calls of the
// op.
#pragma once

#include <optional>

#include "../common/resample_tokens.h"
#include "args.h"

namespace stitchvm {

// The grids of one call, and the tokens in front of the output's grid.
struct Grids {
  int64_t h;
  int64_t w;
  int64_t out_h;
  int64_t out_w;
  int64_t prefix_tokens;

  int64_t tokens() const { return h * w; }
  int64_t out_tokens() const { return prefix_tokens + out_h * out_w; }
};

inline void check_grids(const char* op, const Grids& g) {
  for (const int64_t side : {g.h, g.w, g.out_h, g.out_w}) {
    STD_TORCH_CHECK(side >= 1 && side <= kMaxGridSide, op, ": grid sides must lie in [1, ", kMaxGridSide, "]");
  }
  STD_TORCH_CHECK(g.prefix_tokens >= 0, op, ": prefix_tokens must not be negative");
}

inline int64_t rows_of(const std::optional<Tensor>& t) { return t && t->dim() == 2 ? t->size(0) : 0; }

// t must be [sizes...] and like x.
inline void check_sizes(const char* op, const Tensor& x, const Tensor& t, std::initializer_list<int64_t> sizes,
                        const char* name) {
  check_like(op, x, t, name);
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  int64_t d = 0;
  for (const int64_t size : sizes) {
    same = same && t.size(d) == size;
    ++d;
  }
  STD_TORCH_CHECK(same, op, ": ", name, " has another shape than expected");
}

inline void check_resample(const char* op, const Tensor& x, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& position, const std::optional<Tensor>& prefix,
                           const std::optional<Tensor>& residual, const Grids& g, const Tensor& y) {
  check_grids(op, g);
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) == g.tokens(), op, ": x must be [B, h * w, C]");
  const int64_t batch = x.size(0), channels = x.size(2);
  if (bias) check_sizes(op, x, *bias, {channels}, "bias");
  if (position) check_sizes(op, x, *position, {g.out_tokens(), channels}, "position");
  if (prefix) check_sizes(op, x, *prefix, {g.prefix_tokens, channels}, "prefix");
  if (residual) check_sizes(op, x, *residual, {batch, g.out_h * g.out_w, channels}, "residual");
  check_sizes(op, x, y, {batch, g.out_tokens(), channels}, "out");
  STD_TORCH_CHECK(y.is_contiguous(), op, ": out must be contiguous");
}

inline void check_resample_grad(const char* op, const Tensor& grad, const Grids& g, const Tensor& grad_x) {
  check_grids(op, g);
  STD_TORCH_CHECK(grad.dim() == 3 && grad.size(1) == g.out_tokens(), op,
                  ": grad must be [B, prefix_tokens + out_h * out_w, C]");
  check_sizes(op, grad, grad_x, {grad.size(0), g.tokens(), grad.size(2)}, "out");
  STD_TORCH_CHECK(grad_x.is_contiguous(), op, ": out must be contiguous");
}

// The [B, tokens, C] result for `like`, uninitialised.
inline Tensor empty_tokens(const char* op, const Tensor& like, const Grids& g, int64_t tokens) {
  check_grids(op, g);
  STD_TORCH_CHECK(like.dim() == 3, op, ": expected [B, N, C]");
  const int64_t sizes[] = {like.size(0), tokens, like.size(2)};
  return torch::stable::new_empty(like, {sizes, 3});
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(torch::stable::contiguous(*t)) : std::nullopt;
}

template <class T>
const T* const_data(const std::optional<Tensor>& t) {
  return t ? const_data<T>(*t) : nullptr;
}

// All tensors have passed check_resample and are contiguous.
template <class T>
ResampleParams<T> resample_params(const Tensor& x, const std::optional<Tensor>& bias,
                                  const std::optional<Tensor>& position, const std::optional<Tensor>& prefix,
                                  const std::optional<Tensor>& residual, const Grids& g, const Tensor& y) {
  return {const_data<T>(x),
          const_data<T>(bias),
          const_data<T>(position),
          const_data<T>(prefix),
          const_data<T>(residual),
          mutable_data<T>(y),
          x.size(0),
          x.size(2),
          g.prefix_tokens,
          static_cast<int>(g.h),
          static_cast<int>(g.w),
          static_cast<int>(g.out_h),
          static_cast<int>(g.out_w)};
}

template <class T>
ResampleGradParams<T> resample_grad_params(const Tensor& grad, const Grids& g, const Tensor& grad_x) {
  return {const_data<T>(grad),   mutable_data<T>(grad_x),   grad.size(0),
          grad.size(2),          g.prefix_tokens,           static_cast<int>(g.h),
          static_cast<int>(g.w), static_cast<int>(g.out_h), static_cast<int>(g.out_w)};
}

}  // namespace stitchvm
