// qk_norm on the CPU: a token's heads at a time. Their sums of squares are reduced together, so that the reduction is
// vectorised over heads and not a tree for each of them.
#include "../args/qk_norm.h"

#include <cmath>
#include <vector>

#include "launch.h"
#include "map.h"

namespace stitchvm {
namespace {

constexpr int kLanes = 16;      // partial sums of a head
constexpr int64_t kHeads = 32;  // heads that are reduced together
constexpr int64_t kAhead = 2;   // tokens by which gradients are prefetched

// What the kernels read instead of the weights: widened once per call, ones where there is no weight. Split by the
// parity of the channel (even ones first) where the kernel works in pairs.
template <class A>
struct QkWeights {
  const A* weight;
  const A* inverse;
  bool norm;
};

template <class T>
struct CpuQkNormParams {
  QkNormParams<T, Accumulate<T>> p;
  QkWeights<Accumulate<T>> weights[4];  // q, context_q, k, context_k
};

template <class T>
struct CpuQkNormGradParams {
  QkNormGradParams<T, Accumulate<T>> p;
  QkWeights<Accumulate<T>> weights[4];
};

// Partial sums of term(in[c]...) over the channels c of a head. kDim is the head's size, or 0 if it is `dim`.
template <class T, int kDim, class F, class... In>
STITCHVM_INLINE void head_lanes(int64_t dim, Accumulate<T>* lanes, F term, const In*... in) {
  using A = Accumulate<T>;
  if constexpr (kDim > 0 && std::is_same_v<T, BFloat16>) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      A sum = 0;
      for (int c = 0; c < kDim; c += 2 * kLanes) {
        sum += term(load_pair(in + c + 2 * l).first...);
        sum += term(load_pair(in + c + 2 * l).second...);
      }
      lanes[l] = sum;
    }
  } else if constexpr (kDim > 0) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      A sum = 0;
      for (int c = 0; c < kDim; c += kLanes) sum += term(widen(in[c + l])...);
      lanes[l] = sum;
    }
  } else {
    for (int l = 0; l < kLanes; ++l) lanes[l] = 0;
    int64_t c = 0;
    for (; c + kLanes <= dim; c += kLanes) {
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) lanes[l] += term(widen(in[c + l])...);
    }
    for (int l = 0; c + l < dim; ++l) lanes[l] += term(widen(in[c + l])...);
  }
}

// out[h] = the sum of the kLanes values of head h, for h in [0, kHeads): neighbours are added until one is left.
template <class A>
STITCHVM_INLINE void fold_lanes(A* lanes, A* out) {
  A half[kHeads * kLanes / 2], quarter[kHeads * kLanes / 4], eighth[kHeads * kLanes / 8];
  static_assert(kLanes == 16);
#pragma omp simd
  for (int i = 0; i < kHeads * 8; ++i) half[i] = lanes[2 * i] + lanes[2 * i + 1];
#pragma omp simd
  for (int i = 0; i < kHeads * 4; ++i) quarter[i] = half[2 * i] + half[2 * i + 1];
#pragma omp simd
  for (int i = 0; i < kHeads * 2; ++i) eighth[i] = quarter[2 * i] + quarter[2 * i + 1];
#pragma omp simd
  for (int i = 0; i < kHeads; ++i) out[i] = eighth[2 * i] + eighth[2 * i + 1];
}

// Writes one normalised (and rotated) head.
template <class T, bool kRotary>
STITCHVM_INLINE void normalise_head(int64_t dim, T* out, const T* x, Accumulate<T> rstd, const Accumulate<T>* weight,
                                    const float* cos, const float* sin) {
  using A = Accumulate<T>;
  if constexpr (kRotary) {
    const int64_t pairs = dim / 2;
#pragma omp simd
    for (int64_t i = 0; i < pairs; ++i) {
      const Pair<A> v = load_pair(x + 2 * i);
      const Pair<A> n = {v.first * rstd * weight[i], v.second * rstd * weight[pairs + i]};
      const Pair<A> c = {cos[2 * i], cos[2 * i + 1]}, s = {sin[2 * i], sin[2 * i + 1]};
      store_any_pair(out + 2 * i, rotate(n, c, s));
    }
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const int64_t pairs = dim / 2;
    const float* odd = weight + (dim + 1) / 2;
#pragma omp simd
    for (int64_t i = 0; i < pairs; ++i) {
      const Pair<A> v = load_pair(x + 2 * i);
      store_pair(out + 2 * i, {v.first * rstd * weight[i], v.second * rstd * odd[i]});
    }
    if (dim % 2 == 1) out[dim - 1] = narrow<T>(widen(x[dim - 1]) * rstd * weight[pairs]);
  } else {
#pragma omp simd
    for (int64_t c = 0; c < dim; ++c) out[c] = x[c] * rstd * weight[c];
  }
}

