// Qualifier of a small function shared by the CPU kernels and the CUDA kernels.
#pragma once

#if defined(__CUDACC__)
#define STITCHVM_INLINE __host__ __device__ __forceinline__
#else
// always_inline, not a hint: the CPU kernels rely on it to be compiled for the caller's instruction set.
#define STITCHVM_INLINE inline __attribute__((always_inline))
// Inlines a lambda into its caller, so that it is compiled for the caller's instruction set.
#define STITCHVM_LAMBDA __attribute__((always_inline))
#endif
