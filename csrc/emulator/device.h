// The part of the CUDA language that the kernels use, for a C++ compiler. Given with -include, ahead of the unchanged
// source, together with -DSTITCHVM_EMULATE. What is missing here does not compile: add it when a kernel needs it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cmath>

#include "emulator.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __align__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// See fill_shared_memory in emulator.cpp.
#define __shared__ static thread_local

#define threadIdx (::stitchvm::emulator::indices.thread)
#define blockIdx (::stitchvm::emulator::indices.block)
#define blockDim (::stitchvm::emulator::indices.block_dim)
#define gridDim (::stitchvm::emulator::indices.grid_dim)
#define warpSize 32

// The place of the call, as the default value of a last parameter.
#define STITCHVM_SITE(function) ::stitchvm::emulator::Site site = {function, __builtin_FILE(), __builtin_LINE()}

inline void __syncthreads(STITCHVM_SITE("__syncthreads")) { ::stitchvm::emulator::block_barrier(site); }

inline void __syncwarp(unsigned mask = 0xffffffffu, STITCHVM_SITE("__syncwarp")) {
  ::stitchvm::emulator::warp_barrier(mask, site);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, STITCHVM_SITE("__shfl_sync")) {
  const int first = ::stitchvm::emulator::lane() / width * width;
  return ::stitchvm::emulator::shuffle(mask, value, first + source % width, site);
}

// In the next three, a lane whose source would lie outside its group of `width` lanes keeps its own value.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, STITCHVM_SITE("__shfl_xor_sync")) {
  const int lane = ::stitchvm::emulator::lane();
  const int source = lane ^ lane_mask;
  return ::stitchvm::emulator::shuffle(mask, value, source / width > lane / width ? lane : source, site);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, STITCHVM_SITE("__shfl_down_sync")) {
  const int lane = ::stitchvm::emulator::lane();
  const int source = lane + static_cast<int>(delta);
  return ::stitchvm::emulator::shuffle(mask, value, source / width > lane / width ? lane : source, site);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, STITCHVM_SITE("__shfl_up_sync")) {
  const int lane = ::stitchvm::emulator::lane();
  const int source = lane - static_cast<int>(delta);
  return ::stitchvm::emulator::shuffle(mask, value, source < lane / width * width ? lane : source, site);
}

[[noreturn]] inline void __trap(STITCHVM_SITE("__trap")) { ::stitchvm::emulator::fail("stopped by the kernel", site); }

template <class T>
T __ldg(const T* p) {
  return *p;
}

// Macros: the C library declares some of these names itself.
#define rsqrtf(x) (1.0f / std::sqrt(static_cast<float>(x)))
#define __frcp_rn(x) (1.0f / static_cast<float>(x))
#define __fdividef(x, y) (static_cast<float>(x) / static_cast<float>(y))
#define __expf(x) std::exp(static_cast<float>(x))
#define __logf(x) std::log(static_cast<float>(x))
