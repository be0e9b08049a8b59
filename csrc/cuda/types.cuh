// Element types of the CUDA kernels: conversions to the fp32 they compute in, and 16-byte vector access. No torch
// headers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace stitchvm {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

template <class T, int kVec>
struct alignas(sizeof(T) * kVec) Packed {
  T v[kVec];
};

// Elements per 16-byte access.
template <class T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));

#ifdef STITCHVM_EMULATE
#define STITCHVM_CHECK_ALIGNED(p, bytes) ::stitchvm::emulator::check_aligned(p, bytes)
#else
#define STITCHVM_CHECK_ALIGNED(p, bytes)  // a GPU faults by itself
#endif

// p must be aligned to kVec elements, in all of these.
template <int kVec, class T>
__device__ __forceinline__ Packed<T, kVec> load_packed(const T* p) {
  STITCHVM_CHECK_ALIGNED(p, sizeof(T) * kVec);
  return *reinterpret_cast<const Packed<T, kVec>*>(p);
}

template <int kVec, class T>
__device__ __forceinline__ void store_packed(T* p, const Packed<T, kVec>& v) {
  STITCHVM_CHECK_ALIGNED(p, sizeof(T) * kVec);
  *reinterpret_cast<Packed<T, kVec>*>(p) = v;
}

template <class T, int kVec>
__device__ __forceinline__ Packed<T, kVec> pack(const float (&in)[kVec]) {
  Packed<T, kVec> raw;
#pragma unroll
  for (int i = 0; i < kVec; ++i) raw.v[i] = from_float<T>(in[i]);
  return raw;
}

template <int kVec, class T>
__device__ __forceinline__ void load(const T* p, float (&out)[kVec]) {
  const Packed<T, kVec> raw = load_packed<kVec>(p);
#pragma unroll
  for (int i = 0; i < kVec; ++i) out[i] = to_float(raw.v[i]);
}

template <int kVec, class T>
__device__ __forceinline__ void store(T* p, const float (&in)[kVec]) {
  store_packed(p, pack<T>(in));
}

}  // namespace stitchvm
