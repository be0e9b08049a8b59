// activation of every kind and its gradient against the formulas in double.
#include "driver.h"
// after driver.h, which gives the kernels the CUDA language
#include "../cuda/activation.cuh"

using namespace stitchvm;
using namespace stitchvm::emulator;

namespace {

double value(Activation kind, double x) {
  switch (kind) {
    case Activation::kGelu:
      return 0.5 * x * (1.0 + std::erf(std::sqrt(0.5) * x));
    case Activation::kGeluTanh:
      return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
    case Activation::kQuickGelu:
      return x / (1.0 + std::exp(-1.702 * x));
    case Activation::kSilu:
      return x / (1.0 + std::exp(-x));
  }
  return 0.0;
}

double slope(Activation kind, double x) { return (value(kind, x + 1e-5) - value(kind, x - 1e-5)) / 2e-5; }

template <class T, int kVec>
void test(Activation kind, bool with_bias, int64_t rows, int64_t channels, int offset) {
  const int64_t n = rows * channels, per_block = kActivationThreads * kVec;
  const Buffer<T> x(n, offset), bias(channels, offset), grad(n, offset);
  Buffer<T> y(n, offset), grad_x(n, offset);
  const dim3 grid(static_cast<unsigned>((n + per_block - 1) / per_block)), block(kActivationThreads);
  const T* b = with_bias ? bias.data() : nullptr;
  const auto biased = [&](int64_t i) { return with_bias ? x[i] + bias[i % channels] : x[i]; };

  const ActivationParams<T> p = {x.data(), b, y.data(), n, channels, kind};
  launch_checked(activation_forward<T, kVec>, grid, block, p, y);
  expect("activation_forward", y, [&](int64_t i) { return value(kind, biased(i)); });

  const ActivationGradParams<T> g = {grad.data(), x.data(), b, grad_x.data(), n, channels, kind};
  launch_checked(activation_backward<T, kVec>, grid, block, g, grad_x);
  expect("activation_backward", grad_x, [&](int64_t i) { return grad[i] * slope(kind, biased(i)); });
}

}  // namespace

int main() {
  return report([] {
    for_each_type([](auto type, auto vec) {
      using T = decltype(type);
      constexpr int kVec = decltype(vec)::value;
      for (const Activation kind :
           {Activation::kGelu, Activation::kGeluTanh, Activation::kQuickGelu, Activation::kSilu}) {
        for (const bool with_bias : {false, true}) {
          test<T, kVec>(kind, with_bias, 1, 8, 0);
          test<T, kVec>(kind, with_bias, 5, 488, 0);
          if constexpr (kVec == 1) test<T, kVec>(kind, with_bias, 29, 13, 1);
        }
      }
    });
  });
}
