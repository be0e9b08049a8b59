// guidance_step kernels: partial sums over parts of every sample, then the step, each of whose blocks adds its sample's
// partial sums again in the same order. How a sample is cut depends on its size alone. No torch headers.
#pragma once

#include "../common/guidance_step.h"
#include "reduce.cuh"
#include "types.cuh"

namespace stitchvm {

constexpr int kGuidanceThreads = 256;
constexpr int kGuidanceMaxParts = 128;        // of a sample; at most kGuidanceThreads
constexpr int64_t kGuidanceMinPart = 1024;    // elements: a vector of four for every thread
constexpr int64_t kGuidanceBlockSize = 4096;  // elements that a block of the step computes

// T is the type of the model. Squared norms are summed in double: squares of gradients of 1e-25 or 1e25 do not fit
// float32.
template <class T>
struct GuidanceStepParams {
  GuidanceParams<float, T> step;
  double* sums;           // [batch, parts, 2]
  int64_t parts;          // of a sample, at most kGuidanceMaxParts
  int64_t part_size;      // elements, a multiple of 4
  int64_t sample_blocks;  // of the step, for each sample
};

template <int kVec, class T>
__device__ __forceinline__ void load_velocity(const GuidanceParams<float, T>& s, int64_t at, float (&u)[kVec]) {
  load<kVec>(s.cond + at, u);
  if (s.uncond == nullptr) return;
  const float scale = static_cast<float>(s.guidance_scale);
  float uncond[kVec];
  load<kVec>(s.uncond + at, uncond);
#pragma unroll
  for (int i = 0; i < kVec; ++i) u[i] = guided_velocity(u[i], uncond[i], scale);
}

// grid: batch * parts blocks of kGuidanceThreads. kVec > 1 needs all pointers aligned to kVec elements and
// size % kVec == 0.
template <class T, int kVec>
__global__ void __launch_bounds__(kGuidanceThreads) guidance_norms(const GuidanceStepParams<T> p) {
  __shared__ double scratch[32];
  const GuidanceParams<float, T>& s = p.step;
  const int64_t sample = blockIdx.x / p.parts;
  const int64_t begin = blockIdx.x % p.parts * p.part_size;
  const int64_t end = begin + p.part_size < s.size ? begin + p.part_size : s.size;
  double velocity_sum = 0.0;
  double grad_sum = 0.0;
  for (int64_t i = begin + threadIdx.x * kVec; i < end; i += kGuidanceThreads * kVec) {
    const int64_t at = sample * s.size + i;
    float v[kVec];
    load_velocity<kVec>(s, at, v);
#pragma unroll
    for (int k = 0; k < kVec; ++k) velocity_sum += static_cast<double>(v[k]) * static_cast<double>(v[k]);
    if (s.grad == nullptr) continue;
    load<kVec>(s.grad + at, v);
#pragma unroll
    for (int k = 0; k < kVec; ++k) grad_sum += static_cast<double>(v[k]) * static_cast<double>(v[k]);
  }
  velocity_sum = block_sum(velocity_sum, scratch);
  grad_sum = block_sum(grad_sum, scratch);
  if (threadIdx.x == 0) {
    p.sums[2 * static_cast<int64_t>(blockIdx.x)] = velocity_sum;
    p.sums[2 * static_cast<int64_t>(blockIdx.x) + 1] = grad_sum;
  }
}

// grid: batch * sample_blocks blocks of kGuidanceThreads. The same launch rules as guidance_norms.
template <class T, int kVec>
__global__ void __launch_bounds__(kGuidanceThreads) guidance_apply(const GuidanceStepParams<T> p) {
  __shared__ double scratch[32];
  const GuidanceParams<float, T>& s = p.step;
  const int64_t sample = blockIdx.x / p.sample_blocks;
  const int64_t block = blockIdx.x % p.sample_blocks;
  const bool adds = threadIdx.x < p.parts;
  const double* sums = p.sums + 2 * (sample * p.parts + threadIdx.x);
  const double velocity_norm = sqrt(block_sum(adds ? sums[0] : 0.0, scratch));
  const double grad_norm = sqrt(block_sum(adds ? sums[1] : 0.0, scratch));
  if (block == 0 && threadIdx.x == 0) {
    s.norms[2 * sample] = static_cast<float>(velocity_norm);
    s.norms[2 * sample + 1] = static_cast<float>(grad_norm);
  }
  const GuidanceFactor<float> c = guidance_factor<float>(velocity_norm, grad_norm, s.strength, s.relative);
  const float latents_coef = static_cast<float>(s.latents_coef);
  const float velocity_coef = static_cast<float>(s.velocity_coef);
  const float noise_coef = static_cast<float>(s.noise_coef);
  const int64_t begin = block * kGuidanceBlockSize;
  const int64_t end = begin + kGuidanceBlockSize < s.size ? begin + kGuidanceBlockSize : s.size;
  for (int64_t i = begin + threadIdx.x * kVec; i < end; i += kGuidanceThreads * kVec) {
    const int64_t at = sample * s.size + i;
    float u[kVec], v[kVec], out[kVec];
    load_velocity<kVec>(s, at, u);
    if (s.grad != nullptr) {
      load<kVec>(s.grad + at, v);
#pragma unroll
      for (int k = 0; k < kVec; ++k) u[k] -= c.amount * (c.unit * v[k]);
    }
    load<kVec>(s.latents + at, v);
#pragma unroll
    for (int k = 0; k < kVec; ++k) out[k] = latents_coef * v[k] + velocity_coef * u[k];
    if (s.noise != nullptr) {
      load<kVec>(s.noise + at, v);
#pragma unroll
      for (int k = 0; k < kVec; ++k) out[k] += noise_coef * v[k];
    }
    store<kVec>(s.out + at, out);
  }
}

}  // namespace stitchvm
