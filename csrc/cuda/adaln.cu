// adaln on CUDA: launch and registration of the kernels in adaln.cuh.
#include "../args/adaln.h"
#include "adaln.cuh"
#include "launch.cuh"

namespace stitchvm {
namespace {

// Whole warps, enough for one vector per thread, at most kAdalnMaxThreads.
int adaln_threads(int64_t channels, int vec) {
  const int64_t warps = (channels + 32 * vec - 1) / (32 * vec);
  return static_cast<int>(std::min<int64_t>(warps * 32, kAdalnMaxThreads));
}

void adaln_cuda_out(const Tensor& x_in, const Tensor& scale_in, const Tensor& shift_in, double eps, const Tensor& y) {
  check_adaln("adaln", x_in, scale_in, "scale");
  check_adaln("adaln", x_in, shift_in, "shift");
  check_out("adaln", x_in, y);
  if (y.numel() == 0) return;
  check_grid("adaln", x_in.size(0) * x_in.size(1));
  const DeviceGuard guard(x_in.get_device_index());
  const Tensor x = torch::stable::contiguous(x_in);
  const Tensor scale = with_contiguous_rows(scale_in);
  const Tensor shift = with_contiguous_rows(shift_in);
  dispatch_cuda_dtype("adaln", x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const AdalnParams<T> p = adaln_params<T>(x, scale, shift, y, eps);
    dispatch_vector_width<T>({p.x, p.scale, p.shift, p.y}, {p.channels, p.scale_stride, p.shift_stride}, [&](auto vec) {
      constexpr int kVec = decltype(vec)::value;
      const int threads = adaln_threads(p.channels, kVec);
      launch(adaln_forward<T, kVec>, dim3(static_cast<unsigned>(p.rows)), dim3(threads), x, p);
    });
  });
}

Tensor adaln_cuda(const Tensor& x, const Tensor& scale, const Tensor& shift, double eps) {
  const Tensor y = empty_contiguous(x);
  adaln_cuda_out(x, scale, shift, eps, y);
  return y;
}

void adaln_input_grad_cuda_out(const Tensor& grad_in, const Tensor& x_in, const Tensor& scale_in, double eps,
                               const Tensor& grad_x) {
  check_adaln("adaln_input_grad", x_in, scale_in, "scale");
  check_same_shape("adaln_input_grad", x_in, grad_in, "grad");
  check_out("adaln_input_grad", x_in, grad_x);
  if (grad_x.numel() == 0) return;
  check_grid("adaln_input_grad", x_in.size(0) * x_in.size(1));
  const DeviceGuard guard(x_in.get_device_index());
  const Tensor grad = torch::stable::contiguous(grad_in);
  const Tensor x = torch::stable::contiguous(x_in);
  const Tensor scale = with_contiguous_rows(scale_in);
  dispatch_cuda_dtype("adaln_input_grad", x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const AdalnGradParams<T> p = adaln_grad_params<T>(grad, x, scale, grad_x, eps);
    dispatch_vector_width<T>({p.grad, p.x, p.scale, p.grad_x}, {p.channels, p.scale_stride}, [&](auto vec) {
      constexpr int kVec = decltype(vec)::value;
      const int threads = adaln_threads(p.channels, kVec);
      launch(adaln_backward<T, kVec>, dim3(static_cast<unsigned>(p.rows)), dim3(threads), x, p);
    });
  });
}

Tensor adaln_input_grad_cuda(const Tensor& grad, const Tensor& x, const Tensor& scale, double eps) {
  const Tensor grad_x = empty_contiguous(x);
  adaln_input_grad_cuda_out(grad, x, scale, eps, grad_x);
  return grad_x;
}

}  // namespace
}  // namespace stitchvm

STITCHVM_DEVICE_IMPL(m) {
  m.impl("adaln", TORCH_BOX(&stitchvm::adaln_cuda));
  m.impl("adaln.out", TORCH_BOX(&stitchvm::adaln_cuda_out));
  m.impl("adaln_input_grad", TORCH_BOX(&stitchvm::adaln_input_grad_cuda));
  m.impl("adaln_input_grad.out", TORCH_BOX(&stitchvm::adaln_input_grad_cuda_out));
}