template <class T, int kDim, bool kRotary>
STITCHVM_INLINE void normalise_token(const QkNormParams<T, Accumulate<T>>& p, const QkStream<T, Accumulate<T>>& stream,
                                     const QkWeights<Accumulate<T>>* weights, int64_t sample, int64_t s) {
  using A = Accumulate<T>;
  const int64_t dim = kDim > 0 ? kDim : p.dim;
  const QkToken token = qk_token(s, stream.tokens, stream.context_tokens, p.context_first);
  const QkRows<T>& rows = token.context ? stream.context : stream.image;
  const QkWeights<A> w = weights[token.context];
  const int64_t row = sample * (stream.tokens + stream.context_tokens) + s;
  const T* x = rows.data + sample * rows.batch_stride + token.index * rows.token_stride;
  T* out = stream.joint + row * p.heads * dim;
  A* rstd = stream.rstd + row * p.heads;
  if (!w.norm) {
    for (int64_t h = 0; h < p.heads; ++h) rstd[h] = 1;
    if constexpr (!kRotary) {
      copy_elements(p.heads * dim, out, x);
      return;
    }
  }
  A lanes[kHeads * kLanes], sums[kHeads];
  for (int64_t first = 0; first < p.heads; first += kHeads) {
    const int64_t count = p.heads - first < kHeads ? p.heads - first : kHeads;
    if (w.norm) {
      for (int64_t h = 0; h < count; ++h) {
        head_lanes<T, kDim>(dim, lanes + h * kLanes, [](A v) STITCHVM_LAMBDA { return v * v; }, x + (first + h) * dim);
      }
      for (int64_t i = count * kLanes; i < kHeads * kLanes; ++i) lanes[i] = 0;
      fold_lanes(lanes, sums);
#pragma omp simd
      for (int64_t h = 0; h < count; ++h) rstd[first + h] = A(1) / std::sqrt(sums[h] / A(dim) + A(p.eps));
    }
    for (int64_t h = first; h < first + count; ++h) {
      normalise_head<T, kRotary>(dim, out + h * dim, x + h * dim, rstd[h], w.weight,
                                 kRotary ? p.cos + s * dim : nullptr, kRotary ? p.sin + s * dim : nullptr);
    }
  }
}

template <class T, int kDim, bool kRotary>
struct QkNormKernel {
  static STITCHVM_INLINE void run(const CpuQkNormParams<T>& params, int64_t begin, int64_t end) {
    const auto& p = params.p;
    const int64_t dim = kDim > 0 ? kDim : p.dim;
    const int64_t q_tokens = p.q.tokens + p.q.context_tokens, k_tokens = p.k.tokens + p.k.context_tokens;
    const int64_t tokens = q_tokens > k_tokens ? q_tokens : k_tokens;
    // One stream after the other: fewer pages and cache ways are in use at a time.
    for (int64_t row = begin; row < end; ++row) {
      if (row % tokens < q_tokens) {
        normalise_token<T, kDim, kRotary>(p, p.q, params.weights, row / tokens, row % tokens);
      }
    }
    for (int64_t row = begin; row < end; ++row) {
      if (row % tokens < k_tokens) {
        normalise_token<T, kDim, kRotary>(p, p.k, params.weights + 2, row / tokens, row % tokens);
      }
    }
    if (p.v.joint == nullptr) return;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t sample = row / tokens, s = row % tokens;
      if (s >= k_tokens) continue;
      const QkToken token = qk_token(s, p.v.tokens, p.v.context_tokens, p.context_first);
      const QkRows<T>& rows = token.context ? p.v.context : p.v.image;
      const T* v = rows.data + sample * rows.batch_stride + token.index * rows.token_stride;
      copy_elements(p.heads * dim, p.v.joint + (sample * k_tokens + s) * p.heads * dim, v);
    }
  }
};

