// qk_norm on CUDA: launch and registration of the kernels in qk_norm.cuh.
#include "../args/qk_norm.h"
#include "launch.cuh"
#include "qk_norm.cuh"

namespace stitchvm {
namespace {

// A power of two of lanes per head, as many as its units need and a warp at the most; the rest of the block takes
// further heads.
dim3 qk_block(int64_t dim, int unit) {
  unsigned lanes = 1;
  while (lanes < 32 && static_cast<int64_t>(lanes) * unit < dim) lanes *= 2;
  return dim3(lanes, kQkThreads / lanes);
}

int64_t rows_of(const Tensor& joint) { return joint.size(0) * joint.size(1); }

void qk_norm_cuda_out(const Tensor& q, const Tensor& k, const OptionalTensor& v, const OptionalTensor& context_q,
                      const OptionalTensor& context_k, const OptionalTensor& context_v, const OptionalTensor& q_weight,
                      const OptionalTensor& k_weight, const OptionalTensor& context_q_weight,
                      const OptionalTensor& context_k_weight, const OptionalTensor& cos, const OptionalTensor& sin,
                      int64_t heads, bool context_first, double eps, const Tensor& joint_q, const Tensor& joint_k,
                      const OptionalTensor& joint_v, const Tensor& q_rstd, const Tensor& k_rstd) {
  const DeviceGuard guard(q.get_device_index());
  const QkNormInputs in = qk_norm_inputs(q, k, v, context_q, context_k, context_v, q_weight, k_weight, context_q_weight,
                                         context_k_weight, cos, sin, heads, context_first, eps);
  check_qk_norm_results(q, k, v, context_q, context_k, heads, joint_q, joint_k, joint_v, q_rstd, k_rstd);
  const int64_t rows = rows_of(joint_q) + rows_of(joint_k) + (v ? rows_of(*joint_v) : 0);
  if (rows == 0) return;
  check_grid("qk_norm", rows);
  dispatch_cuda_dtype("qk_norm", q.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const auto p = qk_norm_params<T, float>(in, joint_q, joint_k, joint_v, q_rstd, k_rstd);
    dispatch_vector_width<T>(
        {p.q.image.data, p.q.context.data, p.q.weight, p.q.context_weight, p.q.joint, p.k.image.data, p.k.context.data,
         p.k.weight, p.k.context_weight, p.k.joint, p.v.image.data, p.v.context.data, p.v.joint, p.cos, p.sin},
        {p.dim, p.q.image.batch_stride, p.q.image.token_stride, p.q.context.batch_stride, p.q.context.token_stride,
         p.k.image.batch_stride, p.k.image.token_stride, p.k.context.batch_stride, p.k.context.token_stride,
         p.v.image.batch_stride, p.v.image.token_stride, p.v.context.batch_stride, p.v.context.token_stride},
        [&](auto vec) {
          constexpr int kVec = decltype(vec)::value;
          launch(qk_norm_forward<T, kVec>, dim3(static_cast<unsigned>(rows)), qk_block(p.dim, kQkUnit<kVec>), q, p);
        });
  });
}

QkNormResult qk_norm_cuda(const Tensor& q, const Tensor& k, const OptionalTensor& v, const OptionalTensor& context_q,
                          const OptionalTensor& context_k, const OptionalTensor& context_v,
                          const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                          const OptionalTensor& context_q_weight, const OptionalTensor& context_k_weight,
                          const OptionalTensor& cos, const OptionalTensor& sin, int64_t heads, bool context_first,
                          double eps) {
  const QkNormResult out = empty_qk_norm(q, k, v, context_q, context_k, heads);
  const auto& [joint_q, joint_k, joint_v, q_rstd, k_rstd] = out;
  qk_norm_cuda_out(q, k, v, context_q, context_k, context_v, q_weight, k_weight, context_q_weight, context_k_weight,
                   cos, sin, heads, context_first, eps, joint_q, joint_k, joint_v, q_rstd, k_rstd);
  return out;
}

void qk_norm_input_grad_cuda_out(const Tensor& grad_q, const Tensor& grad_k, const Tensor& joint_q,
                                 const Tensor& joint_k, const Tensor& q_rstd, const Tensor& k_rstd,
                                 const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                                 const OptionalTensor& context_q_weight, const OptionalTensor& context_k_weight,
                                 const OptionalTensor& cos, const OptionalTensor& sin, int64_t context_q_tokens,
                                 int64_t context_k_tokens, bool context_first, const Tensor& grad_input_q,
                                 const Tensor& grad_input_k, const OptionalTensor& grad_context_q,
                                 const OptionalTensor& grad_context_k) {
  const DeviceGuard guard(joint_q.get_device_index());
  const QkNormGradInputs in =
      qk_norm_grad_inputs(grad_q, grad_k, joint_q, joint_k, q_rstd, k_rstd, q_weight, k_weight, context_q_weight,
                          context_k_weight, cos, sin, context_q_tokens, context_k_tokens, context_first);
  check_qk_norm_grad_results(joint_q, joint_k, context_q_tokens, context_k_tokens, grad_input_q, grad_input_k,
                             grad_context_q, grad_context_k);
  const int64_t rows = rows_of(joint_q) + rows_of(joint_k);
  if (rows == 0) return;
  check_grid("qk_norm_input_grad", rows);
  dispatch_cuda_dtype("qk_norm_input_grad", joint_q.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const auto p = qk_norm_grad_params<T, float>(in, grad_input_q, grad_input_k, grad_context_q, grad_context_k);
    dispatch_vector_width<T>(
        {p.q.grad, p.q.joint, p.q.weight, p.q.context_weight, p.q.grad_image, p.q.grad_context, p.k.grad, p.k.joint,
         p.k.weight, p.k.context_weight, p.k.grad_image, p.k.grad_context, p.cos, p.sin},
        {p.dim, p.q.grad_batch_stride, p.q.grad_token_stride, p.q.grad_head_stride, p.k.grad_batch_stride,
         p.k.grad_token_stride, p.k.grad_head_stride},
        [&](auto vec) {
          constexpr int kVec = decltype(vec)::value;
          const dim3 block = qk_block(p.dim, kQkUnit<kVec>);
          launch(qk_norm_backward<T, kVec>, dim3(static_cast<unsigned>(rows)), block, joint_q, p);
        });
  });
}

