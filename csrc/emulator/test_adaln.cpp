// adaln and its gradient against plain loops in double.
#include "driver.h"
// after driver.h, which gives the kernels the CUDA language
#include "../cuda/adaln.cuh"

using namespace stitchvm;
using namespace stitchvm::emulator;

namespace {

struct Stats {
  double mean = 0.0;
  double rstd = 0.0;
};

template <class T>
Stats stats(const Buffer<T>& x, int64_t row, int64_t channels, double eps) {
  double sum = 0.0, square = 0.0;
  for (int64_t c = 0; c < channels; ++c) sum += x[row * channels + c];
  const double mean = sum / channels;
  for (int64_t c = 0; c < channels; ++c) square += (x[row * channels + c] - mean) * (x[row * channels + c] - mean);
  return {mean, 1.0 / std::sqrt(square / channels + eps)};
}

template <class T, int kVec>
void test(int64_t batch, int64_t tokens, int64_t channels, int threads, int offset) {
  const int64_t rows = batch * tokens;
  const double eps = 1e-6;
  const Buffer<T> x(rows * channels, offset, 0.5), grad(rows * channels + offset, offset);
  const Buffer<T> scale(batch * channels, offset), shift(channels, offset);
  Buffer<T> y(rows * channels, offset);
  const dim3 grid(static_cast<unsigned>(rows));

  const AdalnParams<T> p = {x.data(), scale.data(), shift.data(), y.data(), rows, channels, tokens, channels, 0, eps};
  launch_checked(adaln_forward<T, kVec>, grid, dim3(threads), p, y);
  expect("adaln_forward", y, [&](int64_t i) {
    const int64_t row = i / channels, c = i % channels;
    const Stats s = stats(x, row, channels, eps);
    return (x[i] - s.mean) * s.rstd * (1.0 + scale[row / tokens * channels + c]) + shift[c];
  });

  const AdalnGradParams<T> g = {grad.data(), x.data(), scale.data(), y.data(), rows, channels, tokens, channels, eps};
  launch_checked(adaln_backward<T, kVec>, grid, dim3(threads), g, y);
  expect("adaln_backward", y, [&](int64_t i) {
    const int64_t row = i / channels, first = row * channels;
    const Stats s = stats(x, row, channels, eps);
    const auto scaled = [&](int64_t c) { return grad[first + c] * (1.0 + scale[row / tokens * channels + c]); };
    double mean_g = 0.0, mean_gn = 0.0;
    for (int64_t c = 0; c < channels; ++c) {
      mean_g += scaled(c) / channels;
      mean_gn += scaled(c) * (x[first + c] - s.mean) * s.rstd / channels;
    }
    return s.rstd * (scaled(i - first) - mean_g - (x[i] - s.mean) * s.rstd * mean_gn);
  });
}

}  // namespace

int main() {
  return report([] {
    for_each_type([](auto type, auto vec) {
      using T = decltype(type);
      constexpr int kVec = decltype(vec)::value;
      test<T, kVec>(2, 3, 32, 32, 0);
      test<T, kVec>(2, 1, 264, 96, 0);
      if constexpr (kVec == 1) test<T, kVec>(1, 3, 257, 256, 1);
    });
  });
}
