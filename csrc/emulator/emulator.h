// Runs a CUDA kernel on the CPU, block by block, and says what is wrong with it. Each thread of a block is a fiber; a
// fiber runs until it waits for others. device.h gives the kernel's source the CUDA names for what stands here.
//
// Found, as a std::runtime_error that names kernel, block, thread and line:
//   __syncthreads that a thread of the block does not reach, or reaches elsewhere, or that follows its return;
//   a warp shuffle that a lane of the mask does not reach, or reaches elsewhere or with another mask;
//   a shuffle that reads from a lane outside the mask; a misaligned vector access; __trap(); an impossible launch.
// Found, as a difference between schedules: a missing barrier, and shared memory that is read before it is written.
// Not found: most races between blocks, numbers that depend on the GPU's own arithmetic, resource limits, speed.
#pragma once

#include <vector_types.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>

namespace stitchvm::emulator {

// The order in which threads run. One warp after the other as far as it gets, from the first or from the last; or a
// step of a warp chosen at random (the same choices on every run). A kernel's result must not depend on it. Shared
// memory starts with other garbage under each.
enum class Schedule : int { kForward, kReverse, kShuffled };
constexpr Schedule kSchedules[] = {Schedule::kForward, Schedule::kReverse, Schedule::kShuffled};

void set_schedule(Schedule schedule);

// As in the source, with its template arguments.
std::string kernel_name(const void* kernel);

// Runs thread() for every thread of the grid; `kernel` is there for its name.
void run_grid(const void* kernel, dim3 grid, dim3 block, const std::function<void()>& thread);

// kernel<<<grid, block>>>(params)
template <class Params>
void run(void (*kernel)(Params), dim3 grid, dim3 block, const Params& params) {
  run_grid(reinterpret_cast<const void*>(kernel), grid, block, [&] { kernel(params); });
}

// ---- what the running thread sees and does -----------------------------------------------------------------------

struct Indices {
  uint3 thread;
  uint3 block;
  dim3 block_dim;
  dim3 grid_dim;
};
extern Indices indices;  // of the running thread

// A call of a synchronising function in the kernel's source.
struct Site {
  const char* function;
  const char* file;
  int line;
};

[[noreturn]] void fail(const char* what, Site site);

// Waits for every thread of the block.
void block_barrier(Site site);

// Waits for every lane of the mask.
void warp_barrier(unsigned mask, Site site);

// Waits for every lane of the mask and returns the value that lane `source` came with.
uint64_t warp_exchange(unsigned mask, uint64_t value, int source, Site site);

// The number of the running thread in its warp.
int lane();

template <class T>
T shuffle(unsigned mask, T value, int source, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t), "shuffles move up to 8 bytes");
  uint64_t raw = 0;
  std::memcpy(&raw, &value, sizeof(T));
  raw = warp_exchange(mask, raw, source, site);
  std::memcpy(static_cast<void*>(&value), &raw, sizeof(T));
  return value;
}

inline void check_aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail("misaligned address", {"vector access", "", 0});
}

}  // namespace stitchvm::emulator
