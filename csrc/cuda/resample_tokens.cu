// resample_tokens on CUDA: launch and registration of the kernels in resample_tokens.cuh.
#include "../args/resample_tokens.h"
#include "launch.cuh"
#include "resample_tokens.cuh"

namespace stitchvm {
namespace {

struct TokenLaunch {
  dim3 grid;
  dim3 block;
};

// A power of two of lanes per token, as many as its vectors need; the rest of the block takes further tokens.
TokenLaunch token_launch(const char* op, int64_t tokens, int64_t channels, int vec) {
  unsigned lanes = 1;
  while (lanes < kResampleThreads && static_cast<int64_t>(lanes) * vec < channels) lanes *= 2;
  const unsigned per_block = kResampleThreads / lanes;
  const int64_t blocks = (tokens + per_block - 1) / per_block;
  check_grid(op, blocks);
  return {dim3(static_cast<unsigned>(blocks)), dim3(lanes, per_block)};
}

void resample_tokens_cuda_out(const Tensor& x_in, const std::optional<Tensor>& bias_in,
                              const std::optional<Tensor>& position_in, const std::optional<Tensor>& prefix_in,
                              const std::optional<Tensor>& residual_in, int64_t h, int64_t w, int64_t out_h,
                              int64_t out_w, const Tensor& y) {
  const Grids grids{h, w, out_h, out_w, rows_of(prefix_in)};
  check_resample("resample_tokens", x_in, bias_in, position_in, prefix_in, residual_in, grids, y);
  if (y.numel() == 0) return;
  const DeviceGuard guard(x_in.get_device_index());
  const Tensor x = torch::stable::contiguous(x_in);
  const auto bias = contiguous(bias_in);
  const auto position = contiguous(position_in);
  const auto prefix = contiguous(prefix_in);
  const auto residual = contiguous(residual_in);
  dispatch_cuda_dtype("resample_tokens", x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const ResampleParams<T> p = resample_params<T>(x, bias, position, prefix, residual, grids, y);
    dispatch_vector_width<T>({p.x, p.bias, p.position, p.prefix, p.residual, p.y}, {p.channels}, [&](auto vec) {
      constexpr int kVec = decltype(vec)::value;
      const TokenLaunch shape = token_launch("resample_tokens", p.batch * grids.out_tokens(), p.channels, kVec);
      launch(resample_forward<T, kVec>, shape.grid, shape.block, x, p);
    });
  });
}

Tensor resample_tokens_cuda(const Tensor& x, const std::optional<Tensor>& bias, const std::optional<Tensor>& position,
                            const std::optional<Tensor>& prefix, const std::optional<Tensor>& residual, int64_t h,
                            int64_t w, int64_t out_h, int64_t out_w) {
  const Grids grids{h, w, out_h, out_w, rows_of(prefix)};
  const Tensor y = empty_tokens("resample_tokens", x, grids, grids.out_tokens());
  resample_tokens_cuda_out(x, bias, position, prefix, residual, h, w, out_h, out_w, y);
  return y;
}

void resample_tokens_input_grad_cuda_out(const Tensor& grad_in, int64_t prefix_tokens, int64_t h, int64_t w,
                                         int64_t out_h, int64_t out_w, const Tensor& grad_x) {
  const Grids grids{h, w, out_h, out_w, prefix_tokens};
  check_resample_grad("resample_tokens_input_grad", grad_in, grids, grad_x);
  if (grad_x.numel() == 0) return;
  const DeviceGuard guard(grad_in.get_device_index());
  const Tensor grad = torch::stable::contiguous(grad_in);
  dispatch_cuda_dtype("resample_tokens_input_grad", grad.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const ResampleGradParams<T> p = resample_grad_params<T>(grad, grids, grad_x);
    dispatch_vector_width<T>({p.grad, p.grad_x}, {p.channels}, [&](auto vec) {
      constexpr int kVec = decltype(vec)::value;
      const TokenLaunch shape = token_launch("resample_tokens_input_grad", p.batch * grids.tokens(), p.channels, kVec);
      launch(resample_backward<T, kVec>, shape.grid, shape.block, grad, p);
    });
  });
}

Tensor resample_tokens_input_grad_cuda(const Tensor& grad, int64_t prefix_tokens, int64_t h, int64_t w, int64_t out_h,
                                       int64_t out_w) {
  const Grids grids{h, w, out_h, out_w, prefix_tokens};
  const Tensor grad_x = empty_tokens("resample_tokens_input_grad", grad, grids, grids.tokens());
  resample_tokens_input_grad_cuda_out(grad, prefix_tokens, h, w, out_h, out_w, grad_x);
  return grad_x;
}

}  // namespace
}  // namespace stitchvm

STITCHVM_DEVICE_IMPL(m) {
  m.impl("resample_tokens", TORCH_BOX(&stitchvm::resample_tokens_cuda));
  m.impl("resample_tokens.out", TORCH_BOX(&stitchvm::resample_tokens_cuda_out));
  m.impl("resample_tokens_input_grad", TORCH_BOX(&stitchvm::resample_tokens_input_grad_cuda));
  m.impl("resample_tokens_input_grad.out", TORCH_BOX(&stitchvm::resample_tokens_input_grad_cuda_out));
}
