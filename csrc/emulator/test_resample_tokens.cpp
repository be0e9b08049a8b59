// resample_tokens and its adjoint against plain loops in double.
#include "driver.h"
// after driver.h, which gives the kernels the CUDA language
#include "../cuda/resample_tokens.cuh"

using namespace stitchvm;
using namespace stitchvm::emulator;

namespace {

// The weight with which output position o of one axis reads input position i.
double weight(int o, int i, int in, int out) {
  const double source = std::max((o + 0.5) * in / out - 0.5, 0.0);
  const int first = static_cast<int>(source);
  const int second = std::min(first + 1, in - 1);
  return (first == i ? 1.0 - (source - first) : 0.0) + (second == i ? source - first : 0.0);
}

template <class T, int kVec>
void test(int64_t batch, int h, int w, int out_h, int out_w, int64_t channels, int offset) {
  const int64_t in = h * w, out = out_h * out_w;
  const Buffer<T> x(batch * in * channels, offset), grad(batch * out * channels, offset);
  Buffer<T> y(batch * out * channels, offset), grad_x(batch * in * channels, offset);
  const auto blocks = [](int64_t tokens) { return dim3(static_cast<unsigned>((tokens + 15) / 16)); };
  const auto reads = [&](int64_t o, int64_t i) {
    return weight(o / out_w, i / w, h, out_h) * weight(o % out_w, i % w, w, out_w);
  };

  const ResampleParams<T> p = {x.data(), y.data(), batch, channels, h, w, out_h, out_w};
  launch_checked(resample_forward<T, kVec>, blocks(batch * out), dim3(8, 16), p, y);
  expect("resample_forward", y, [&](int64_t k) {
    double sum = 0.0;
    const int64_t b = k / channels / out, o = k / channels % out;
    for (int64_t i = 0; i < in; ++i) sum += reads(o, i) * x[(b * in + i) * channels + k % channels];
    return sum;
  });

  const ResampleParams<T> g = {grad.data(), grad_x.data(), batch, channels, h, w, out_h, out_w};
  launch_checked(resample_backward<T, kVec>, blocks(batch * in), dim3(8, 16), g, grad_x);
  expect("resample_backward", grad_x, [&](int64_t k) {
    double sum = 0.0;
    const int64_t b = k / channels / in, i = k / channels % in;
    for (int64_t o = 0; o < out; ++o) sum += reads(o, i) * grad[(b * out + o) * channels + k % channels];
    return sum;
  });
}

}  // namespace

int main() {
  return report([] {
    for_each_type([](auto type, auto vec) {
      using T = decltype(type);
      constexpr int kVec = decltype(vec)::value;
      test<T, kVec>(2, 3, 5, 4, 2, 8, 0);
      test<T, kVec>(1, 1, 7, 5, 1, 72, 0);
      if constexpr (kVec == 1) test<T, kVec>(3, 4, 4, 3, 6, 13, 1);
    });
  });
}
