// Element types of the CPU kernels and the type that each one accumulates in.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/macros.h"

namespace stitchvm {

struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct AccumulateOf {
  using type = T;
};
template <>
struct AccumulateOf<BFloat16> {
  using type = float;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::type;

STITCHVM_INLINE float widen(float v) { return v; }
STITCHVM_INLINE double widen(double v) { return v; }
STITCHVM_INLINE float widen(BFloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

template <class T>
STITCHVM_INLINE T narrow(Accumulate<T> v) {
  return v;
}
// Round to nearest, ties to even. A NaN stays a (quiet) NaN: plain rounding could carry its mantissa into infinity.
template <>
STITCHVM_INLINE BFloat16 narrow<BFloat16>(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded)};
}

}  // namespace stitchvm
