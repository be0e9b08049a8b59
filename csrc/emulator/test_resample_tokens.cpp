// resample_tokens with all that is added to the resampled tokens, and its adjoint, against plain loops in double.
#include "driver.h"
// after driver.h, which gives the kernels the CUDA language
#include "../cuda/resample_tokens.cuh"

using namespace stitchvm;
using namespace stitchvm::emulator;

namespace {

struct Shape {
  int64_t batch;
  int h, w, out_h, out_w;
  int64_t prefix;
  int64_t channels;
};

// The weight with which output position o of one axis reads input position i.
double weight(int o, int i, int in, int out) {
  const double source = std::max((o + 0.5) * in / out - 0.5, 0.0);
  const int first = static_cast<int>(source);
  const int second = std::min(first + 1, in - 1);
  return (first == i ? 1.0 - (source - first) : 0.0) + (second == i ? source - first : 0.0);
}

// `added`: with bias, position and residual. There is a prefix where the shape has tokens for it.
template <class T, int kVec>
void test(const Shape& s, bool added, int offset) {
  const int64_t batch = s.batch, channels = s.channels;
  const int64_t in = s.h * s.w, patches = s.out_h * s.out_w, out = s.prefix + patches;
  const Buffer<T> x(batch * in * channels, offset), bias(channels, offset), position(out * channels, offset);
  const Buffer<T> prefix(s.prefix * channels, offset), residual(batch * patches * channels, offset);
  const Buffer<T> grad(batch * out * channels, offset);
  Buffer<T> y(batch * out * channels, offset), grad_x(batch * in * channels, offset);
  const auto blocks = [](int64_t tokens) { return dim3(static_cast<unsigned>((tokens + 15) / 16)); };
  const auto reads = [&](int64_t o, int64_t i) {
    return weight(o / s.out_w, i / s.w, s.h, s.out_h) * weight(o % s.out_w, i % s.w, s.w, s.out_w);
  };

  const ResampleParams<T> p = {x.data(),
                               added ? bias.data() : nullptr,
                               added ? position.data() : nullptr,
                               s.prefix > 0 ? prefix.data() : nullptr,
                               added ? residual.data() : nullptr,
                               y.data(),
                               batch,
                               channels,
                               s.prefix,
                               s.h,
                               s.w,
                               s.out_h,
                               s.out_w};
  launch_checked(resample_forward<T, kVec>, blocks(batch * out), dim3(8, 16), p, y);
  expect("resample_forward", y, [&](int64_t k) {
    const int64_t c = k % channels, b = k / channels / out, token = k / channels % out;
    const int64_t patch = token - s.prefix;
    double sum = added ? position[token * channels + c] : 0.0;
    if (patch < 0) return sum + prefix[token * channels + c];
    for (int64_t i = 0; i < in; ++i) sum += reads(patch, i) * x[(b * in + i) * channels + c];
    return added ? sum + bias[c] + residual[(b * patches + patch) * channels + c] : sum;
  });

  const ResampleGradParams<T> g = {grad.data(), grad_x.data(), batch, channels, s.prefix, s.h, s.w, s.out_h, s.out_w};
  launch_checked(resample_backward<T, kVec>, blocks(batch * in), dim3(8, 16), g, grad_x);
  expect("resample_backward", grad_x, [&](int64_t k) {
    double sum = 0.0;
    const int64_t c = k % channels, b = k / channels / in, i = k / channels % in;
    for (int64_t o = 0; o < patches; ++o) sum += reads(o, i) * grad[(b * out + s.prefix + o) * channels + c];
    return sum;
  });
}

}  // namespace

int main() {
  return report([] {
    for_each_type([](auto type, auto vec) {
      using T = decltype(type);
      constexpr int kVec = decltype(vec)::value;
      test<T, kVec>({2, 3, 5, 4, 2, 0, 8}, false, 0);
      test<T, kVec>({2, 3, 5, 4, 2, 3, 8}, true, 0);
      test<T, kVec>({1, 1, 7, 5, 1, 1, 72}, false, 0);
      test<T, kVec>({2, 3, 4, 3, 4, 2, 16}, true, 0);  // equal grids
      if constexpr (kVec == 1) test<T, kVec>({3, 4, 4, 3, 6, 1, 13}, true, 1);
    });
  });
}