// Writes the gradient for one head.
template <class T, bool kRotary>
STITCHVM_INLINE void head_grad(int64_t dim, T* out, const T* grad, const T* y, Accumulate<T> rstd, Accumulate<T> mean,
                               const QkWeights<Accumulate<T>>& w, const float* cos, const float* sin) {
  using A = Accumulate<T>;
  const A* weight = w.weight;
  const A* inverse = w.inverse;
  if constexpr (kRotary) {
    const int64_t pairs = dim / 2;
#pragma omp simd
    for (int64_t i = 0; i < pairs; ++i) {
      const Pair<A> c = {cos[2 * i], cos[2 * i + 1]}, s = {sin[2 * i], sin[2 * i + 1]};
      const Pair<A> g = rotate_transposed(load_pair(grad + 2 * i), c, s);
      const Pair<A> z = rotate_inverse(load_pair(y + 2 * i), c, s);
      store_any_pair(out + 2 * i, Pair<A>{qk_norm_grad_value(g.first, z.first, weight[i], inverse[i], rstd, mean),
                                          qk_norm_grad_value(g.second, z.second, weight[pairs + i], inverse[pairs + i],
                                                             rstd, mean)});
    }
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const int64_t pairs = dim / 2;
    const float* odd = weight + (dim + 1) / 2;
    const float* inverse_odd = inverse + (dim + 1) / 2;
#pragma omp simd
    for (int64_t i = 0; i < pairs; ++i) {
      const Pair<A> g = load_pair(grad + 2 * i), z = load_pair(y + 2 * i);
      store_pair(out + 2 * i, {qk_norm_grad_value(g.first, z.first, weight[i], inverse[i], rstd, mean),
                               qk_norm_grad_value(g.second, z.second, odd[i], inverse_odd[i], rstd, mean)});
    }
    if (dim % 2 == 1) {
      out[dim - 1] = narrow<T>(
          qk_norm_grad_value(widen(grad[dim - 1]), widen(y[dim - 1]), weight[pairs], inverse[pairs], rstd, mean));
    }
  } else {
#pragma omp simd
    for (int64_t c = 0; c < dim; ++c) out[c] = qk_norm_grad_value(grad[c], y[c], weight[c], inverse[c], rstd, mean);
  }
}

template <class T, int kDim, bool kRotary>
STITCHVM_INLINE void token_grad(const QkNormGradParams<T, Accumulate<T>>& p,
                                const QkGradStream<T, Accumulate<T>>& stream, const QkWeights<Accumulate<T>>* weights,
                                int64_t sample, int64_t s) {
  using A = Accumulate<T>;
  const int64_t dim = kDim > 0 ? kDim : p.dim;
  const QkToken token = qk_token(s, stream.tokens, stream.context_tokens, p.context_first);
  const QkWeights<A> w = weights[token.context];
  const int64_t row = sample * (stream.tokens + stream.context_tokens) + s;
  const T* grad = stream.grad + sample * stream.grad_batch_stride + s * stream.grad_token_stride;
  const T* y = stream.joint + row * p.heads * dim;
  const A* rstd = stream.rstd + row * p.heads;
  T* out = token.context ? stream.grad_context + (sample * stream.context_tokens + token.index) * p.heads * dim
                         : stream.grad_image + (sample * stream.tokens + token.index) * p.heads * dim;
  if (!w.norm && !kRotary) {
    for (int64_t h = 0; h < p.heads; ++h) {
      copy_elements(dim, out + h * dim, grad + h * stream.grad_head_stride);
    }
    return;
  }
  // The gradient of attention is [B, H, S, D] in memory: as many streams as heads, more than the processor foresees.
  const bool scattered = stream.grad_head_stride != dim;
  A lanes[kHeads * kLanes], means[kHeads];
  for (int64_t first = 0; first < p.heads; first += kHeads) {
    const int64_t count = p.heads - first < kHeads ? p.heads - first : kHeads;
    if (w.norm) {
      for (int64_t h = 0; h < count; ++h) {
        const T* ahead = grad + (first + h) * stream.grad_head_stride + kAhead * stream.grad_token_stride;
        if (scattered) {
          for (int64_t c = 0; c < dim; c += 64 / sizeof(T)) __builtin_prefetch(ahead + c);
        }
        head_lanes<T, kDim>(
            dim, lanes + h * kLanes, [](A g, A y) STITCHVM_LAMBDA { return g * y; },
            grad + (first + h) * stream.grad_head_stride, y + (first + h) * dim);
      }
      for (int64_t i = count * kLanes; i < kHeads * kLanes; ++i) lanes[i] = 0;
      fold_lanes(lanes, means);
      for (int64_t h = 0; h < kHeads; ++h) means[h] /= A(dim);
    } else {
      for (int64_t h = 0; h < kHeads; ++h) means[h] = 0;
    }
    for (int64_t h = 0; h < count; ++h) {
      head_grad<T, kRotary>(dim, out + (first + h) * dim, grad + (first + h) * stream.grad_head_stride,
                            y + (first + h) * dim, w.norm ? rstd[first + h] : A(1), means[h], w, p.cos + s * dim,
                            p.sin + s * dim);
    }
  }
}

