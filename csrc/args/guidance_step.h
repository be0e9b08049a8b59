// guidance_step: from tensors to checked params. Shape and dtype errors are raised in Python; these guard direct calls
// of the op.
#pragma once

#include <optional>

#include "../common/guidance_step.h"
#include "args.h"

namespace stitchvm {

inline void check_guidance(const Tensor& latents, const Tensor& cond, const std::optional<Tensor>& uncond,
                           const std::optional<Tensor>& grad, const std::optional<Tensor>& noise, const Tensor& out,
                           const Tensor& norms) {
  constexpr const char* kOp = "guidance_step";
  STD_TORCH_CHECK(latents.dim() >= 1, kOp, ": latents must be [B, ...]");
  bool same = cond.dim() == latents.dim() && cond.device() == latents.device();
  for (int64_t d = 0; same && d < latents.dim(); ++d) same = cond.size(d) == latents.size(d);
  STD_TORCH_CHECK(same, kOp, ": cond must have the shape and device of latents");
  if (uncond) check_same_shape(kOp, cond, *uncond, "uncond");
  if (grad) check_same_shape(kOp, latents, *grad, "grad");
  if (noise) check_same_shape(kOp, latents, *noise, "noise");
  check_out(kOp, latents, out);
  check_like(kOp, latents, norms, "norms");
  STD_TORCH_CHECK(norms.dim() == 2 && norms.size(0) == latents.size(0) && norms.size(1) == 2 && norms.is_contiguous(),
                  kOp, ": norms must be [B, 2] and contiguous");
}

inline std::optional<Tensor> contiguous_or_none(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(torch::stable::contiguous(*t)) : std::nullopt;
}

inline Tensor empty_norms(const Tensor& latents) {
  STD_TORCH_CHECK(latents.dim() >= 1, "guidance_step: latents must be [B, ...]");
  const int64_t sizes[] = {latents.size(0), 2};
  return torch::stable::new_empty(latents, {sizes, 2});
}

// All tensors have passed check_guidance and are contiguous.
template <class T, class M>
GuidanceParams<T, M> guidance_params(const Tensor& latents, const Tensor& cond, const std::optional<Tensor>& uncond,
                                     const std::optional<Tensor>& grad, const std::optional<Tensor>& noise,
                                     double guidance_scale, double strength, bool relative, double latents_coef,
                                     double velocity_coef, double noise_coef, const Tensor& out, const Tensor& norms) {
  const int64_t batch = latents.size(0);
  return {const_data<T>(latents),
          const_data<M>(cond),
          uncond ? const_data<M>(*uncond) : nullptr,
          grad ? const_data<T>(*grad) : nullptr,
          noise ? const_data<T>(*noise) : nullptr,
          mutable_data<T>(out),
          mutable_data<T>(norms),
          batch,
          batch > 0 ? latents.numel() / batch : 0,
          guidance_scale,
          strength,
          relative,
          latents_coef,
          velocity_coef,
          noise_coef};
}

}  // namespace stitchvm
