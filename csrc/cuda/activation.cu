// activation on CUDA: launch and registration of the kernels in activation.cuh.
#include "../args/activation.h"
#include "activation.cuh"
#include "launch.cuh"

namespace stitchvm {
namespace {

dim3 activation_grid(const char* op, int64_t size, int vec) {
  const int64_t per_block = static_cast<int64_t>(kActivationThreads) * vec;
  const int64_t blocks = (size + per_block - 1) / per_block;
  check_grid(op, blocks);
  return dim3(static_cast<unsigned>(blocks));
}

void activation_cuda_out(const Tensor& x_in, const std::optional<Tensor>& bias_in, int64_t kind, const Tensor& y) {
  check_activation("activation", x_in, bias_in, kind);
  check_out("activation", x_in, y);
  if (y.numel() == 0) return;
  const DeviceGuard guard(x_in.get_device_index());
  const Tensor x = torch::stable::contiguous(x_in);
  const Tensor bias = contiguous_bias(bias_in);
  dispatch_cuda_dtype("activation", x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const ActivationParams<T> p = activation_params<T>(x, bias, kind, y);
    dispatch_vector_width<T>({p.x, p.bias, p.y}, {p.bias == nullptr ? p.size : p.channels}, [&](auto vec) {
      constexpr int kVec = decltype(vec)::value;
      launch(activation_forward<T, kVec>, activation_grid("activation", p.size, kVec), dim3(kActivationThreads), x, p);
    });
  });
}

Tensor activation_cuda(const Tensor& x, const std::optional<Tensor>& bias, int64_t kind) {
  const Tensor y = empty_contiguous(x);
  activation_cuda_out(x, bias, kind, y);
  return y;
}

void activation_input_grad_cuda_out(const Tensor& grad_in, const Tensor& x_in, const std::optional<Tensor>& bias_in,
                                    int64_t kind, const Tensor& grad_x) {
  check_activation("activation_input_grad", x_in, bias_in, kind);
  check_same_shape("activation_input_grad", x_in, grad_in, "grad");
  check_out("activation_input_grad", x_in, grad_x);
  if (grad_x.numel() == 0) return;
  const DeviceGuard guard(x_in.get_device_index());
  const Tensor grad = torch::stable::contiguous(grad_in);
  const Tensor x = torch::stable::contiguous(x_in);
  const Tensor bias = contiguous_bias(bias_in);
  dispatch_cuda_dtype("activation_input_grad", x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const ActivationGradParams<T> p = activation_grad_params<T>(grad, x, bias, kind, grad_x);
    dispatch_vector_width<T>({p.grad, p.x, p.bias, p.grad_x}, {p.bias == nullptr ? p.size : p.channels}, [&](auto vec) {
      constexpr int kVec = decltype(vec)::value;
      const dim3 grid = activation_grid("activation_input_grad", p.size, kVec);
      launch(activation_backward<T, kVec>, grid, dim3(kActivationThreads), x, p);
    });
  });
}

Tensor activation_input_grad_cuda(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& bias,
                                  int64_t kind) {
  const Tensor grad_x = empty_contiguous(x);
  activation_input_grad_cuda_out(grad, x, bias, kind, grad_x);
  return grad_x;
}

}  // namespace
}  // namespace stitchvm

STITCHVM_DEVICE_IMPL(m) {
  m.impl("activation", TORCH_BOX(&stitchvm::activation_cuda));
  m.impl("activation.out", TORCH_BOX(&stitchvm::activation_cuda_out));
  m.impl("activation_input_grad", TORCH_BOX(&stitchvm::activation_input_grad_cuda));
  m.impl("activation_input_grad.out", TORCH_BOX(&stitchvm::activation_input_grad_cuda_out));
}
