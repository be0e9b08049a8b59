// Elementwise loops over channels. A lane of such a loop takes kLaneValues<T> neighbouring channels: one, or a pair of
// bfloat16 values in a 32-bit word. The halves of a word widen and narrow by shifts and masks alone; one 16-bit value
// for each 32-bit lane needs shuffles at both ends, which take longer than the arithmetic between them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "types.h"

namespace stitchvm {

template <class T>
constexpr int kLaneValues = 1;
template <>
inline constexpr int kLaneValues<BFloat16> = 2;

template <int kValues>
using LaneWidth = std::integral_constant<int, kValues>;

STITCHVM_INLINE float float_from_bits(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

// A float's bits, their upper half rounded to nearest, ties to even. Without narrow's care for NaN: one that comes from
// bfloat16 values or from the processor has no bits in the lower half, so rounding leaves it as it is.
STITCHVM_INLINE uint32_t rounded_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

template <int kValues, class T>
STITCHVM_INLINE void load(const T* p, Accumulate<T> (&v)[kValues]) {
  if constexpr (kValues == 1) {
    v[0] = widen(*p);
  } else {
    uint32_t word;
    std::memcpy(&word, p, sizeof word);
    v[0] = float_from_bits(word << 16);
    v[1] = float_from_bits(word & 0xffff0000u);
  }
}

template <int kValues, class T>
STITCHVM_INLINE void store(T* p, const Accumulate<T> (&v)[kValues]) {
  if constexpr (kValues == 1) {
    *p = narrow<T>(v[0]);
  } else {
    const uint32_t word = (rounded_bits(v[0]) >> 16) | (rounded_bits(v[1]) & 0xffff0000u);
    std::memcpy(p, &word, sizeof word);
  }
}

// Calls body(c, LaneWidth<kValues>{}) for channels [c, c + kValues), until [0, n) is covered. `body` must be a lambda
// marked STITCHVM_LAMBDA. Which half of a word comes first in memory does not matter to an elementwise loop.
template <class T, class F>
STITCHVM_INLINE void for_channels(int64_t n, F body) {
  constexpr int kValues = kLaneValues<T>;
  const int64_t lanes = n / kValues;
#pragma omp simd
  for (int64_t i = 0; i < lanes; ++i) body(i * kValues, LaneWidth<kValues>{});
  if (lanes * kValues < n) body(n - 1, LaneWidth<1>{});
}

}  // namespace stitchvm
