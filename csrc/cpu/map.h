// Applies a pointwise function to contiguous elements.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/pair.h"
#include "channels.h"
#include "types.h"

namespace stitchvm {

// y[i] = f(in[i]...) for i in [0, n), computed in the accumulation type. `f` must be a lambda marked STITCHVM_LAMBDA.
template <class T, class F, class... In>
STITCHVM_INLINE void map_elements(int64_t n, T* y, F f, const In*... in) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = narrow<T>(f(widen(in[i])...));
}

// y = x. In two words at a time, which the compiler vectorises; one at a time becomes a call of memcpy, which on some
// processors is three times slower for rows of a few kilobytes.
template <class T>
STITCHVM_INLINE void copy_elements(int64_t n, T* y, const T* x) {
  constexpr int64_t kStep = 16 / sizeof(T);
#pragma omp simd
  for (int64_t i = 0; i < n / kStep; ++i) {
    uint64_t first, second;
    std::memcpy(&first, x + i * kStep, 8);
    std::memcpy(&second, x + i * kStep + kStep / 2, 8);
    std::memcpy(y + i * kStep, &first, 8);
    std::memcpy(y + i * kStep + kStep / 2, &second, 8);
  }
  for (int64_t i = n / kStep * kStep; i < n; ++i) y[i] = x[i];
}

// Two neighbours.
template <class T>
STITCHVM_INLINE Pair<T> load_pair(const T* p) {
  return {p[0], p[1]};
}
// Of bfloat16, from one 32-bit word.
STITCHVM_INLINE Pair<float> load_pair(const BFloat16* p) {
  float v[2];
  load<2>(p, v);
  return {v[0], v[1]};
}

template <class T>
STITCHVM_INLINE void store_pair(T* p, Pair<T> v) {
  p[0] = v.first;
  p[1] = v.second;
}
// See rounded_bits for NaNs.
STITCHVM_INLINE void store_pair(BFloat16* p, Pair<float> v) {
  const float values[2] = {v.first, v.second};
  store<2>(p, values);
}

// For any NaN.
template <class T>
STITCHVM_INLINE void store_any_pair(T* p, Pair<T> v) {
  store_pair(p, v);
}
STITCHVM_INLINE void store_any_pair(BFloat16* p, Pair<float> v) {
  const uint32_t bits = narrow<BFloat16>(v.first).bits | static_cast<uint32_t>(narrow<BFloat16>(v.second).bits) << 16;
  std::memcpy(p, &bits, sizeof bits);
}

// In pairs: widening and narrowing are then shifts and masks, without shuffles across lanes.
template <class F, class... In>
STITCHVM_INLINE void map_elements(int64_t n, BFloat16* y, F f, const In*... in) {
  const int64_t pairs = n / 2;
#pragma omp simd
  for (int64_t i = 0; i < pairs; ++i) {
    store_pair(y + 2 * i, {f(load_pair(in + 2 * i).first...), f(load_pair(in + 2 * i).second...)});
  }
  if (n % 2 == 1) y[n - 1] = narrow<BFloat16>(f(widen(in[n - 1])...));
}

}  // namespace stitchvm
