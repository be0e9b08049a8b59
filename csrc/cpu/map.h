// Applies a pointwise function to contiguous elements.
#pragma once

#include <cstdint>
#include <cstring>

#include "types.h"

namespace stitchvm {

// y[i] = f(in[i]...) for i in [0, n), computed in the accumulation type. `f` must be a lambda marked STITCHVM_LAMBDA.
template <class T, class F, class... In>
STITCHVM_INLINE void map_elements(int64_t n, T* y, F f, const In*... in) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = narrow<T>(f(widen(in[i])...));
}

// Two neighbours of a bfloat16 row, from one 32-bit word (little endian).
STITCHVM_INLINE uint32_t load_pair(const BFloat16* p) {
  uint32_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return bits;
}
STITCHVM_INLINE float first_of_pair(uint32_t pair) {
  const uint32_t bits = pair << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
STITCHVM_INLINE float second_of_pair(uint32_t pair) {
  const uint32_t bits = pair & 0xffff0000u;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

// The float's bits, rounded to bfloat16 in the upper half (ties to even). As `narrow`, but for NaNs whose low bits are
// zero: those that come from bfloat16 inputs and those that arithmetic makes.
STITCHVM_INLINE uint32_t round_to_upper_half(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

// In pairs: widening and narrowing are then shifts and masks, without shuffles across lanes.
template <class F, class... In>
STITCHVM_INLINE void map_elements(int64_t n, BFloat16* y, F f, const In*... in) {
  const int64_t pairs = n / 2;
#pragma omp simd
  for (int64_t i = 0; i < pairs; ++i) {
    const uint32_t first = round_to_upper_half(f(first_of_pair(load_pair(in + 2 * i))...));
    const uint32_t second = round_to_upper_half(f(second_of_pair(load_pair(in + 2 * i))...));
    const uint32_t both = (first >> 16) | (second & 0xffff0000u);
    std::memcpy(y + 2 * i, &both, sizeof both);
  }
  if (n % 2 == 1) y[n - 1] = narrow<BFloat16>(f(widen(in[n - 1])...));
}

}  // namespace stitchvm
