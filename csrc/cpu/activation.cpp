// activation on the CPU: pointwise, over any range of elements.
#include "../args/activation.h"

#include "launch.h"
#include "map.h"
#include "vector_math.h"

namespace stitchvm {
namespace {

// exp(-kReach^2 / 2) = 2^-127, which exp2 makes 0.
constexpr float kReach = 13.2686f;

template <class A>
struct Limits {
  A low;
  A high;
  A reach;

  // |x| up to `reach`; a NaN passes.
  STITCHVM_INLINE A distance(A x) const { return std::fabs(x) > reach ? reach : std::fabs(x); }

  STITCHVM_INLINE A clamp(A t) const {
    const A raised = t < low ? low : t;
    return raised > high ? high : raised;
  }
};

// gelu's slope at x, from the tail of the normal distribution and its density, which share one exponential.
template <class Math>
STITCHVM_INLINE float gelu_slope_by_tail(const Math& math, float x) {
  const float a = math.distance(x);
  const float bell = math.exp2(-0.721347520f * (a * a));                        // exp(-a^2 / 2)
  const float left = bell * Math::tail_over_bell(a) - 0.398942280f * a * bell;  // the slope at -a
  return x < 0.0f ? left : 1.0f - left;
}

// Fits are minimax ones, found by iteratively reweighted least squares in double at Chebyshev nodes.
//
// gelu's value needs the normal distribution alone, and two forms of it that need no exponential are half the work. Its
// slope needs the density too: there the tail is Q(a) = exp(-a^2 / 2) R(t), t = 1 / (1 + p a), and the two share one
// exponential. R(t) is t times a polynomial, the fit of exp(a^2 / 2) erfc(a / sqrt(2)) / 2 over 0 <= a <= 14.5 in
// relative error; p is the best of a scan.
struct FloatMath : Limits<float> {
  STITCHVM_INLINE float exp2(float t) const {
    return exp2_in_range(t, [](float f) STITCHVM_LAMBDA { return exp2_fraction(f); });
  }

  // Relative error 2.3e-8; evaluated in float 3e-7.
  static STITCHVM_INLINE float tail_over_bell(float a) {
    const float t = 1.0f / (1.0f + 0.345f * a);
    float r = -0.0281518027f;
    r = r * t + 0.144233614f;
    r = r * t - 0.269153595f;
    r = r * t + 0.185054660f;
    r = r * t - 0.0362379402f;
    r = r * t + 0.111267723f;
    r = r * t + 0.117361993f;
    r = r * t + 0.138005242f;
    r = r * t + 0.137620106f;
    return r * t;
  }

  // x (1/2 + erf(x / sqrt(2)) / 2), the error function being x times a ratio of polynomials in x^2: the fit over |x| <=
  // 5.5 of the absolute error, 7e-9. Beyond, the ratio stays at its last value, which rounds to +-1/2 exactly. On the
  // left the absolute error is that of the sum, as in any form with the error function: up to 8e-7.
  STITCHVM_INLINE float gelu(float x) const {
    const float c = clamp(x);
    const float s = c * c;
    float p = 0.0189972892f;
    p = p * s + 5.30447721f;
    p = p * s + 140.982529f;
    p = p * s + 3905.84888f;
    p = p * s + 28269.4551f;
    p = p * s + 333144.812f;
    float q = s + 61.5012550f;
    q = q * s + 1573.65076f;
    q = q * s + 23921.3828f;
    q = q * s + 210038.766f;
    q = q * s + 835070.312f;
    return x * (0.5f + c * (p / q));
  }

  STITCHVM_INLINE float gelu_slope(float x) const { return gelu_slope_by_tail(*this, x); }
};

// As FloatMath with relative errors of up to 8e-6, where the result is rounded to bfloat16.
struct ShortMath : Limits<float> {
  STITCHVM_INLINE float exp2(float t) const {
    return exp2_in_range(t, [](float f) STITCHVM_LAMBDA { return exp2_fraction_short(f); });
  }

