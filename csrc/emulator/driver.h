// For the test drivers test_<op>.cpp: inputs, launches under every schedule, and comparison with a plain loop in
// double.
#pragma once

#include "device.h"

// After device.h, which gives the kernels' headers the CUDA language.
#include <algorithm>
#include <cstdio>
#include <exception>
#include <initializer_list>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "../cuda/types.cuh"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(begin, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(begin, bytes)
#endif

namespace stitchvm::emulator {

inline double to_double(double v) { return v; }
template <class T>
double to_double(T v) {
  return static_cast<double>(to_float(v));
}

template <class T>
T from_double(double v) {
  if constexpr (std::is_same_v<T, double>)
    return v;
  else
    return from_float<T>(static_cast<float>(v));
}

inline unsigned buffers_made = 0;

// n elements that start `offset` elements behind a 16-byte boundary, normally distributed and other ones in every
// buffer. The margins around them are poisoned for the address sanitizer, and without it hold a pattern that tells of
// stray writes.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n, int offset = 0, double mean = 0.0)
      : size_(n),
        bytes_(n * sizeof(T)),
        first_(kMargin + offset * sizeof(T)),
        storage_(new (std::align_val_t(16)) unsigned char[first_ + bytes_ + kMargin]) {
    std::fill_n(storage_.get(), first_ + bytes_ + kMargin, kPattern);
    std::mt19937 random(buffers_made++);
    std::normal_distribution<double> normal(mean);
    for (int64_t i = 0; i < n; ++i) data()[i] = from_double<T>(normal(random));
    ASAN_POISON_MEMORY_REGION(storage_.get(), first_);
    ASAN_POISON_MEMORY_REGION(storage_.get() + first_ + bytes_, kMargin);
  }

  ~Buffer() { ASAN_UNPOISON_MEMORY_REGION(storage_.get(), first_ + bytes_ + kMargin); }

  T* data() { return reinterpret_cast<T*>(storage_.get() + first_); }
  const T* data() const { return reinterpret_cast<const T*>(storage_.get() + first_); }
  int64_t size() const { return size_; }
  double operator[](int64_t i) const { return to_double(data()[i]); }

  void clear() { std::fill_n(storage_.get() + first_, bytes_, kPattern); }

  std::vector<unsigned char> bytes() const { return {storage_.get() + first_, storage_.get() + first_ + bytes_}; }

  void check_margins([[maybe_unused]] const std::string& name) const {
#if !defined(__SANITIZE_ADDRESS__)
    const auto stray = [](unsigned char c) { return c != kPattern; };
    const unsigned char* end = storage_.get() + first_ + bytes_;
    if (std::any_of(storage_.get(), storage_.get() + first_, stray))
      throw std::runtime_error(name + "wrote before the output");
    if (std::any_of(end, end + kMargin, stray)) throw std::runtime_error(name + "wrote behind the output");
#endif
  }

 private:
  static constexpr size_t kMargin = 64;
  static constexpr unsigned char kPattern = 0xee;
  struct Delete {
    void operator()(unsigned char* p) const { ::operator delete[](p, std::align_val_t(16)); }
  };

  int64_t size_;
  size_t bytes_;
  size_t first_;
  std::unique_ptr<unsigned char[], Delete> storage_;
};

// Runs the kernel under every schedule; the outputs must have the same bits and untouched margins under each.
template <class Params, class... T>
void launch_checked(void (*kernel)(Params), dim3 grid, dim3 block, const Params& params, Buffer<T>&... outputs) {
  const std::string name = "emulator: " + kernel_name(reinterpret_cast<const void*>(kernel)) + ": ";
  std::vector<std::vector<unsigned char>> first;
  for (const Schedule schedule : kSchedules) {
    (outputs.clear(), ...);
    set_schedule(schedule);
    run(kernel, grid, block, params);
    (outputs.check_margins(name), ...);
    const std::vector<std::vector<unsigned char>> results = {outputs.bytes()...};
    if (first.empty()) first = results;
    if (results != first) throw std::runtime_error(name + "the result depends on the thread schedule");
  }
}

// Compares with exact(i) for every element i: within one rounding to T and some of float, of the largest value.
template <class T, class F>
void expect(const char* what, const Buffer<T>& got, F exact) {
  std::vector<double> expected;
  double largest = 0.0;
  for (int64_t i = 0; i < got.size(); ++i) {
    expected.push_back(exact(i));
    largest = std::max(largest, std::abs(expected.back()));
  }
  const double rounding = std::is_floating_point_v<T> ? 0.0 : std::is_same_v<T, __half> ? 0x1p-11 : 0x1p-8;
  const double bound = (rounding + 32.0 * std::numeric_limits<float>::epsilon()) * largest;
  for (int64_t i = 0; i < got.size(); ++i) {
    if (std::abs(got[i] - expected[i]) <= bound) continue;  // false for NaN
    throw std::runtime_error(std::string(what) + ": element " + std::to_string(i) + " is " + std::to_string(got[i]) +
                             ", expected " + std::to_string(expected[i]));
  }
}

// Calls f(T{}, width) for every element type, with the width as a std::integral_constant: one element, and 16 bytes.
template <class F>
void for_each_type(F f) {
  f(float{}, std::integral_constant<int, 1>{});
  f(float{}, std::integral_constant<int, kWide<float>>{});
  f(__half{}, std::integral_constant<int, 1>{});
  f(__half{}, std::integral_constant<int, kWide<__half>>{});
  f(__nv_bfloat16{}, std::integral_constant<int, 1>{});
  f(__nv_bfloat16{}, std::integral_constant<int, kWide<__nv_bfloat16>>{});
}

// The value of main: runs the tests and prints what went wrong.
template <class F>
int report(F tests) {
  try {
    tests();
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  return 0;
}

}  // namespace stitchvm::emulator
