// residual_norm on the CPU: one pass over a row per reduction, the row staying in cache between them.
#include "../args/residual_norm.h"

#include <cmath>
#include <vector>

#include "lane_sum.h"
#include "launch.h"

namespace stitchvm {
namespace {

// What an inner loop reads at channel c: an element of a row, or a constant where the row is absent. Choosing between
// them once per row keeps the loops free of tests.
template <class T>
struct Row {
  const T* data;
  STITCHVM_INLINE Accumulate<T> operator()(int64_t c) const { return widen(data[c]); }
};

template <class A, int kValue>
struct Constant {
  STITCHVM_INLINE A operator()(int64_t) const { return A(kValue); }
};

// f(the row at data), or f(the constant) where data is null.
template <int kValue, class T, class F>
STITCHVM_INLINE auto with_row(const T* data, F f) {
  return data != nullptr ? f(Row<T>{data}) : f(Constant<Accumulate<T>, kValue>{});
}

STITCHVM_INLINE int64_t table_row(const RowLayout& rows, int64_t row) {
  const int64_t sample = row / rows.tokens;
  return rows.index == nullptr ? sample : rows.index[sample];
}

// residual[c] = value(c), rounded; returns the sum of the rounded row.
template <class T, class F>
STITCHVM_INLINE Accumulate<T> store_and_sum(T* residual, int64_t channels, F value) {
  return lane_sum<Accumulate<T>>(channels, [=](int64_t c) STITCHVM_LAMBDA {
    const Accumulate<T> v = value(c);
    residual[c] = narrow<T>(v);
    return widen(narrow<T>(v));
  });
}

template <class T>
STITCHVM_INLINE Accumulate<T> store_residual(const ResidualNormParams<T>& p, int64_t row, int64_t index, T* residual) {
  using A = Accumulate<T>;
  const int64_t channels = p.rows.channels;
  const Row<T> x{p.x + row * channels};
  const Row<T> branch{p.branch + row * channels};
  const T* data2 = p.branch2 == nullptr ? nullptr : p.branch2 + row * channels;
  return with_row<1>(p.gate.row(index), [&](auto gate) STITCHVM_LAMBDA -> A {
    if (data2 == nullptr) {
      return store_and_sum(residual, channels, [=](int64_t c) STITCHVM_LAMBDA { return x(c) + gate(c) * branch(c); });
    }
    const Row<T> branch2{data2};
    return with_row<1>(p.gate2.row(index), [&](auto gate2) STITCHVM_LAMBDA -> A {
      return store_and_sum(residual, channels, [=](int64_t c) STITCHVM_LAMBDA {
        return x(c) + gate(c) * branch(c) + gate2(c) * branch2(c);
      });
    });
  });
}

template <class T>
struct ResidualNormKernel {
  static STITCHVM_INLINE void run(const ResidualNormParams<T>& p, int64_t begin, int64_t end) {
    using A = Accumulate<T>;
    const int64_t channels = p.rows.channels;
    const A base = scale_base<A>(p.affine);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t index = table_row(p.rows, row);
      const T* h = p.x + row * channels;
      A sum;
      if (p.branch != nullptr) {
        T* residual = p.residual + row * channels;
        sum = store_residual(p, row, index, residual);
        h = residual;
      } else {
        sum = lane_sum<A>(channels, [=](int64_t c) STITCHVM_LAMBDA { return widen(h[c]); });
      }
      if (p.y == nullptr) continue;
      const A mean = sum / A(channels);
      // Squares of deviations, not E[h^2] - mean^2: activations of diffusion transformers have large outlier channels.
      const A square = lane_sum<A>(channels, [=](int64_t c) STITCHVM_LAMBDA {
        const A d = widen(h[c]) - mean;
        return d * d;
      });
      const A rstd = A(1) / std::sqrt(square / A(channels) + A(p.eps));
      const auto modulate = [=](const T* scale, const T* shift_data, T* y) STITCHVM_LAMBDA {
        with_row<0>(shift_data, [=](auto shift) STITCHVM_LAMBDA {
#pragma omp simd
          for (int64_t c = 0; c < channels; ++c) {
            y[c] = narrow<T>(norm_value(widen(h[c]), mean, rstd, base + widen(scale[c]), shift(c)));
          }
        });
      };
      modulate(p.scale.row(index), p.shift.row(index), p.y + row * channels);
      if (p.y2 != nullptr) modulate(p.scale2.row(index), p.shift2.row(index), p.y2 + row * channels);
    }
  }
};

// Two sums at once, as lane_sum does one: term(c, a, b) adds to a and b. Half the lanes of each, so that they fit the
// registers.
template <class A, class F>
STITCHVM_INLINE void lane_sums(int64_t n, A (&sums)[2], F term) {
  constexpr int kLanes = 32;
  A a[kLanes] = {};
  A b[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) term(c + l, a[l], b[l]);
  }
  for (int l = 0; c + l < n; ++l) term(c + l, a[l], b[l]);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) {
      a[l] += a[l + half];
      b[l] += b[l + half];
    }
  }
  sums[0] = a[0];
  sums[1] = b[0];
}

