// A sum in a fixed order; what reduces several rows or values at once does it in the same manner.
#pragma once

#include <cstdint>

#include "../common/macros.h"

namespace stitchvm {

// Sum of term(c) over c in [0, n): kLanes interleaved partial sums, then a tree. The lanes are what the compiler
// vectorises, they keep the rounding error small, and, their number being fixed, every instruction set gives the same
// bits. `term` must be a lambda marked STITCHVM_LAMBDA.
template <class A, class F>
STITCHVM_INLINE A lane_sum(int64_t n, F term) {
  constexpr int kLanes = 64;
  A lanes[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) lanes[l] += term(c + l);
  }
  for (int l = 0; c + l < n; ++l) lanes[l] += term(c + l);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

}  // namespace stitchvm
