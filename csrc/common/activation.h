// activation: y = f(x + bias) for the pointwise nonlinearities of transformer MLPs, and the gradient for x. Shared by
// every backend; no torch headers.
#pragma once

#include <cmath>
#include <cstdint>

#include "macros.h"

namespace stitchvm {

enum class Activation : int { kGelu = 0, kGeluTanh = 1, kQuickGelu = 2, kSilu = 3 };

// x and y are contiguous, `size` elements each; element i meets bias[i % channels] where there is a bias.
template <class T>
struct ActivationParams {
  const T* x;
  const T* bias;
  T* y;
  int64_t size;
  int64_t channels;
  Activation kind;
};

template <class T>
struct ActivationGradParams {
  const T* grad;
  const T* x;
  const T* bias;
  T* grad_x;
  int64_t size;
  int64_t channels;
  Activation kind;
};

// The value and the derivative of each kind. `Math` is the backend's:
//   clamp(t)       t, or the nearer of two limits around 0; a NaN passes
//   exp2(t)        2^t for a t that was clamped
//   gelu(x), gelu_slope(x)
// For values the limits are so wide that exp2 is 0 and infinity there; for derivatives it must be finite.

// The exponent of the sigmoid: every kind but gelu is x / (1 + 2^t). The constants contain log2(e).
template <Activation kKind, class A>
STITCHVM_INLINE A sigmoid_exponent(A x) {
  if constexpr (kKind == Activation::kGeluTanh) {
    // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) * (x + 0.044715 x^3)
    return x * (A(-2.302208198144325) + A(-2.302208198144325 * 0.044715) * (x * x));
  } else if constexpr (kKind == Activation::kQuickGelu) {
    return A(-1.702 * 1.4426950408889634) * x;
  } else {
    return A(-1.4426950408889634) * x;
  }
}

template <Activation kKind, class A, class Math>
STITCHVM_INLINE A activation_value(A x, Math math) {
  if constexpr (kKind == Activation::kGelu) {
    return math.gelu(x);
  } else {
    return x / (A(1) + math.exp2(math.clamp(sigmoid_exponent<kKind>(x))));
  }
}

// d/dx [x s] = s * (1 - (1 - s) * ln(2) * x dt/dx) for s = 1 / (1 + 2^t). What multiplies s is clamped as t is: a large
// x must not outgrow an s that is not quite 0.
template <Activation kKind, class A, class Math>
STITCHVM_INLINE A activation_slope(A x, Math math) {
  if constexpr (kKind == Activation::kGelu) {
    return math.gelu_slope(x);
  } else {
    const A t = math.clamp(sigmoid_exponent<kKind>(x));
    const A e = math.exp2(t);
    const A s = A(1) / (A(1) + e);
    A x_dt = t;
    // x * d/dx (a x + b x^3) = 3 (a x + b x^3) - 2 a x
    if constexpr (kKind == Activation::kGeluTanh) x_dt = A(3) * t + A(2 * 2.302208198144325) * math.clamp(x);
    return s * (A(1) - A(0.69314718055994531) * x_dt * (e * s));
  }
}

// Calls f(Constant<kind>{}), so that a loop is compiled for each kind.
template <Activation kKind>
struct ActivationConstant {
  static constexpr Activation value = kKind;
};

template <class F>
STITCHVM_INLINE void dispatch_activation(Activation kind, F f) {
  switch (kind) {
    case Activation::kGelu:
      return f(ActivationConstant<Activation::kGelu>{});
    case Activation::kGeluTanh:
      return f(ActivationConstant<Activation::kGeluTanh>{});
    case Activation::kQuickGelu:
      return f(ActivationConstant<Activation::kQuickGelu>{});
    case Activation::kSilu:
      return f(ActivationConstant<Activation::kSilu>{});
  }
}

}  // namespace stitchvm
