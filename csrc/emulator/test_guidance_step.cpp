// guidance_step, the partial sums and the step, against plain loops in double.
#include "driver.h"
// after driver.h, which gives the kernels the CUDA language
#include "../cuda/guidance_step.cuh"

using namespace stitchvm;
using namespace stitchvm::emulator;

namespace {

struct Given {
  bool uncond;
  bool grad;
  bool noise;
};

template <class T, int kVec>
void test(int64_t batch, int64_t size, Given given, bool relative, int offset) {
  const int64_t n = batch * size;
  const Buffer<float> latents(n, offset), grad(n, offset), noise(n, offset);
  const Buffer<T> cond(n, offset), uncond(n, offset);
  const double scale = 3.5, strength = 0.75, latents_coef = 0.9, velocity_coef = -0.4, noise_coef = 0.3;
  const int64_t part_size = kGuidanceMinPart, parts = (size + part_size - 1) / part_size;
  const int64_t sample_blocks = (size + kGuidanceBlockSize - 1) / kGuidanceBlockSize;
  Buffer<float> out(n, offset), norms(2 * batch);
  Buffer<double> sums(2 * batch * parts);

  const auto velocity = [&](int64_t i) { return given.uncond ? uncond[i] + scale * (cond[i] - uncond[i]) : cond[i]; };
  std::vector<double> exact_sums(sums.size()), squares(norms.size());
  for (int64_t i = 0; i < n; ++i) {
    const int64_t b = i / size, part = b * parts + i % size / part_size;
    const double square[] = {velocity(i) * velocity(i), given.grad ? grad[i] * grad[i] : 0.0};
    for (const int k : {0, 1}) exact_sums[2 * part + k] += square[k];
    for (const int k : {0, 1}) squares[2 * b + k] += square[k];
  }

  const GuidanceParams<float, T> step = {latents.data(),
                                         cond.data(),
                                         given.uncond ? uncond.data() : nullptr,
                                         given.grad ? grad.data() : nullptr,
                                         given.noise ? noise.data() : nullptr,
                                         out.data(),
                                         norms.data(),
                                         batch,
                                         size,
                                         scale,
                                         strength,
                                         relative,
                                         latents_coef,
                                         velocity_coef,
                                         noise_coef};
  const GuidanceStepParams<T> p = {step, sums.data(), parts, part_size, sample_blocks};
  const auto grid = [&](int64_t blocks) { return dim3(static_cast<unsigned>(batch * blocks)); };
  launch_checked(guidance_norms<T, kVec>, grid(parts), dim3(kGuidanceThreads), p, sums);
  expect("guidance_norms", sums, [&](int64_t i) { return exact_sums[i]; });

  launch_checked(guidance_apply<T, kVec>, grid(sample_blocks), dim3(kGuidanceThreads), p, out, norms);
  expect("guidance_apply, norms", norms, [&](int64_t i) { return std::sqrt(squares[i]); });
  expect("guidance_apply", out, [&](int64_t i) {
    const int64_t b = i / size;
    double u = velocity(i);
    if (given.grad) u -= strength * (relative ? std::sqrt(squares[2 * b] / squares[2 * b + 1]) : 1.0) * grad[i];
    return latents_coef * latents[i] + velocity_coef * u + (given.noise ? noise_coef * noise[i] : 0.0);
  });
}

}  // namespace

int main() {
  return report([] {
    for_each_type([](auto type, auto vec) {
      using T = decltype(type);
      constexpr int kVec = std::min(decltype(vec)::value, 4);  // of the latents, which are float
      for (const bool relative : {false, true}) {
        test<T, kVec>(2, 4356, {true, true, true}, relative, 0);
        test<T, kVec>(2, 36, {true, true, false}, relative, 0);
        test<T, kVec>(1, 1028, {false, true, true}, relative, 0);
        test<T, kVec>(3, 4, {false, false, false}, relative, 0);
        if constexpr (kVec == 1) test<T, kVec>(3, 1027, {true, true, true}, relative, 1);
      }
    });
  });
}
