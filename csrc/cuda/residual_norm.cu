// residual_norm on CUDA: launch and registration of the kernels in residual_norm.cuh.
#include "../args/residual_norm.h"
#include "launch.cuh"
#include "residual_norm.cuh"

namespace stitchvm {
namespace {

// Whole warps: kHeldVectors vectors per thread, or as near as the largest block allows.
dim3 row_threads(int64_t channels, int vec) {
  const int64_t per_warp = 32 * vec * kHeldVectors;
  return dim3(
      static_cast<unsigned>(std::min<int64_t>((channels + per_warp - 1) / per_warp * 32, kResidualNormThreads)));
}

// Calls f(kVec, kHold) as integral constants: 16-byte vectors of a row held in registers, of a row read again because
// it is too wide, or single elements read again.
template <class T, class F>
void dispatch_row(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> strides, int64_t channels,
                  F&& f) {
  dispatch_vector_width<T>(pointers, strides, [&](auto vec) {
    constexpr int kVec = decltype(vec)::value;
    if constexpr (kVec > 1) {
      if (channels <= static_cast<int64_t>(kHeldVectors) * kVec * kResidualNormThreads) {
        return f(vec, std::integral_constant<int, kHeldVectors>{});
      }
    }
    f(vec, std::integral_constant<int, 0>{});
  });
}

template <int kBranches, class T>
void launch_forward(const Tensor& x, const ResidualNormParams<T>& p) {
  const dim3 grid(static_cast<unsigned>(p.rows.count));
  const int64_t channels = p.rows.channels;
  dispatch_row<T>(
      {p.x, p.branch, p.branch2, p.gate.data, p.gate2.data, p.scale.data, p.shift.data, p.scale2.data, p.shift2.data,
       p.residual, p.y, p.y2},
      {channels, p.gate.stride, p.gate2.stride, p.scale.stride, p.shift.stride, p.scale2.stride, p.shift2.stride},
      channels, [&](auto vec, auto hold) {
        constexpr int kVec = decltype(vec)::value;
        constexpr int kHold = decltype(hold)::value;
        const dim3 block = row_threads(channels, kVec);
        if (p.y != nullptr) {
          launch(residual_norm_forward<T, kVec, kHold, kBranches>, grid, block, x, p);
        } else if constexpr (kBranches > 0) {
          launch(residual_forward<T, kVec, kBranches>, grid, block, x, p);
        }
      });
}

void residual_norm_cuda_out(const Tensor& x, const MaybeTensor& branch, const MaybeTensor& gate,
                            const MaybeTensor& branch2, const MaybeTensor& gate2, const MaybeTensor& scale,
                            const MaybeTensor& shift, const MaybeTensor& scale2, const MaybeTensor& shift2,
                            const MaybeTensor& rows, bool affine, double eps, const MaybeTensor& residual,
                            const MaybeTensor& y, const MaybeTensor& y2) {
  const DeviceGuard guard(x.get_device_index());
  const ResidualNormTensors t =
      residual_norm_tensors(x, branch, gate, branch2, gate2, scale, shift, scale2, shift2, rows, residual, y, y2);
  if (x.numel() == 0) return;
  check_grid("residual_norm", x.size(0) * x.size(1));
  dispatch_cuda_dtype("residual_norm", x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const ResidualNormParams<T> p = residual_norm_params<T>(t, affine, eps);
    if (p.branch2 != nullptr) {
      launch_forward<2>(t.x, p);
    } else if (p.branch != nullptr) {
      launch_forward<1>(t.x, p);
    } else {
      launch_forward<0>(t.x, p);
    }
  });
}

void residual_norm_input_grad_cuda_out(const MaybeTensor& grad_residual, const MaybeTensor& grad_y,
                                       const MaybeTensor& grad_y2, const MaybeTensor& residual, const MaybeTensor& gate,
                                       const MaybeTensor& gate2, const MaybeTensor& scale, const MaybeTensor& scale2,
                                       const MaybeTensor& rows, bool affine, double eps, const MaybeTensor& grad_x,
                                       const MaybeTensor& grad_branch, const MaybeTensor& grad_branch2) {
  const DeviceGuard guard(any_gradient(grad_residual, grad_y, grad_y2).get_device_index());
  const ResidualNormGradTensors t = residual_norm_grad_tensors(grad_residual, grad_y, grad_y2, residual, gate, gate2,
                                                               scale, scale2, rows, grad_x, grad_branch, grad_branch2);
  if (t.like.numel() == 0 || !(grad_x.has_value() || gate.has_value() || gate2.has_value())) return;
  check_grid("residual_norm_input_grad", t.like.size(0) * t.like.size(1));
  dispatch_cuda_dtype("residual_norm_input_grad", t.like.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const ResidualNormGradParams<T> p = residual_norm_grad_params<T>(t, affine, eps);
    const int64_t channels = p.rows.channels;
    dispatch_row<T>({p.grad_residual, p.grad_y, p.grad_y2, p.residual, p.gate.data, p.gate2.data, p.scale.data,
                     p.scale2.data, p.grad_x, p.grad_branch, p.grad_branch2},
                    {channels, p.gate.stride, p.gate2.stride, p.scale.stride, p.scale2.stride}, channels,
                    [&](auto vec, auto hold) {
                      constexpr int kVec = decltype(vec)::value;
                      constexpr int kHold = decltype(hold)::value;
                      const dim3 grid(static_cast<unsigned>(p.rows.count));
                      const dim3 block = row_threads(channels, kVec);
                      if (p.grad_y != nullptr) {
                        launch(residual_norm_backward<T, kVec, kHold>, grid, block, t.like, p);
                      } else {
                        launch(residual_backward<T, kVec>, grid, block, t.like, p);
                      }
                    });
  });
}

}  // namespace
}  // namespace stitchvm

STITCHVM_DEVICE_IMPL(m) {
  using namespace stitchvm;
  m.impl("residual_norm", TORCH_BOX(&residual_norm_functional<&residual_norm_cuda_out>));
  m.impl("residual_norm.out", TORCH_BOX(&residual_norm_cuda_out));
  m.impl("residual_norm_input_grad",
         TORCH_BOX(&residual_norm_input_grad_functional<&residual_norm_input_grad_cuda_out>));
  m.impl("residual_norm_input_grad.out", TORCH_BOX(&residual_norm_input_grad_cuda_out));
}