  static STITCHVM_INLINE float tail_over_bell(float a) {
    const float t = 1.0f / (1.0f + 0.31f * a);
    float r = -0.0739291683f;
    r = r * t + 0.180450410f;
    r = r * t + 0.0157446302f;
    r = r * t + 0.133429825f;
    r = r * t + 0.120441265f;
    r = r * t + 0.123860672f;
    return r * t;
  }

  // max(x, 0) - a Q(a) for a = |x|, with Q(a) = 1 / D(a)^16: D is the fit of Q^(-1/16) over a <= 6, exact at 0. The
  // relative error of Q is 1.3e-5 up to a = 3 and 4e-4 up to a = 5.
  STITCHVM_INLINE float gelu(float x) const {
    const float a = distance(x);
    float d = 1.77345635e-6f;
    d = d * a - 1.34030178e-5f;
    d = d * a + 1.31426146e-4f;
    d = d * a - 1.29131586e-4f;
    d = d * a + 3.60426563e-3f;
    d = d * a + 0.0219861045f;
    d = d * a + 0.0520905741f;
    d = d * a + 1.04427373f;
    d = d * d;
    d = d * d;
    d = d * d;
    return (x > 0.0f ? x : 0.0f) - a / (d * d);
  }

  STITCHVM_INLINE float gelu_slope(float x) const { return gelu_slope_by_tail(*this, x); }
};

struct DoubleMath : Limits<double> {
  STITCHVM_INLINE double exp2(double t) const { return std::exp2(t); }
  STITCHVM_INLINE double gelu(double x) const { return x * (0.5 * std::erfc(-0.70710678118654752 * x)); }
  STITCHVM_INLINE double gelu_slope(double x) const {
    return 0.5 * std::erfc(-0.70710678118654752 * x) + 0.39894228040143268 * x * std::exp(-0.5 * x * x);
  }
};

// `value` is for a function's value, else for its slope; gelu's value has limits of its own.
template <Activation kKind>
STITCHVM_INLINE FloatMath math_for(float, bool value) {
  if (value && kKind == Activation::kGelu) return {{hidden(-5.5f), hidden(5.5f), 0.0f}};
  return {{hidden(-127.0f), hidden(value ? 128.0f : 127.0f), hidden(kReach)}};
}
template <Activation kKind>
STITCHVM_INLINE ShortMath math_for(BFloat16, bool value) {
  if (value && kKind == Activation::kGelu) return {{0.0f, 0.0f, hidden(1e30f)}};  // 1 / D^16 is 0 there
  return {{hidden(-127.0f), hidden(value ? 128.0f : 127.0f), hidden(kReach)}};
}
template <Activation kKind>
STITCHVM_INLINE DoubleMath math_for(double, bool value) {
  return {{-1100.0, value ? 1100.0 : 1000.0, 0.0}};
}

// Calls f(first, count, bias) for the pieces of [begin, end) that lie in one row; without a bias there is one piece.
template <class Params, class F>
STITCHVM_INLINE void for_each_piece(const Params& p, int64_t begin, int64_t end, F f) {
  if (p.bias == nullptr) return f(begin, end - begin, p.bias);
  int64_t channel = begin % p.channels;
  while (begin < end) {
    const int64_t left = p.channels - channel;
    const int64_t count = left < end - begin ? left : end - begin;
    f(begin, count, p.bias + channel);
    begin += count;
    channel = 0;
  }
}

template <class T, Activation kKind>
struct ActivationKernel {
  static STITCHVM_INLINE void run(const ActivationParams<T>& p, int64_t begin, int64_t end) {
    using A = Accumulate<T>;
    const auto math = math_for<kKind>(T{}, true);
    const auto f = [=](A x) STITCHVM_LAMBDA { return activation_value<kKind>(x, math); };
    for_each_piece(p, begin, end, [&](int64_t first, int64_t count, const T* bias) STITCHVM_LAMBDA {
      const T* x = p.x + first;
      T* y = p.y + first;
      if (bias == nullptr) {
        map_elements(count, y, f, x);
      } else {
        map_elements(count, y, [=](A x, A bias) STITCHVM_LAMBDA { return f(x + bias); }, x, bias);
      }
    });
  }
};

template <class T, Activation kKind>
struct ActivationGradKernel {
  static STITCHVM_INLINE void run(const ActivationGradParams<T>& p, int64_t begin, int64_t end) {
    using A = Accumulate<T>;
    const auto math = math_for<kKind>(T{}, false);
    const auto f = [=](A grad, A x) STITCHVM_LAMBDA { return grad * activation_slope<kKind>(x, math); };
    for_each_piece(p, begin, end, [&](int64_t first, int64_t count, const T* bias) STITCHVM_LAMBDA {
      const T* grad = p.grad + first;
      const T* x = p.x + first;
      T* grad_x = p.grad_x + first;
      if (bias == nullptr) {
        map_elements(count, grad_x, f, grad, x);
      } else {
        map_elements(
            count, grad_x, [=](A grad, A x, A bias) STITCHVM_LAMBDA { return f(grad, x + bias); }, grad, x, bias);
      }
    });
  }
};

void activation_cpu_out(const Tensor& x_in, const std::optional<Tensor>& bias_in, int64_t kind, const Tensor& y) {
  check_activation("activation", x_in, bias_in, kind);
  check_out("activation", x_in, y);
  const Tensor x = torch::stable::contiguous(x_in);
  const Tensor bias = contiguous_bias(bias_in);
  dispatch_cpu_dtype("activation", x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const auto p = activation_params<T>(x, bias, kind, y);
    dispatch_activation(
        p.kind, [&](auto constant) { parallel_rows<ActivationKernel<T, decltype(constant)::value>>(p, p.size, 1); });
  });
}

Tensor activation_cpu(const Tensor& x, const std::optional<Tensor>& bias, int64_t kind) {
  const Tensor y = empty_contiguous(x);
  activation_cpu_out(x, bias, kind, y);
  return y;
}

void activation_input_grad_cpu_out(const Tensor& grad_in, const Tensor& x_in, const std::optional<Tensor>& bias_in,
                                   int64_t kind, const Tensor& grad_x) {
  check_activation("activation_input_grad", x_in, bias_in, kind);
  check_same_shape("activation_input_grad", x_in, grad_in, "grad");
  check_out("activation_input_grad", x_in, grad_x);
  const Tensor grad = torch::stable::contiguous(grad_in);
  const Tensor x = torch::stable::contiguous(x_in);
  const Tensor bias = contiguous_bias(bias_in);
  dispatch_cpu_dtype("activation_input_grad", x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const auto p = activation_grad_params<T>(grad, x, bias, kind, grad_x);
    dispatch_activation(p.kind, [&](auto constant) {
      parallel_rows<ActivationGradKernel<T, decltype(constant)::value>>(p, p.size, 1);
    });
  });
}

Tensor activation_input_grad_cpu(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& bias, int64_t kind) {
  const Tensor grad_x = empty_contiguous(x);
  activation_input_grad_cpu_out(grad, x, bias, kind, grad_x);
  return grad_x;
}

}  // namespace
}  // namespace stitchvm

STABLE_TORCH_LIBRARY_IMPL(stitchvm, CPU, m) {
  m.impl("activation", TORCH_BOX(&stitchvm::activation_cpu));
  m.impl("activation.out", TORCH_BOX(&stitchvm::activation_cpu_out));
  m.impl("activation_input_grad", TORCH_BOX(&stitchvm::activation_input_grad_cpu));
  m.impl("activation_input_grad.out", TORCH_BOX(&stitchvm::activation_input_grad_cpu_out));
}
