// resample_tokens: from tensors to checked params. Shape errors are raised in Python; these guard direct calls of the
// op.
#pragma once

#include "../common/resample_tokens.h"
#include "args.h"

namespace stitchvm {

inline void check_tokens(const char* op, const Tensor& tokens, int64_t h, int64_t w, const char* name) {
  STD_TORCH_CHECK(h >= 1 && h <= kMaxGridSide && w >= 1 && w <= kMaxGridSide, op, ": grid sides must lie in [1, ",
                  kMaxGridSide, "]");
  STD_TORCH_CHECK(tokens.dim() == 3 && tokens.size(1) == h * w, op, ": ", name, " must be [B, h * w, C]");
}

inline void check_resample(const char* op, const Tensor& src, int64_t src_h, int64_t src_w, const Tensor& dst,
                           int64_t dst_h, int64_t dst_w) {
  check_tokens(op, src, src_h, src_w, "the input");
  check_tokens(op, dst, dst_h, dst_w, "the output");
  check_like(op, src, dst, "the output");
  STD_TORCH_CHECK(dst.size(0) == src.size(0) && dst.size(2) == src.size(2) && dst.is_contiguous(), op,
                  ": the output must be contiguous and have the batch and channels of the input");
}

template <class T>
ResampleParams<T> resample_params(const Tensor& src, const Tensor& dst, int64_t in_h, int64_t in_w, int64_t out_h,
                                  int64_t out_w) {
  return {const_data<T>(src),
          mutable_data<T>(dst),
          src.size(0),
          src.size(2),
          static_cast<int>(in_h),
          static_cast<int>(in_w),
          static_cast<int>(out_h),
          static_cast<int>(out_w)};
}

// The [B, h * w, C] result for `src`, uninitialised.
inline Tensor empty_tokens(const char* op, const Tensor& src, int64_t h, int64_t w) {
  STD_TORCH_CHECK(src.dim() == 3 && h >= 1 && w >= 1, op, ": expected [B, h * w, C] and grid sides of at least 1");
  const int64_t sizes[] = {src.size(0), h * w, src.size(2)};
  return torch::stable::new_empty(src, {sizes, 3});
}

}  // namespace stitchvm
