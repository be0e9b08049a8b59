// guidance_step: next = latents_coef * z + velocity_coef * (u - c * grad) + noise_coef * noise with the velocity u of
// classifier-free guidance, and the norms of u and grad. Shared by every backend; no torch headers.
#pragma once

#include <cstdint>

#include "macros.h"

namespace stitchvm {

// All tensors are contiguous [batch, size], norms is [batch, 2]. T is the type of the latents, M that of the model.
// uncond, grad and noise may be null.
template <class T, class M>
struct GuidanceParams {
  const T* latents;
  const M* cond;
  const M* uncond;
  const T* grad;
  const T* noise;
  T* out;
  T* norms;
  int64_t batch;
  int64_t size;
  double guidance_scale;
  double strength;
  bool relative;
  double latents_coef;
  double velocity_coef;
  double noise_coef;
};

template <class A>
STITCHVM_INLINE A guided_velocity(A cond, A uncond, A guidance_scale) {
  return uncond + guidance_scale * (cond - uncond);
}

// c = amount * unit. For a relative strength, unit brings the gradient to length 1 before amount gives it its own: one
// factor for gradients of 1e-38 would not fit float32.
template <class A>
struct GuidanceFactor {
  A unit;
  A amount;
};

template <class A>
STITCHVM_INLINE GuidanceFactor<A> guidance_factor(double velocity_norm, double grad_norm, double strength,
                                                  bool relative) {
  if (!relative) return {A(1), A(strength)};
  if (!(grad_norm > 0.0)) return {A(0), A(0)};
  const double inverse = 1.0 / grad_norm;
  const A unit = A(inverse < 1e38 ? inverse : 1e38);
  return {unit, A(strength * velocity_norm / (grad_norm * static_cast<double>(unit)))};
}

}  // namespace stitchvm
