// Compiles a kernel once per instruction set and picks one at run time.
//
// A kernel is a struct with `static STITCHVM_INLINE void run(const Params&, int64_t begin, int64_t end)`, written as
// plain loops with `#pragma omp simd`. Being inlined into the wrappers below, it is vectorised for each of them.
#pragma once

#include <cstdint>

namespace stitchvm {

enum class CpuLevel : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

CpuLevel detected_cpu_level();
CpuLevel cpu_level();
// Lowers (or restores) the level in use, for tests and benchmarks. Not above detected_cpu_level().
void set_cpu_level(CpuLevel level);

template <class Params>
using RangeKernel = void (*)(const Params&, int64_t begin, int64_t end);

template <class Kernel, class Params>
void run_baseline(const Params& p, int64_t begin, int64_t end) {
  Kernel::run(p, begin, end);
}

#if defined(__x86_64__)
template <class Kernel, class Params>
__attribute__((target("avx2,fma,bmi2"))) void run_avx2(const Params& p, int64_t begin, int64_t end) {
  Kernel::run(p, begin, end);
}

template <class Kernel, class Params>
__attribute__((target("avx2,fma,bmi2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))) void run_avx512(
    const Params& p, int64_t begin, int64_t end) {
  Kernel::run(p, begin, end);
}
#endif

template <class Kernel, class Params>
RangeKernel<Params> pick_kernel() {
#if defined(__x86_64__)
  switch (cpu_level()) {
    case CpuLevel::kAvx512:
      return &run_avx512<Kernel, Params>;
    case CpuLevel::kAvx2:
      return &run_avx2<Kernel, Params>;
    case CpuLevel::kBaseline:
      break;
  }
#endif
  return &run_baseline<Kernel, Params>;
}

}  // namespace stitchvm
