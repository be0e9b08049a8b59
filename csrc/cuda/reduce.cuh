// Deterministic sums over a block: the order depends on the block's size alone. No torch headers.
#pragma once

namespace stitchvm {

template <class A>
__device__ __forceinline__ A warp_sum(A v) {
#pragma unroll
  for (int distance = 16; distance > 0; distance >>= 1) v += __shfl_xor_sync(0xffffffffu, v, distance);
  return v;
}

// The sum over all threads, returned to all. blockDim.x is a multiple of 32; `scratch` holds 32 values and may be
// passed to the next call at once: the leading barrier keeps a fast warp from overwriting what a slow one still reads.
template <class A>
__device__ __forceinline__ A block_sum(A v, A* scratch) {
  const int warps = static_cast<int>(blockDim.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  v = warp_sum(v);
  __syncthreads();
  if (lane == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  return warp_sum(lane < warps ? scratch[lane] : A(0));
}

}  // namespace stitchvm
