// resample_tokens on the CPU: one token of the result at a time, vectorised over channels.
#include "../args/resample_tokens.h"

#include "launch.h"

namespace stitchvm {
namespace {

template <class T>
struct ResampleKernel {
  static STITCHVM_INLINE void run(const ResampleParams<T>& p, int64_t begin, int64_t end) {
    using A = Accumulate<T>;
    const int64_t tokens = static_cast<int64_t>(p.out_h) * p.out_w;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t token = row % tokens;
      const Tap<A> ty = bilinear_tap<A>(static_cast<int>(token / p.out_w), p.in_h, p.out_h);
      const Tap<A> tx = bilinear_tap<A>(static_cast<int>(token % p.out_w), p.in_w, p.out_w);
      const T* src = p.src + row / tokens * p.in_h * p.in_w * p.channels;
      const T* x00 = src + (static_cast<int64_t>(ty.first) * p.in_w + tx.first) * p.channels;
      const T* x01 = src + (static_cast<int64_t>(ty.first) * p.in_w + tx.second) * p.channels;
      const T* x10 = src + (static_cast<int64_t>(ty.second) * p.in_w + tx.first) * p.channels;
      const T* x11 = src + (static_cast<int64_t>(ty.second) * p.in_w + tx.second) * p.channels;
      const A w00 = (A(1) - ty.weight) * (A(1) - tx.weight);
      const A w01 = (A(1) - ty.weight) * tx.weight;
      const A w10 = ty.weight * (A(1) - tx.weight);
      const A w11 = ty.weight * tx.weight;
      T* dst = p.dst + row * p.channels;
#pragma omp simd
      for (int64_t c = 0; c < p.channels; ++c) {
        dst[c] = narrow<T>(w00 * widen(x00[c]) + w01 * widen(x01[c]) + w10 * widen(x10[c]) + w11 * widen(x11[c]));
      }
    }
  }
};

// The adjoint as a gather: every input token sums the output tokens that read it, in a fixed order.
template <class T>
struct ResampleGradKernel {
  static STITCHVM_INLINE void run(const ResampleParams<T>& p, int64_t begin, int64_t end) {
    using A = Accumulate<T>;
    constexpr int64_t kBlock = 256;
    A sum[kBlock];
    const int64_t tokens = static_cast<int64_t>(p.in_h) * p.in_w;
    for (int64_t row = begin; row < end; ++row) {
      const int iy = static_cast<int>(row % tokens / p.in_w);
      const int ix = static_cast<int>(row % tokens % p.in_w);
      const int y_begin = reader_begin(iy, p.in_h, p.out_h), y_end = reader_end(iy, p.in_h, p.out_h);
      const int x_begin = reader_begin(ix, p.in_w, p.out_w), x_end = reader_end(ix, p.in_w, p.out_w);
      const T* src = p.src + row / tokens * p.out_h * p.out_w * p.channels;
      T* dst = p.dst + row * p.channels;
      for (int64_t c0 = 0; c0 < p.channels; c0 += kBlock) {
        const int64_t width = p.channels - c0 < kBlock ? p.channels - c0 : kBlock;
        for (int64_t c = 0; c < width; ++c) sum[c] = 0;
        for (int oy = y_begin; oy < y_end; ++oy) {
          const A wy = reader_weight<A>(oy, iy, p.in_h, p.out_h);
          for (int ox = x_begin; ox < x_end; ++ox) {
            const A w = wy * reader_weight<A>(ox, ix, p.in_w, p.out_w);
            const T* g = src + (static_cast<int64_t>(oy) * p.out_w + ox) * p.channels + c0;
#pragma omp simd
            for (int64_t c = 0; c < width; ++c) sum[c] += w * widen(g[c]);
          }
        }
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) dst[c0 + c] = narrow<T>(sum[c]);
      }
    }
  }
};

void resample_tokens_cpu_out(const Tensor& x_in, int64_t h, int64_t w, int64_t out_h, int64_t out_w, const Tensor& y) {
  check_resample("resample_tokens", x_in, h, w, y, out_h, out_w);
  const Tensor x = torch::stable::contiguous(x_in);
  dispatch_cpu_dtype("resample_tokens", x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const auto p = resample_params<T>(x, y, h, w, out_h, out_w);
    parallel_rows<ResampleKernel<T>>(p, p.batch * out_h * out_w, p.channels);
  });
}

Tensor resample_tokens_cpu(const Tensor& x, int64_t h, int64_t w, int64_t out_h, int64_t out_w) {
  const Tensor y = empty_tokens("resample_tokens", x, out_h, out_w);
  resample_tokens_cpu_out(x, h, w, out_h, out_w, y);
  return y;
}

void resample_tokens_input_grad_cpu_out(const Tensor& grad_in, int64_t h, int64_t w, int64_t out_h, int64_t out_w,
                                        const Tensor& grad_x) {
  check_resample("resample_tokens_input_grad", grad_in, out_h, out_w, grad_x, h, w);
  const Tensor grad = torch::stable::contiguous(grad_in);
  dispatch_cpu_dtype("resample_tokens_input_grad", grad.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const auto p = resample_params<T>(grad, grad_x, h, w, out_h, out_w);
    parallel_rows<ResampleGradKernel<T>>(p, p.batch * h * w, p.channels);
  });
}

Tensor resample_tokens_input_grad_cpu(const Tensor& grad, int64_t h, int64_t w, int64_t out_h, int64_t out_w) {
  const Tensor grad_x = empty_tokens("resample_tokens_input_grad", grad, h, w);
  resample_tokens_input_grad_cpu_out(grad, h, w, out_h, out_w, grad_x);
  return grad_x;
}

}  // namespace
}  // namespace stitchvm

STABLE_TORCH_LIBRARY_IMPL(stitchvm, CPU, m) {
  m.impl("resample_tokens", TORCH_BOX(&stitchvm::resample_tokens_cpu));
  m.impl("resample_tokens.out", TORCH_BOX(&stitchvm::resample_tokens_cpu_out));
  m.impl("resample_tokens_input_grad", TORCH_BOX(&stitchvm::resample_tokens_input_grad_cpu));
  m.impl("resample_tokens_input_grad.out", TORCH_BOX(&stitchvm::resample_tokens_input_grad_cpu_out));
}
