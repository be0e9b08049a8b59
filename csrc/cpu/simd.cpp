#include "simd.h"

#include <atomic>
#include <stdexcept>

namespace stitchvm {

CpuLevel detected_cpu_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) return CpuLevel::kAvx512;
  if (avx2) return CpuLevel::kAvx2;
#endif
  return CpuLevel::kBaseline;
}

namespace {
std::atomic<CpuLevel>& level_in_use() {
  static std::atomic<CpuLevel> level{detected_cpu_level()};
  return level;
}
}  // namespace

CpuLevel cpu_level() { return level_in_use().load(std::memory_order_relaxed); }

void set_cpu_level(CpuLevel level) {
  if (level > detected_cpu_level()) throw std::invalid_argument("this processor lacks the instructions of that level");
  level_in_use().store(level, std::memory_order_relaxed);
}

}  // namespace stitchvm
