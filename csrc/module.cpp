// The Python module stitchvm_ext._C: importing it registers the ops; its functions say how it was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/simd.h"
#include "stitchvm_build_info.h"  // written by setup.py

namespace {

using stitchvm::CpuLevel;

const std::vector<std::pair<std::string, CpuLevel>>& levels() {
  static const std::vector<std::pair<std::string, CpuLevel>> table = {
      {"baseline", CpuLevel::kBaseline},
#if defined(__x86_64__)
      {"avx2", CpuLevel::kAvx2},
      {"avx512", CpuLevel::kAvx512},
#endif
  };
  return table;
}

std::string level_name(CpuLevel level) {
  for (const auto& [name, value] : levels()) {
    if (value == level) return name;
  }
  throw std::logic_error("unnamed CPU level");
}

void set_level(const std::string& name) {
  for (const auto& [known, value] : levels()) {
    if (known == name) return stitchvm::set_cpu_level(value);
  }
  throw std::invalid_argument("unknown CPU level '" + name + "'");
}

std::vector<std::string> compiled_levels() {
  std::vector<std::string> names;
  for (const auto& level : levels()) names.push_back(level.first);
  return names;
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
#define STITCHVM_FEATURE(name) \
  if (__builtin_cpu_supports(name)) found.emplace_back(name)
  STITCHVM_FEATURE("sse4.2");
  STITCHVM_FEATURE("avx");
  STITCHVM_FEATURE("avx2");
  STITCHVM_FEATURE("fma");
  STITCHVM_FEATURE("bmi2");
  STITCHVM_FEATURE("avx512f");
  STITCHVM_FEATURE("avx512bw");
  STITCHVM_FEATURE("avx512dq");
  STITCHVM_FEATURE("avx512vl");
#undef STITCHVM_FEATURE
#endif
  return found;
}

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  return std::string("gcc ") + __VERSION__;
#else
  return "unknown";
#endif
}

std::map<std::string, std::string> build_info() {
  return {{"version", STITCHVM_BUILD_VERSION},     {"torch", STITCHVM_BUILD_TORCH},
          {"torch_target", STITCHVM_BUILD_TARGET}, {"compiler", compiler()},
          {"nvcc", STITCHVM_BUILD_NVCC},           {"cuda_archs", STITCHVM_BUILD_ARCHS},
          {"account", STITCHVM_BUILD_ACCOUNT}};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of the compiled library; importing it registers the stitchvm ops.";
  m.def("build_info", &build_info, "Versions, compiler, CUDA architectures and the account of the build's decision.");
  m.def("cpu_features", &cpu_features, "Instruction sets that this processor has.");
  m.def("compiled_cpu_levels", &compiled_levels, "Instruction-set levels that the CPU kernels are compiled for.");
  m.def("cpu_level", [] { return level_name(stitchvm::cpu_level()); }, "The level in use.");
  m.def("detected_cpu_level", [] { return level_name(stitchvm::detected_cpu_level()); }, "The best usable level.");
  m.def("set_cpu_level", &set_level, pybind11::arg("name"), "Use a lower level (tests); ValueError if not possible.");
}
