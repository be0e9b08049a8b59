// guidance_step on CUDA: launch and registration of the kernels in guidance_step.cuh.
#include "../args/guidance_step.h"
#include "guidance_step.cuh"
#include "launch.cuh"

namespace stitchvm {
namespace {

void guidance_step_cuda_out(const Tensor& latents_in, const Tensor& cond_in, const std::optional<Tensor>& uncond_in,
                            const std::optional<Tensor>& grad_in, const std::optional<Tensor>& noise_in,
                            double guidance_scale, double strength, bool relative, double latents_coef,
                            double velocity_coef, double noise_coef, const Tensor& out, const Tensor& norms) {
  check_guidance(latents_in, cond_in, uncond_in, grad_in, noise_in, out, norms);
  STD_TORCH_CHECK(latents_in.scalar_type() == torch::headeronly::ScalarType::Float,
                  "guidance_step: the CUDA kernel takes float32 latents");
  if (norms.numel() == 0) return;
  const DeviceGuard guard(latents_in.get_device_index());
  if (out.numel() == 0) {
    torch::stable::fill_(norms, 0.0);
    return;
  }
  const Tensor latents = torch::stable::contiguous(latents_in);
  const Tensor cond = torch::stable::contiguous(cond_in);
  const auto uncond = contiguous_or_none(uncond_in);
  const auto grad = contiguous_or_none(grad_in);
  const auto noise = contiguous_or_none(noise_in);
  const int64_t size = out.numel() / out.size(0);
  const int64_t part_size =
      std::max(kGuidanceMinPart, ((size + kGuidanceMaxParts - 1) / kGuidanceMaxParts + 3) / 4 * 4);
  const int64_t parts = (size + part_size - 1) / part_size;
  const int64_t sample_blocks = (size + kGuidanceBlockSize - 1) / kGuidanceBlockSize;
  check_grid("guidance_step", latents.size(0) * std::max(sample_blocks, parts));
  const int64_t shape[] = {latents.size(0), parts, 2};
  const Tensor sums = torch::stable::new_empty(latents, {shape, 3}, torch::headeronly::ScalarType::Double);
  dispatch_cuda_dtype("guidance_step", cond.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const GuidanceStepParams<T> p{
        guidance_params<float, T>(latents, cond, uncond, grad, noise, guidance_scale, strength, relative, latents_coef,
                                  velocity_coef, noise_coef, out, norms),
        mutable_data<double>(sums), parts, part_size, sample_blocks};
    const auto grid = [&](int64_t blocks) { return dim3(static_cast<unsigned>(p.step.batch * blocks)); };
    // Four elements: 16 bytes of float32, 8 of the model's 16-bit types.
    const auto pointers = {static_cast<const void*>(p.step.latents), static_cast<const void*>(p.step.cond),
                           static_cast<const void*>(p.step.uncond),  static_cast<const void*>(p.step.grad),
                           static_cast<const void*>(p.step.noise),   static_cast<const void*>(p.step.out)};
    dispatch_vector_width<float>(pointers, {p.step.size}, [&](auto vec) {
      constexpr int kVec = decltype(vec)::value;
      launch(guidance_norms<T, kVec>, grid(parts), dim3(kGuidanceThreads), latents, p);
      launch(guidance_apply<T, kVec>, grid(sample_blocks), dim3(kGuidanceThreads), latents, p);
    });
  });
}

std::tuple<Tensor, Tensor> guidance_step_cuda(const Tensor& latents, const Tensor& cond,
                                              const std::optional<Tensor>& uncond, const std::optional<Tensor>& grad,
                                              const std::optional<Tensor>& noise, double guidance_scale,
                                              double strength, bool relative, double latents_coef, double velocity_coef,
                                              double noise_coef) {
  const Tensor out = empty_contiguous(latents);
  const Tensor norms = empty_norms(latents);
  guidance_step_cuda_out(latents, cond, uncond, grad, noise, guidance_scale, strength, relative, latents_coef,
                         velocity_coef, noise_coef, out, norms);
  return {out, norms};
}

}  // namespace
}  // namespace stitchvm

STITCHVM_DEVICE_IMPL(m) {
  m.impl("guidance_step", TORCH_BOX(&stitchvm::guidance_step_cuda));
  m.impl("guidance_step.out", TORCH_BOX(&stitchvm::guidance_step_cuda_out));
}
