// residual_norm and its gradient against plain loops in double.
#include "driver.h"
// after driver.h, which gives the kernels the CUDA language
#include "../cuda/residual_norm.cuh"

using namespace stitchvm;
using namespace stitchvm::emulator;

namespace {

struct Stats {
  double mean = 0.0;
  double rstd = 0.0;
};

template <class T>
Stats stats(const Buffer<T>& h, int64_t row, int64_t channels, double eps) {
  double sum = 0.0, square = 0.0;
  for (int64_t c = 0; c < channels; ++c) sum += h[row * channels + c];
  const double mean = sum / channels;
  for (int64_t c = 0; c < channels; ++c) square += (h[row * channels + c] - mean) * (h[row * channels + c] - mean);
  return {mean, 1.0 / std::sqrt(square / channels + eps)};
}

// Two gated branches and two norms, the second without a shift; the tables have three rows, which `index` picks from.
template <class T, int kVec, int kHold>
void test(int64_t samples, int64_t tokens, int64_t channels, int threads, int offset) {
  const int64_t count = samples * tokens;
  const int64_t n = count * channels;
  const double eps = 1e-6;
  const Buffer<T> x(n, offset, 0.5), branch(n, offset), branch2(n, offset);
  const Buffer<T> gate(3 * channels, offset), gate2(3 * channels, offset), scale(3 * channels, offset);
  const Buffer<T> scale2(3 * channels, offset), shift(3 * channels, offset);
  const std::vector<int64_t> index = {2, 0};
  const RowLayout rows = {count, channels, tokens, index.data(), 3};
  const auto table = [&](const Buffer<T>& t) { return RowTable<T>{t.data(), channels}; };
  const RowTable<T> absent = {nullptr, 0};
  const auto at = [&](const Buffer<T>& t, int64_t i) {  // the table's value for element i
    return t[index[i / channels / tokens] * channels + i % channels];
  };
  const dim3 grid(static_cast<unsigned>(count));
  const auto sum = [&](int64_t i) { return x[i] + at(gate, i) * branch[i] + at(gate2, i) * branch2[i]; };

  Buffer<T> residual(n, offset), y(n, offset), y2(n, offset);
  ResidualNormParams<T> p = {x.data(), branch.data(), branch2.data(), table(gate), table(gate2),
                             absent,   absent,        absent,         absent,      residual.data(),
                             nullptr,  nullptr,       rows,           false,       eps};
  launch_checked(residual_forward<T, kVec, 2>, grid, dim3(threads), p, residual);
  expect("residual_forward", residual, sum);

  p.scale = table(scale);
  p.shift = table(shift);
  p.scale2 = table(scale2);
  p.y = y.data();
  p.y2 = y2.data();
  launch_checked(residual_norm_forward<T, kVec, kHold, 2>, grid, dim3(threads), p, residual, y, y2);
  std::vector<Stats> norms;
  for (int64_t row = 0; row < count; ++row) norms.push_back(stats(residual, row, channels, eps));
  const auto normalized = [&](int64_t i) {
    return (residual[i] - norms[i / channels].mean) * norms[i / channels].rstd;
  };
  expect("residual_norm_forward, residual", residual, sum);
  expect("residual_norm_forward, y", y, [&](int64_t i) { return normalized(i) * (1.0 + at(scale, i)) + at(shift, i); });
  expect("residual_norm_forward, y2", y2, [&](int64_t i) { return normalized(i) * (1.0 + at(scale2, i)); });

  // branch and branch2 stand in for the gradients of y and y2, x for that of the residual.
  Buffer<T> grad_x(n, offset), grad_branch(n, offset), grad_branch2(n, offset);
  ResidualNormGradParams<T> g = {
      x.data(),      branch.data(), branch2.data(),     residual.data(),     table(gate), table(gate2), table(scale),
      table(scale2), grad_x.data(), grad_branch.data(), grad_branch2.data(), rows,        false,        eps};
  launch_checked(residual_norm_backward<T, kVec, kHold>, grid, dim3(threads), g, grad_x, grad_branch, grad_branch2);
  const auto scaled = [&](int64_t i) { return branch[i] * (1.0 + at(scale, i)) + branch2[i] * (1.0 + at(scale2, i)); };
  std::vector<double> mean_g(count), mean_gn(count);
  for (int64_t i = 0; i < n; ++i) {
    mean_g[i / channels] += scaled(i) / channels;
    mean_gn[i / channels] += scaled(i) * normalized(i) / channels;
  }
  const auto exact = [&](int64_t i) {
    const int64_t row = i / channels;
    return x[i] + norms[row].rstd * (scaled(i) - mean_g[row] - normalized(i) * mean_gn[row]);
  };
  expect("residual_norm_backward, x", grad_x, exact);
  expect("residual_norm_backward, branch", grad_branch, [&](int64_t i) { return at(gate, i) * exact(i); });
  expect("residual_norm_backward, branch2", grad_branch2, [&](int64_t i) { return at(gate2, i) * exact(i); });

  launch_checked(residual_backward<T, kVec>, grid, dim3(threads), g, grad_branch, grad_branch2);
  expect("residual_backward, branch", grad_branch, [&](int64_t i) { return at(gate, i) * x[i]; });
  expect("residual_backward, branch2", grad_branch2, [&](int64_t i) { return at(gate2, i) * x[i]; });
}

}  // namespace

int main() {
  return report([] {
    for_each_type([](auto type, auto vec) {
      using T = decltype(type);
      constexpr int kVec = decltype(vec)::value;
      test<T, kVec, 0>(2, 3, 32, 32, 0);
      test<T, kVec, 0>(2, 1, 264, 32, 0);
      if constexpr (kVec > 1) test<T, kVec, kHeldVectors>(2, 1, 264, 64, 0);
      if constexpr (kVec == 1) test<T, kVec, 0>(1, 3, 257, 256, 1);
    });
  });
}