QkNormGradResult qk_norm_input_grad_cuda(const Tensor& grad_q, const Tensor& grad_k, const Tensor& joint_q,
                                         const Tensor& joint_k, const Tensor& q_rstd, const Tensor& k_rstd,
                                         const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                                         const OptionalTensor& context_q_weight, const OptionalTensor& context_k_weight,
                                         const OptionalTensor& cos, const OptionalTensor& sin, int64_t context_q_tokens,
                                         int64_t context_k_tokens, bool context_first) {
  const QkNormGradResult out = empty_qk_norm_grad(joint_q, joint_k, context_q_tokens, context_k_tokens);
  const auto& [grad_input_q, grad_input_k, grad_context_q, grad_context_k] = out;
  qk_norm_input_grad_cuda_out(grad_q, grad_k, joint_q, joint_k, q_rstd, k_rstd, q_weight, k_weight, context_q_weight,
                              context_k_weight, cos, sin, context_q_tokens, context_k_tokens, context_first,
                              grad_input_q, grad_input_k, grad_context_q, grad_context_k);
  return out;
}

}  // namespace
}  // namespace stitchvm

STITCHVM_DEVICE_IMPL(m) {
  m.impl("qk_norm", TORCH_BOX(&stitchvm::qk_norm_cuda));
  m.impl("qk_norm.out", TORCH_BOX(&stitchvm::qk_norm_cuda_out));
  m.impl("qk_norm_input_grad", TORCH_BOX(&stitchvm::qk_norm_input_grad_cuda));
  m.impl("qk_norm_input_grad.out", TORCH_BOX(&stitchvm::qk_norm_input_grad_cuda_out));
}