template <class T, int kDim, bool kRotary>
struct QkNormGradKernel {
  static STITCHVM_INLINE void run(const CpuQkNormGradParams<T>& params, int64_t begin, int64_t end) {
    const auto& p = params.p;
    const int64_t q_tokens = p.q.tokens + p.q.context_tokens, k_tokens = p.k.tokens + p.k.context_tokens;
    const int64_t tokens = q_tokens > k_tokens ? q_tokens : k_tokens;
    for (int64_t row = begin; row < end; ++row) {
      if (row % tokens < q_tokens) {
        token_grad<T, kDim, kRotary>(p, p.q, params.weights, row / tokens, row % tokens);
      }
    }
    for (int64_t row = begin; row < end; ++row) {
      if (row % tokens < k_tokens) {
        token_grad<T, kDim, kRotary>(p, p.k, params.weights + 2, row / tokens, row % tokens);
      }
    }
  }
};

// The four weights widened, and their inverses, in one buffer that outlives the call of the kernel.
template <class T>
class WidenedWeights {
 public:
  using A = Accumulate<T>;

  WidenedWeights(std::initializer_list<const T*> weights, int64_t dim, bool split) : dim_(dim) {
    values_.reserve(weights.size() * 2 * dim);
    for (const T* weight : weights) {
      norm_.push_back(weight != nullptr);
      for (int64_t i = 0; i < dim; ++i) {
        const int64_t even = (dim + 1) / 2;
        const int64_t c = !split ? i : (i < even ? 2 * i : 2 * (i - even) + 1);
        values_.push_back(weight == nullptr ? A(1) : widen(weight[c]));
      }
      for (int64_t i = 0; i < dim; ++i) values_.push_back(A(1) / values_[values_.size() - dim]);
    }
  }

  QkWeights<A> operator[](size_t i) const {
    const A* weight = values_.data() + 2 * i * dim_;
    return {weight, weight + dim_, norm_[i]};
  }

 private:
  int64_t dim_;
  std::vector<A> values_;
  std::vector<bool> norm_;
};

// Widens the weights and runs Kernel<T, dim or 0, rotary> over the tokens of the joint sequences.
template <template <class, int, bool> class Kernel, class T, class Params>
void run_qk_kernel(Params& params) {
  const auto& p = params.p;
  const bool split = std::is_same_v<T, BFloat16> || p.cos != nullptr;
  const WidenedWeights<T> weights({p.q.weight, p.q.context_weight, p.k.weight, p.k.context_weight}, p.dim, split);
  for (size_t i = 0; i < 4; ++i) params.weights[i] = weights[i];
  const int64_t tokens = std::max(p.q.tokens + p.q.context_tokens, p.k.tokens + p.k.context_tokens);
  const int64_t rows = p.batch * tokens, elements = 3 * p.heads * p.dim;
  const auto run = [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    if (p.cos != nullptr) {
      parallel_rows<Kernel<T, kDim, true>>(params, rows, elements);
    } else {
      parallel_rows<Kernel<T, kDim, false>>(params, rows, elements);
    }
  };
  if (p.dim == 64) return run(std::integral_constant<int, 64>{});
  if (p.dim == 128) return run(std::integral_constant<int, 128>{});
  run(std::integral_constant<int, 0>{});
}

void qk_norm_cpu_out(const Tensor& q, const Tensor& k, const OptionalTensor& v, const OptionalTensor& context_q,
                     const OptionalTensor& context_k, const OptionalTensor& context_v, const OptionalTensor& q_weight,
                     const OptionalTensor& k_weight, const OptionalTensor& context_q_weight,
                     const OptionalTensor& context_k_weight, const OptionalTensor& cos, const OptionalTensor& sin,
                     int64_t heads, bool context_first, double eps, const Tensor& joint_q, const Tensor& joint_k,
                     const OptionalTensor& joint_v, const Tensor& q_rstd, const Tensor& k_rstd) {
  const QkNormInputs in = qk_norm_inputs(q, k, v, context_q, context_k, context_v, q_weight, k_weight, context_q_weight,
                                         context_k_weight, cos, sin, heads, context_first, eps);
  check_qk_norm_results(q, k, v, context_q, context_k, heads, joint_q, joint_k, joint_v, q_rstd, k_rstd);
  dispatch_cpu_dtype("qk_norm", q.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    CpuQkNormParams<T> params;
    params.p = qk_norm_params<T, Accumulate<T>>(in, joint_q, joint_k, joint_v, q_rstd, k_rstd);
    run_qk_kernel<QkNormKernel, T>(params);
  });
}

