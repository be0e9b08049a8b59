// Vectorisable float functions for the CPU kernels: no library calls, no branches, the same bits at every level.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../common/macros.h"

namespace stitchvm {

// A constant that the optimiser does not see. A clamp to visible constants is compiled into separate code for what
// lies outside, which costs more than the two instructions of the clamp.
template <class A>
STITCHVM_INLINE A hidden(A value) {
  asm("" : "+m"(value));
  return value;
}

// 2^t for -127 <= t <= 128, from an approximation of 2^f on |f| <= 1/2. t = n + f with an integer n, both exact; the
// error is that of `fraction` and one rounding. 2^-127 is 0, 2^128 is infinity, and a NaN passes.
template <class F>
STITCHVM_INLINE float exp2_in_range(float t, F fraction) {
  constexpr float kShift = 12582912.0f + 127.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const float shifted = t + kShift;
  const float p = fraction(t - (shifted - kShift));
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits <<= 23;  // n + 127 as an exponent
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// Minimax fits of 2^f with the value 1 at 0, found by iteratively reweighted least squares in double.
// Relative error 9.2e-8.
STITCHVM_INLINE float exp2_fraction(float f) {
  float p = 0.00132647215f;
  p = p * f + 0.00967151299f;
  p = p * f + 0.0555073358f;
  p = p * f + 0.240222424f;
  p = p * f + 0.693147004f;
  return p * f + 1.0f;
}

// Relative error 2.8e-6, for results that are rounded to bfloat16 (half a unit is 2e-3).
STITCHVM_INLINE float exp2_fraction_short(float f) {
  float p = 0.00958285294f;
  p = p * f + 0.0559064262f;
  p = p * f + 0.240240991f;
  p = p * f + 0.693124175f;
  return p * f + 1.0f;
}

}  // namespace stitchvm
