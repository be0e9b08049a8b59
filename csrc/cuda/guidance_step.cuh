// guidance_step kernels: partial sums over a fixed number of parts of every sample, then the step, each of whose blocks
// adds its sample's partial sums again in the same order. No torch headers.
#pragma once

#include "../common/guidance_step.h"
#include "reduce.cuh"
#include "types.cuh"

namespace stitchvm {

constexpr int kGuidanceThreads = 256;
constexpr int kGuidanceParts = 128;           // of a sample, whatever its size and the batch; at most kGuidanceThreads
constexpr int64_t kGuidanceBlockSize = 4096;  // elements that a block of the step computes

// Squared norms are summed in double: squares of gradients of 1e-25 or 1e25 do not fit float32.
template <class M>
struct GuidanceLaunch {
  GuidanceParams<float, M> p;
  double* sums;           // [batch, kGuidanceParts, 2]
  int64_t part_size;      // elements, a multiple of 8
  int64_t sample_blocks;  // of the step, for each sample
};

template <int kVec, class M>
__device__ __forceinline__ void load_velocity(const GuidanceParams<float, M>& p, int64_t at, float (&u)[kVec]) {
  load<kVec>(p.cond + at, u);
  if (p.uncond == nullptr) return;
  const float scale = static_cast<float>(p.guidance_scale);
  float uncond[kVec];
  load<kVec>(p.uncond + at, uncond);
#pragma unroll
  for (int i = 0; i < kVec; ++i) u[i] = guided_velocity(u[i], uncond[i], scale);
}

// grid: batch * kGuidanceParts blocks of kGuidanceThreads. kVec > 1 needs all pointers aligned to kVec elements and
// size % kVec == 0.
template <class M, int kVec>
__global__ void __launch_bounds__(kGuidanceThreads) guidance_norms(const GuidanceLaunch<M> l) {
  __shared__ double scratch[32];
  const GuidanceParams<float, M>& p = l.p;
  const int64_t sample = blockIdx.x / kGuidanceParts;
  const int64_t begin = static_cast<int64_t>(blockIdx.x % kGuidanceParts) * l.part_size;
  const int64_t end = begin + l.part_size < p.size ? begin + l.part_size : p.size;
  double velocity_sum = 0.0;
  double grad_sum = 0.0;
  for (int64_t i = begin + threadIdx.x * kVec; i < end; i += kGuidanceThreads * kVec) {
    const int64_t at = sample * p.size + i;
    float v[kVec];
    load_velocity<kVec>(p, at, v);
#pragma unroll
    for (int k = 0; k < kVec; ++k) velocity_sum += static_cast<double>(v[k]) * static_cast<double>(v[k]);
    if (p.grad == nullptr) continue;
    load<kVec>(p.grad + at, v);
#pragma unroll
    for (int k = 0; k < kVec; ++k) grad_sum += static_cast<double>(v[k]) * static_cast<double>(v[k]);
  }
  velocity_sum = block_sum(velocity_sum, scratch);
  grad_sum = block_sum(grad_sum, scratch);
  if (threadIdx.x == 0) {
    l.sums[2 * static_cast<int64_t>(blockIdx.x)] = velocity_sum;
    l.sums[2 * static_cast<int64_t>(blockIdx.x) + 1] = grad_sum;
  }
}

// grid: batch * sample_blocks blocks of kGuidanceThreads. The same launch rules as guidance_norms.
template <class M, int kVec>
__global__ void __launch_bounds__(kGuidanceThreads) guidance_apply(const GuidanceLaunch<M> l) {
  __shared__ double scratch[32];
  const GuidanceParams<float, M>& p = l.p;
  const int64_t sample = blockIdx.x / l.sample_blocks;
  const int64_t block = blockIdx.x % l.sample_blocks;
  const bool adds = threadIdx.x < kGuidanceParts;
  const double* sums = l.sums + 2 * (sample * kGuidanceParts + threadIdx.x);
  const double velocity_norm = sqrt(block_sum(adds ? sums[0] : 0.0, scratch));
  const double grad_norm = sqrt(block_sum(adds ? sums[1] : 0.0, scratch));
  if (block == 0 && threadIdx.x == 0) {
    p.norms[2 * sample] = static_cast<float>(velocity_norm);
    p.norms[2 * sample + 1] = static_cast<float>(grad_norm);
  }
  const GuidanceFactor<float> c = guidance_factor<float>(velocity_norm, grad_norm, p.strength, p.relative);
  const float latents_coef = static_cast<float>(p.latents_coef);
  const float velocity_coef = static_cast<float>(p.velocity_coef);
  const float noise_coef = static_cast<float>(p.noise_coef);
  const int64_t begin = block * kGuidanceBlockSize;
  const int64_t end = begin + kGuidanceBlockSize < p.size ? begin + kGuidanceBlockSize : p.size;
  for (int64_t i = begin + threadIdx.x * kVec; i < end; i += kGuidanceThreads * kVec) {
    const int64_t at = sample * p.size + i;
    float u[kVec], v[kVec], out[kVec];
    load_velocity<kVec>(p, at, u);
    if (p.grad != nullptr) {
      load<kVec>(p.grad + at, v);
#pragma unroll
      for (int k = 0; k < kVec; ++k) u[k] -= c.amount * (c.unit * v[k]);
    }
    load<kVec>(p.latents + at, v);
#pragma unroll
    for (int k = 0; k < kVec; ++k) out[k] = latents_coef * v[k] + velocity_coef * u[k];
    if (p.noise != nullptr) {
      load<kVec>(p.noise + at, v);
#pragma unroll
      for (int k = 0; k < kVec; ++k) out[k] += noise_coef * v[k];
    }
    store<kVec>(p.out + at, out);
  }
}

}  // namespace stitchvm
