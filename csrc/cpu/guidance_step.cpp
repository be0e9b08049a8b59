// guidance_step on the CPU: per sample one pass for the norms, then one for the step.
#include "../args/guidance_step.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "lane_sum.h"
#include "launch.h"

namespace stitchvm {
namespace {

// Elements of a sample that make one partial sum. Whatever the batch and the number of threads, a sample is cut alike.
constexpr int64_t kChunk = 4096;

// The pointers of `p` are those of one sample. `sums` holds the squared norms of u and grad for each chunk.
template <class T, class M>
struct SampleParams {
  GuidanceParams<T, M> p;
  double* sums;
  GuidanceFactor<T> factor;
};

// Calls f(velocity) with a function of the element's index that yields u.
template <class T, class M, class F>
STITCHVM_INLINE void with_velocity(const GuidanceParams<T, M>& p, F f) {
  const M* cond = p.cond;
  const M* uncond = p.uncond;
  const T scale = T(p.guidance_scale);
  if (uncond == nullptr) {
    f([=](int64_t i) STITCHVM_LAMBDA { return T(widen(cond[i])); });
  } else {
    f([=](int64_t i) STITCHVM_LAMBDA { return guided_velocity(T(widen(cond[i])), T(widen(uncond[i])), scale); });
  }
}

// Sum of value(i)^2 over i in [0, count), count at most kChunk. In T where that is safe, else in double: squares of
// 1e-25 or 1e25 do not fit float32.
template <class T, class F>
STITCHVM_INLINE double sum_of_squares(int64_t count, F value) {
  const T sum = lane_sum<T>(count, [=](int64_t i) STITCHVM_LAMBDA {
    const T v = value(i);
    return v * v;
  });
  if (sum > T(1e-25) && sum < T(1e35)) return static_cast<double>(sum);
  return lane_sum<double>(count, [=](int64_t i) STITCHVM_LAMBDA {
    const double v = static_cast<double>(value(i));
    return v * v;
  });
}

template <class T, class M>
struct GuidanceNormsKernel {
  static STITCHVM_INLINE void run(const SampleParams<T, M>& s, int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kChunk;
      const int64_t count = std::min(kChunk, s.p.size - first);
      double* sums = s.sums + 2 * chunk;
      with_velocity(s.p, [=](auto velocity) STITCHVM_LAMBDA {
        sums[0] = sum_of_squares<T>(count, [=](int64_t i) STITCHVM_LAMBDA { return velocity(first + i); });
      });
      const T* grad = s.p.grad;
      if (grad == nullptr) continue;
      sums[1] = sum_of_squares<T>(count, [=](int64_t i) STITCHVM_LAMBDA { return grad[first + i]; });
    }
  }
};

template <class T, class M>
struct GuidanceApplyKernel {
  static STITCHVM_INLINE void run(const SampleParams<T, M>& s, int64_t begin, int64_t end) {
    const GuidanceParams<T, M>& p = s.p;
    const int64_t first = begin * kChunk;
    const int64_t last = std::min(end * kChunk, p.size);
    const T latents_coef = T(p.latents_coef), velocity_coef = T(p.velocity_coef), noise_coef = T(p.noise_coef);
    const T unit = s.factor.unit, amount = s.factor.amount;
    const T* latents = p.latents;
    const T* grad = p.grad;
    const T* noise = p.noise;
    T* out = p.out;
    with_velocity(p, [=](auto velocity) STITCHVM_LAMBDA {
      if (grad != nullptr && noise != nullptr) {
#pragma omp simd
        for (int64_t i = first; i < last; ++i) {
          out[i] = latents_coef * latents[i] + velocity_coef * (velocity(i) - amount * (unit * grad[i])) +
                   noise_coef * noise[i];
        }
      } else if (grad != nullptr) {
#pragma omp simd
        for (int64_t i = first; i < last; ++i) {
          out[i] = latents_coef * latents[i] + velocity_coef * (velocity(i) - amount * (unit * grad[i]));
        }
      } else if (noise != nullptr) {
#pragma omp simd
        for (int64_t i = first; i < last; ++i) {
          out[i] = latents_coef * latents[i] + velocity_coef * velocity(i) + noise_coef * noise[i];
        }
      } else {
#pragma omp simd
        for (int64_t i = first; i < last; ++i) out[i] = latents_coef * latents[i] + velocity_coef * velocity(i);
      }
    });
  }
};

template <class T, class M>
void guidance_step_samples(const GuidanceParams<T, M>& p) {
  const int64_t chunks = (p.size + kChunk - 1) / kChunk;
  std::vector<double> sums(2 * chunks);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t at = b * p.size;
    SampleParams<T, M> s{p, sums.data(), {}};
    s.p.latents += at;
    s.p.cond += at;
    if (p.uncond != nullptr) s.p.uncond += at;
    if (p.grad != nullptr) s.p.grad += at;
    if (p.noise != nullptr) s.p.noise += at;
    s.p.out += at;
    parallel_rows<GuidanceNormsKernel<T, M>>(s, chunks, kChunk);
    double norms[2] = {};
    for (int64_t c = 0; c < chunks; ++c) {
      norms[0] += sums[2 * c];
      norms[1] += sums[2 * c + 1];
    }
    for (int k = 0; k < 2; ++k) {
      norms[k] = std::sqrt(norms[k]);
      p.norms[2 * b + k] = static_cast<T>(norms[k]);
    }
    s.factor = guidance_factor<T>(norms[0], norms[1], p.strength, p.relative);
    parallel_rows<GuidanceApplyKernel<T, M>>(s, chunks, kChunk);
  }
}