QkNormResult qk_norm_cpu(const Tensor& q, const Tensor& k, const OptionalTensor& v, const OptionalTensor& context_q,
                         const OptionalTensor& context_k, const OptionalTensor& context_v,
                         const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                         const OptionalTensor& context_q_weight, const OptionalTensor& context_k_weight,
                         const OptionalTensor& cos, const OptionalTensor& sin, int64_t heads, bool context_first,
                         double eps) {
  const QkNormResult out = empty_qk_norm(q, k, v, context_q, context_k, heads);
  const auto& [joint_q, joint_k, joint_v, q_rstd, k_rstd] = out;
  qk_norm_cpu_out(q, k, v, context_q, context_k, context_v, q_weight, k_weight, context_q_weight, context_k_weight, cos,
                  sin, heads, context_first, eps, joint_q, joint_k, joint_v, q_rstd, k_rstd);
  return out;
}

void qk_norm_input_grad_cpu_out(const Tensor& grad_q, const Tensor& grad_k, const Tensor& joint_q,
                                const Tensor& joint_k, const Tensor& q_rstd, const Tensor& k_rstd,
                                const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                                const OptionalTensor& context_q_weight, const OptionalTensor& context_k_weight,
                                const OptionalTensor& cos, const OptionalTensor& sin, int64_t context_q_tokens,
                                int64_t context_k_tokens, bool context_first, const Tensor& grad_input_q,
                                const Tensor& grad_input_k, const OptionalTensor& grad_context_q,
                                const OptionalTensor& grad_context_k) {
  const QkNormGradInputs in =
      qk_norm_grad_inputs(grad_q, grad_k, joint_q, joint_k, q_rstd, k_rstd, q_weight, k_weight, context_q_weight,
                          context_k_weight, cos, sin, context_q_tokens, context_k_tokens, context_first);
  check_qk_norm_grad_results(joint_q, joint_k, context_q_tokens, context_k_tokens, grad_input_q, grad_input_k,
                             grad_context_q, grad_context_k);
  dispatch_cpu_dtype("qk_norm_input_grad", joint_q.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    CpuQkNormGradParams<T> params;
    params.p = qk_norm_grad_params<T, Accumulate<T>>(in, grad_input_q, grad_input_k, grad_context_q, grad_context_k);
    run_qk_kernel<QkNormGradKernel, T>(params);
  });
}

QkNormGradResult qk_norm_input_grad_cpu(const Tensor& grad_q, const Tensor& grad_k, const Tensor& joint_q,
                                        const Tensor& joint_k, const Tensor& q_rstd, const Tensor& k_rstd,
                                        const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                                        const OptionalTensor& context_q_weight, const OptionalTensor& context_k_weight,
                                        const OptionalTensor& cos, const OptionalTensor& sin, int64_t context_q_tokens,
                                        int64_t context_k_tokens, bool context_first) {
  const QkNormGradResult out = empty_qk_norm_grad(joint_q, joint_k, context_q_tokens, context_k_tokens);
  const auto& [grad_input_q, grad_input_k, grad_context_q, grad_context_k] = out;
  qk_norm_input_grad_cpu_out(grad_q, grad_k, joint_q, joint_k, q_rstd, k_rstd, q_weight, k_weight, context_q_weight,
                             context_k_weight, cos, sin, context_q_tokens, context_k_tokens, context_first,
                             grad_input_q, grad_input_k, grad_context_q, grad_context_k);
  return out;
}

}  // namespace
}  // namespace stitchvm

STABLE_TORCH_LIBRARY_IMPL(stitchvm, CPU, m) {
  m.impl("qk_norm", TORCH_BOX(&stitchvm::qk_norm_cpu));
  m.impl("qk_norm.out", TORCH_BOX(&stitchvm::qk_norm_cpu_out));
  m.impl("qk_norm_input_grad", TORCH_BOX(&stitchvm::qk_norm_input_grad_cpu));
  m.impl("qk_norm_input_grad.out", TORCH_BOX(&stitchvm::qk_norm_input_grad_cpu_out));
}