template <class T>
struct ResidualNormGradKernel {
  using A = Accumulate<T>;

  // grad_branch = gate * grad over `count` channels.
  template <class G>
  static STITCHVM_INLINE void gated(const T* gate, G grad, T* grad_branch, int64_t count) {
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) grad_branch[c] = narrow<T>(widen(gate[c]) * grad(c));
  }

  // `gradient(c)` is the gradient of the normalised row; `g` has room for it.
  template <class G>
  static STITCHVM_INLINE void norm_row(const ResidualNormGradParams<T>& p, int64_t row, int64_t index, G gradient,
                                       A* g) {
    const int64_t channels = p.rows.channels;
    const T* h = p.residual + row * channels;
    A sums[2];
    lane_sums(channels, sums, [=](int64_t c, A& sum, A& sum_g) STITCHVM_LAMBDA {
      g[c] = gradient(c);
      sum += widen(h[c]);
      sum_g += g[c];
    });
    const A mean = sums[0] / A(channels);
    const A mean_g = sums[1] / A(channels);
    lane_sums(channels, sums, [=](int64_t c, A& square, A& sum_gd) STITCHVM_LAMBDA {
      const A d = widen(h[c]) - mean;
      square += d * d;
      sum_gd += g[c] * d;
    });
    const A rstd = A(1) / std::sqrt(sums[0] / A(channels) + A(p.eps));
    const A mean_gn = sums[1] / A(channels) * rstd;
    const T* gate = p.gate.row(index);
    const T* gate2 = p.gate2.row(index);
    const T* grad_residual = p.grad_residual == nullptr ? nullptr : p.grad_residual + row * channels;
    T* grad_x = p.grad_x + row * channels;
    with_row<0>(grad_residual, [=](auto straight) STITCHVM_LAMBDA {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        const A n = (widen(h[c]) - mean) * rstd;
        const A grad = straight(c) + norm_grad_value(g[c], n, rstd, mean_g, mean_gn);
        g[c] = grad;  // unrounded, for the branches
        grad_x[c] = narrow<T>(grad);
      }
    });
    const auto grad = [=](int64_t c) STITCHVM_LAMBDA { return g[c]; };
    if (gate != nullptr) gated(gate, grad, p.grad_branch + row * channels, channels);
    if (gate2 != nullptr) gated(gate2, grad, p.grad_branch2 + row * channels, channels);
  }

  static STITCHVM_INLINE void run(const ResidualNormGradParams<T>& p, int64_t begin, int64_t end) {
    const int64_t channels = p.rows.channels;
    const A base = scale_base<A>(p.affine);
    std::vector<A> g(p.grad_y == nullptr ? 0 : channels);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t index = table_row(p.rows, row);
      if (p.grad_y == nullptr) {
        const Row<T> grad{p.grad_residual + row * channels};
        if (p.gate.data != nullptr) gated(p.gate.row(index), grad, p.grad_branch + row * channels, channels);
        if (p.gate2.data != nullptr) gated(p.gate2.row(index), grad, p.grad_branch2 + row * channels, channels);
        continue;
      }
      const Row<T> grad{p.grad_y + row * channels};
      const Row<T> scale{p.scale.row(index)};
      if (p.grad_y2 == nullptr) {
        norm_row(p, row, index, [=](int64_t c) STITCHVM_LAMBDA { return grad(c) * (base + scale(c)); }, g.data());
      } else {
        const Row<T> grad2{p.grad_y2 + row * channels};
        const Row<T> scale2{p.scale2.row(index)};
        norm_row(
            p, row, index,
            [=](int64_t c) STITCHVM_LAMBDA { return grad(c) * (base + scale(c)) + grad2(c) * (base + scale2(c)); },
            g.data());
      }
    }
  }
};