void guidance_step_cpu_out(const Tensor& latents_in, const Tensor& cond_in, const std::optional<Tensor>& uncond_in,
                           const std::optional<Tensor>& grad_in, const std::optional<Tensor>& noise_in,
                           double guidance_scale, double strength, bool relative, double latents_coef,
                           double velocity_coef, double noise_coef, const Tensor& out, const Tensor& norms) {
  check_guidance(latents_in, cond_in, uncond_in, grad_in, noise_in, out, norms);
  const Tensor latents = torch::stable::contiguous(latents_in);
  const Tensor cond = torch::stable::contiguous(cond_in);
  const auto uncond = contiguous_or_none(uncond_in);
  const auto grad = contiguous_or_none(grad_in);
  const auto noise = contiguous_or_none(noise_in);
  const auto run = [&](auto latents_tag, auto model_tag) {
    guidance_step_samples(guidance_params<decltype(latents_tag), decltype(model_tag)>(
        latents, cond, uncond, grad, noise, guidance_scale, strength, relative, latents_coef, velocity_coef, noise_coef,
        out, norms));
  };
  using torch::headeronly::ScalarType;
  const ScalarType dtype = latents.scalar_type(), model_dtype = cond.scalar_type();
  if (dtype == ScalarType::Float && model_dtype == ScalarType::Float) return run(float{}, float{});
  if (dtype == ScalarType::Float && model_dtype == ScalarType::BFloat16) return run(float{}, BFloat16{});
  if (dtype == ScalarType::Double && model_dtype == ScalarType::Double) return run(double{}, double{});
  STD_TORCH_CHECK(false,
                  "guidance_step: the CPU kernel takes float32 latents with a float32 or bfloat16 model, or float64 "
                  "throughout");
}

std::tuple<Tensor, Tensor> guidance_step_cpu(const Tensor& latents, const Tensor& cond,
                                             const std::optional<Tensor>& uncond, const std::optional<Tensor>& grad,
                                             const std::optional<Tensor>& noise, double guidance_scale, double strength,
                                             bool relative, double latents_coef, double velocity_coef,
                                             double noise_coef) {
  const Tensor out = empty_contiguous(latents);
  const Tensor norms = empty_norms(latents);
  guidance_step_cpu_out(latents, cond, uncond, grad, noise, guidance_scale, strength, relative, latents_coef,
                        velocity_coef, noise_coef, out, norms);
  return {out, norms};
}

}  // namespace
}  // namespace stitchvm

STABLE_TORCH_LIBRARY_IMPL(stitchvm, CPU, m) {
  m.impl("guidance_step", TORCH_BOX(&stitchvm::guidance_step_cpu));
  m.impl("guidance_step.out", TORCH_BOX(&stitchvm::guidance_step_cpu_out));
}
