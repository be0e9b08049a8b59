// adaln on the CPU: one pass over a row per reduction, the row staying in cache between them.
#include "../args/adaln.h"

#include <cmath>

#include "lane_sum.h"
#include "launch.h"

namespace stitchvm {
namespace {

template <class A>
struct RowStats {
  A mean;
  A rstd;
};

template <class T>
STITCHVM_INLINE RowStats<Accumulate<T>> row_stats(const T* x, int64_t channels, double eps) {
  using A = Accumulate<T>;
  const A mean = lane_sum<A>(channels, [=](int64_t c) STITCHVM_LAMBDA { return widen(x[c]); }) / A(channels);
  // Squares of deviations, not E[x^2] - mean^2: activations of diffusion transformers have large outlier channels.
  const A square = lane_sum<A>(channels, [=](int64_t c) STITCHVM_LAMBDA {
    const A d = widen(x[c]) - mean;
    return d * d;
  });
  return {mean, A(1) / std::sqrt(square / A(channels) + A(eps))};
}

template <class T>
struct AdalnKernel {
  static STITCHVM_INLINE void run(const AdalnParams<T>& p, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t sample = row / p.rows_per_sample;
      const T* x = p.x + row * p.channels;
      const T* scale = p.scale + sample * p.scale_stride;
      const T* shift = p.shift + sample * p.shift_stride;
      T* y = p.y + row * p.channels;
      const auto s = row_stats(x, p.channels, p.eps);
#pragma omp simd
      for (int64_t c = 0; c < p.channels; ++c) {
        y[c] = narrow<T>(adaln_value(widen(x[c]), s.mean, s.rstd, widen(scale[c]), widen(shift[c])));
      }
    }
  }
};

template <class T>
struct AdalnGradKernel {
  static STITCHVM_INLINE void run(const AdalnGradParams<T>& p, int64_t begin, int64_t end) {
    using A = Accumulate<T>;
    for (int64_t row = begin; row < end; ++row) {
      const T* x = p.x + row * p.channels;
      const T* grad = p.grad + row * p.channels;
      const T* scale = p.scale + row / p.rows_per_sample * p.scale_stride;
      T* grad_x = p.grad_x + row * p.channels;
      const auto s = row_stats(x, p.channels, p.eps);
      const A mean_g =
          lane_sum<A>(p.channels,
                      [=](int64_t c) STITCHVM_LAMBDA { return widen(grad[c]) * (A(1) + widen(scale[c])); }) /
          A(p.channels);
      const A mean_gn =
          lane_sum<A>(p.channels,
                      [=](int64_t c) STITCHVM_LAMBDA {
                        return widen(grad[c]) * (A(1) + widen(scale[c])) * ((widen(x[c]) - s.mean) * s.rstd);
                      }) /
          A(p.channels);
#pragma omp simd
      for (int64_t c = 0; c < p.channels; ++c) {
        const A g = widen(grad[c]) * (A(1) + widen(scale[c]));
        const A n = (widen(x[c]) - s.mean) * s.rstd;
        grad_x[c] = narrow<T>(adaln_grad_value(g, n, s.rstd, mean_g, mean_gn));
      }
    }
  }
};

void adaln_cpu_out(const Tensor& x_in, const Tensor& scale_in, const Tensor& shift_in, double eps, const Tensor& y) {
  check_adaln("adaln", x_in, scale_in, "scale");
  check_adaln("adaln", x_in, shift_in, "shift");
  check_out("adaln", x_in, y);
  const Tensor x = torch::stable::contiguous(x_in);
  const Tensor scale = with_contiguous_rows(scale_in);
  const Tensor shift = with_contiguous_rows(shift_in);
  dispatch_cpu_dtype("adaln", x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const auto p = adaln_params<T>(x, scale, shift, y, eps);
    parallel_rows<AdalnKernel<T>>(p, p.rows, p.channels);
  });
}

Tensor adaln_cpu(const Tensor& x, const Tensor& scale, const Tensor& shift, double eps) {
  const Tensor y = empty_contiguous(x);
  adaln_cpu_out(x, scale, shift, eps, y);
  return y;
}

void adaln_input_grad_cpu_out(const Tensor& grad_in, const Tensor& x_in, const Tensor& scale_in, double eps,
                              const Tensor& grad_x) {
  check_adaln("adaln_input_grad", x_in, scale_in, "scale");
  check_same_shape("adaln_input_grad", x_in, grad_in, "grad");
  check_out("adaln_input_grad", x_in, grad_x);
  const Tensor grad = torch::stable::contiguous(grad_in);
  const Tensor x = torch::stable::contiguous(x_in);
  const Tensor scale = with_contiguous_rows(scale_in);
  dispatch_cpu_dtype("adaln_input_grad", x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const auto p = adaln_grad_params<T>(grad, x, scale, grad_x, eps);
    parallel_rows<AdalnGradKernel<T>>(p, p.rows, p.channels);
  });
}

Tensor adaln_input_grad_cpu(const Tensor& grad, const Tensor& x, const Tensor& scale, double eps) {
  const Tensor grad_x = empty_contiguous(x);
  adaln_input_grad_cpu_out(grad, x, scale, eps, grad_x);
  return grad_x;
}

}  // namespace
}  // namespace stitchvm

STABLE_TORCH_LIBRARY_IMPL(stitchvm, CPU, m) {
  m.impl("adaln", TORCH_BOX(&stitchvm::adaln_cpu));
  m.impl("adaln.out", TORCH_BOX(&stitchvm::adaln_cpu_out));
  m.impl("adaln_input_grad", TORCH_BOX(&stitchvm::adaln_input_grad_cpu));
  m.impl("adaln_input_grad.out", TORCH_BOX(&stitchvm::adaln_input_grad_cpu_out));
}
