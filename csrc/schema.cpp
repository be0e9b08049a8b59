// The signature of every op. Kernels are registered beside their launch code; fake and autograd kernels in Python.
// Absent optional results are empty tensors. The `.out` overloads write into contiguous tensors of the right shape and
// have no gradient.
#include <torch/csrc/stable/library.h>

#ifndef STITCHVM_NAMESPACE
#define STITCHVM_NAMESPACE stitchvm  // the emulator's test library defines the same ops as stitchvm_emulated
#endif

#define STITCHVM_DEFINE_OPS(ns, m) STABLE_TORCH_LIBRARY(ns, m)

STITCHVM_DEFINE_OPS(STITCHVM_NAMESPACE, m) {
  // residual = x + gate * branch + gate2 * branch2; y = LayerNorm(residual) * (1 + scale) + shift, and y2 likewise.
  m.def(
      "residual_norm(Tensor x, Tensor? branch, Tensor? gate, Tensor? branch2, Tensor? gate2, Tensor? scale, "
      "Tensor? shift, Tensor? scale2, Tensor? shift2, Tensor? rows, bool affine, float eps) -> (Tensor, Tensor, "
      "Tensor)");
  m.def(
      "residual_norm.out(Tensor x, Tensor? branch, Tensor? gate, Tensor? branch2, Tensor? gate2, Tensor? scale, "
      "Tensor? shift, Tensor? scale2, Tensor? shift2, Tensor? rows, bool affine, float eps, *, Tensor(a!)? residual, "
      "Tensor(b!)? y, Tensor(c!)? y2) -> ()");
  m.def(
      "residual_norm_input_grad(Tensor? grad_residual, Tensor? grad_y, Tensor? grad_y2, Tensor? residual, "
      "Tensor? gate, Tensor? gate2, Tensor? scale, Tensor? scale2, Tensor? rows, bool affine, float eps) -> (Tensor, "
      "Tensor, Tensor)");
  m.def(
      "residual_norm_input_grad.out(Tensor? grad_residual, Tensor? grad_y, Tensor? grad_y2, Tensor? residual, "
      "Tensor? gate, Tensor? gate2, Tensor? scale, Tensor? scale2, Tensor? rows, bool affine, float eps, *, "
      "Tensor(a!)? grad_x, Tensor(b!)? grad_branch, Tensor(c!)? grad_branch2) -> ()");

  // Per-head RMSNorm of q and k and optional rotary embedding, written into the joint image + text layout.
  m.def(
      "qk_norm(Tensor q, Tensor k, Tensor? v, Tensor? context_q, Tensor? context_k, Tensor? context_v, "
      "Tensor? q_weight, Tensor? k_weight, Tensor? context_q_weight, Tensor? context_k_weight, Tensor? cos, "
      "Tensor? sin, int heads, bool context_first, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "qk_norm.out(Tensor q, Tensor k, Tensor? v, Tensor? context_q, Tensor? context_k, Tensor? context_v, "
      "Tensor? q_weight, Tensor? k_weight, Tensor? context_q_weight, Tensor? context_k_weight, Tensor? cos, "
      "Tensor? sin, int heads, bool context_first, float eps, *, Tensor(a!) joint_q, Tensor(b!) joint_k, "
      "Tensor(c!)? joint_v, Tensor(d!) q_rstd, Tensor(e!) k_rstd) -> ()");
  m.def(
      "qk_norm_input_grad(Tensor grad_q, Tensor grad_k, Tensor joint_q, Tensor joint_k, Tensor q_rstd, "
      "Tensor k_rstd, Tensor? q_weight, Tensor? k_weight, Tensor? context_q_weight, Tensor? context_k_weight, "
      "Tensor? cos, Tensor? sin, int context_q_tokens, int context_k_tokens, bool context_first) -> (Tensor, Tensor, "
      "Tensor, Tensor)");
  m.def(
      "qk_norm_input_grad.out(Tensor grad_q, Tensor grad_k, Tensor joint_q, Tensor joint_k, Tensor q_rstd, "
      "Tensor k_rstd, Tensor? q_weight, Tensor? k_weight, Tensor? context_q_weight, Tensor? context_k_weight, "
      "Tensor? cos, Tensor? sin, int context_q_tokens, int context_k_tokens, bool context_first, *, Tensor(a!) "
      "grad_input_q, Tensor(b!) grad_input_k, Tensor(c!)? grad_context_q, Tensor(d!)? grad_context_k) -> ()");

  // kind: 0 gelu, 1 gelu_tanh, 2 quick_gelu, 3 silu; of x + bias.
  m.def("activation(Tensor x, Tensor? bias, int kind) -> Tensor");
  m.def("activation.out(Tensor x, Tensor? bias, int kind, *, Tensor(a!) out) -> ()");
  m.def("activation_input_grad(Tensor grad, Tensor x, Tensor? bias, int kind) -> Tensor");
  m.def("activation_input_grad.out(Tensor grad, Tensor x, Tensor? bias, int kind, *, Tensor(a!) out) -> ()");

  // [prefix; resample(x) + bias + residual] + position.
  m.def(
      "resample_tokens(Tensor x, Tensor? bias, Tensor? position, Tensor? prefix, Tensor? residual, int h, int w, "
      "int out_h, int out_w) -> Tensor");
  m.def(
      "resample_tokens.out(Tensor x, Tensor? bias, Tensor? position, Tensor? prefix, Tensor? residual, int h, int w, "
      "int out_h, int out_w, *, Tensor(a!) out) -> ()");
  m.def("resample_tokens_input_grad(Tensor grad, int prefix_tokens, int h, int w, int out_h, int out_w) -> Tensor");
  m.def(
      "resample_tokens_input_grad.out(Tensor grad, int prefix_tokens, int h, int w, int out_h, int out_w, *, "
      "Tensor(a!) out) -> ()");

  // One sampling step; returns the next latents and, per sample, the norms of the velocity and of the gradient.
  m.def(
      "guidance_step(Tensor latents, Tensor cond, Tensor? uncond, Tensor? grad, Tensor? noise, float guidance_scale, "
      "float strength, bool relative, float latents_coef, float velocity_coef, float noise_coef) -> (Tensor, Tensor)");
  m.def(
      "guidance_step.out(Tensor latents, Tensor cond, Tensor? uncond, Tensor? grad, Tensor? noise, "
      "float guidance_scale, float strength, bool relative, float latents_coef, float velocity_coef, "
      "float noise_coef, *, Tensor(a!) out, Tensor(b!) norms) -> ()");
}
