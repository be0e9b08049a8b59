// resample_tokens: y = [prefix; resample(x) + bias + residual] + position, where the resampling is bilinear,
// align_corners=False, no antialiasing. Shared by every backend; no torch headers.
#pragma once

#include <cstdint>

#include "macros.h"

namespace stitchvm {

// Sides up to here keep (2 * out + 1) * in inside 32 bits.
constexpr int kMaxGridSide = 32767;

// Tokens are row-major and everything is contiguous: x is [batch, in_h * in_w, channels], y [batch, prefix_tokens +
// out_h * out_w, channels]. The rest may be null: bias [channels], position [prefix_tokens + out_h * out_w, channels],
// prefix [prefix_tokens, channels], residual [batch, out_h * out_w, channels].
template <class T>
struct ResampleParams {
  const T* x;
  const T* bias;
  const T* position;
  const T* prefix;
  const T* residual;
  T* y;
  int64_t batch;
  int64_t channels;
  int64_t prefix_tokens;
  int in_h;
  int in_w;
  int out_h;
  int out_w;
};

// The adjoint of the resampling: grad like y, grad_x like x.
template <class T>
struct ResampleGradParams {
  const T* grad;
  T* grad_x;
  int64_t batch;
  int64_t channels;
  int64_t prefix_tokens;
  int in_h;
  int in_w;
  int out_h;
  int out_w;
};

// One axis of one output position: y = (1 - weight) * x[first] + weight * x[second].
template <class A>
struct Tap {
  int first;
  int second;
  A weight;
};

// The source coordinate (o + 0.5) * in / out - 0.5, clamped at 0, in exact integer arithmetic.
template <class A>
STITCHVM_INLINE Tap<A> bilinear_tap(int o, int in, int out) {
  const int numerator = (2 * o + 1) * in - out;
  const int position = numerator < 0 ? 0 : numerator;
  const int first = position / (2 * out);
  const int second = first + 1 < in ? first + 1 : in - 1;
  return {first, second, A(position - first * 2 * out) / A(2 * out)};
}

// The smallest output position whose `first` tap is at least k (out when there is none).
STITCHVM_INLINE int first_output_from(int k, int in, int out) {
  if (k <= 0) return 0;
  const int64_t bound = static_cast<int64_t>(out) * (2 * static_cast<int64_t>(k) + 1);
  const int64_t o = ((bound + in - 1) / in) / 2;
  return o < out ? static_cast<int>(o) : out;
}

// Output positions [begin, end) that read input position i: those whose `first` tap is i - 1 or i.
STITCHVM_INLINE int reader_begin(int i, int in, int out) { return first_output_from(i - 1, in, out); }
STITCHVM_INLINE int reader_end(int i, int in, int out) { return first_output_from(i + 1, in, out); }

// The weight with which output position o reads input position i.
template <class A>
STITCHVM_INLINE A reader_weight(int o, int i, int in, int out) {
  const Tap<A> t = bilinear_tap<A>(o, in, out);
  return (t.first == i ? A(1) - t.weight : A(0)) + (t.second == i ? t.weight : A(0));
}

}  // namespace stitchvm