void check_index(const char* op, const RowLayout& rows, int64_t samples) {
  for (int64_t b = 0; rows.index != nullptr && b < samples; ++b) {
    STD_TORCH_CHECK(rows.index[b] >= 0 && rows.index[b] < rows.table_rows, op, ": rows[", b, "] = ", rows.index[b],
                    " is not in [0, ", rows.table_rows, ")");
  }
}

void residual_norm_cpu_out(const Tensor& x, const MaybeTensor& branch, const MaybeTensor& gate,
                           const MaybeTensor& branch2, const MaybeTensor& gate2, const MaybeTensor& scale,
                           const MaybeTensor& shift, const MaybeTensor& scale2, const MaybeTensor& shift2,
                           const MaybeTensor& rows, bool affine, double eps, const MaybeTensor& residual,
                           const MaybeTensor& y, const MaybeTensor& y2) {
  const ResidualNormTensors t =
      residual_norm_tensors(x, branch, gate, branch2, gate2, scale, shift, scale2, shift2, rows, residual, y, y2);
  dispatch_cpu_dtype("residual_norm", x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const auto p = residual_norm_params<T>(t, affine, eps);
    check_index("residual_norm", p.rows, x.size(0));
    parallel_rows<ResidualNormKernel<T>>(p, p.rows.count, p.rows.channels);
  });
}

void residual_norm_input_grad_cpu_out(const MaybeTensor& grad_residual, const MaybeTensor& grad_y,
                                      const MaybeTensor& grad_y2, const MaybeTensor& residual, const MaybeTensor& gate,
                                      const MaybeTensor& gate2, const MaybeTensor& scale, const MaybeTensor& scale2,
                                      const MaybeTensor& rows, bool affine, double eps, const MaybeTensor& grad_x,
                                      const MaybeTensor& grad_branch, const MaybeTensor& grad_branch2) {
  const ResidualNormGradTensors t = residual_norm_grad_tensors(grad_residual, grad_y, grad_y2, residual, gate, gate2,
                                                               scale, scale2, rows, grad_x, grad_branch, grad_branch2);
  dispatch_cpu_dtype("residual_norm_input_grad", t.like.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const auto p = residual_norm_grad_params<T>(t, affine, eps);
    check_index("residual_norm_input_grad", p.rows, t.like.size(0));
    parallel_rows<ResidualNormGradKernel<T>>(p, p.rows.count, p.rows.channels);
  });
}

}  // namespace
}  // namespace stitchvm

STABLE_TORCH_LIBRARY_IMPL(stitchvm, CPU, m) {
  using namespace stitchvm;
  m.impl("residual_norm", TORCH_BOX(&residual_norm_functional<&residual_norm_cpu_out>));
  m.impl("residual_norm.out", TORCH_BOX(&residual_norm_cpu_out));
  m.impl("residual_norm_input_grad",
         TORCH_BOX(&residual_norm_input_grad_functional<&residual_norm_input_grad_cpu_out>));
  m.impl("residual_norm_input_grad.out", TORCH_BOX(&residual_norm_input_grad_cpu_out));
}
