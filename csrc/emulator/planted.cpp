// Kernels with a planted error each, for tests/test_emulator.py and CTest: `planted NAME` prints what the emulator says
// of kernel NAME, and `planted` alone lists the names.
#include "driver.h"
// after driver.h, which gives the kernels the CUDA language
#include <map>

#include "../cuda/reduce.cuh"

using namespace stitchvm;
using namespace stitchvm::emulator;

struct Planted {
  const float* x;
  float* y;
  int n;  // elements of x and y, one per thread
};

__device__ int thread_number() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

// Nothing wrong here: two sums, the second of which reuses the scratch memory of the first.
__global__ void healthy(const Planted p) {
  __shared__ float scratch[32];
  const float v = p.x[thread_number()];
  const float mean = block_sum(v, scratch) / static_cast<float>(blockDim.x);
  p.y[thread_number()] = block_sum((v - mean) * (v - mean), scratch);
}

__global__ void missing_barrier(const Planted p) {
  __shared__ float row[1024];
  row[threadIdx.x] = p.x[thread_number()];
  p.y[thread_number()] = row[blockDim.x - 1 - threadIdx.x];
}

__global__ void uninitialised_shared(const Planted p) {
  __shared__ float row[1024];
  if (threadIdx.x > 0) row[threadIdx.x] = p.x[thread_number()];
  __syncthreads();
  p.y[thread_number()] = row[threadIdx.x];
}

// The blocks write to the same place.
__global__ void racing_blocks(const Planted p) {
  p.y[thread_number()] = 0.0f;
  p.y[threadIdx.x] = static_cast<float>(blockIdx.x);
}

__global__ void barrier_after_return(const Planted p) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  p.y[thread_number()] = 0.0f;
}

__global__ void divergent_barrier(const Planted p) {
  if (threadIdx.x < 40) {
    __syncthreads();
    p.y[thread_number()] = 0.0f;
  } else {
    p.y[thread_number()] = 1.0f;
    __syncthreads();
  }
}

__global__ void divergent_shuffle(const Planted p) {
  float v = p.x[thread_number()];
  if (threadIdx.x % 32 < 7) {
    v = __shfl_xor_sync(0xffffffffu, v, 1);
  } else {
    v = __shfl_down_sync(0xffffffffu, v, 1);
  }
  p.y[thread_number()] = v;
}

__global__ void shuffle_after_return(const Planted p) {
  if (threadIdx.x % 32 == 31) return;
  p.y[thread_number()] = warp_sum(p.x[thread_number()]);
}

__global__ void shuffle_and_barrier(const Planted p) {
  float v = p.x[thread_number()];
  if (threadIdx.x == 33) __syncthreads();
  v = __shfl_sync(0xffffffffu, v, 0);
  if (threadIdx.x != 33) __syncthreads();
  p.y[thread_number()] = v;
}

__global__ void shuffle_outside_mask(const Planted p) {
  float v = p.x[thread_number()];
  if (threadIdx.x % 32 < 16) v = __shfl_xor_sync(0xffffu, v, 16);
  p.y[thread_number()] = v;
}

__global__ void different_masks(const Planted p) {
  const unsigned mask = threadIdx.x % 32 == 0 ? 0xffffffffu : 0xfffffffeu;
  p.y[thread_number()] = __shfl_sync(mask, p.x[thread_number()], 5);
}

__global__ void misaligned_vector(const Planted p) {
  float v[4];
  load<4>(p.x + thread_number() / 8, v);
  p.y[thread_number()] = v[0];
}

__global__ void out_of_bounds(const Planted p) { p.y[thread_number() + 1] = p.x[thread_number()]; }

__global__ void trap(const Planted p) {
  if (thread_number() == 70) __trap();
  p.y[thread_number()] = 0.0f;
}

__global__ void deep_stack(const Planted p) {
  volatile char large[66000];
  for (int i = 0; i < 66000; ++i) large[i] = 0;
  p.y[thread_number()] = large[0];
}

struct Case {
  void (*kernel)(Planted);
  int threads;
};

int main(int argc, char** argv) {
  const std::map<std::string, Case> cases = {
      {"healthy", {healthy, 128}},
      {"missing_barrier", {missing_barrier, 64}},
      {"uninitialised_shared", {uninitialised_shared, 64}},
      {"racing_blocks", {racing_blocks, 64}},
      {"barrier_after_return", {barrier_after_return, 64}},
      {"divergent_barrier", {divergent_barrier, 64}},
      {"divergent_shuffle", {divergent_shuffle, 64}},
      {"shuffle_after_return", {shuffle_after_return, 64}},
      {"shuffle_and_barrier", {shuffle_and_barrier, 64}},
      {"shuffle_outside_mask", {shuffle_outside_mask, 64}},
      {"shuffle_in_half_a_warp", {healthy, 48}},
      {"different_masks", {different_masks, 64}},
      {"misaligned_vector", {misaligned_vector, 64}},
      {"out_of_bounds", {out_of_bounds, 64}},
      {"trap", {trap, 64}},
      {"deep_stack", {deep_stack, 1}},
      {"too_many_threads", {healthy, 2048}},
  };
  if (argc == 1) {
    for (const auto& [name, _] : cases) std::printf("%s\n", name.c_str());
    return 0;
  }
  return report([&] {
    const Case c = cases.at(argv[1]);
    const int blocks = 3;
    const Buffer<float> x(blocks * c.threads);
    Buffer<float> y(blocks * c.threads);
    launch_checked(c.kernel, dim3(blocks), dim3(c.threads), Planted{x.data(), y.data(), blocks * c.threads}, y);
  });
}
