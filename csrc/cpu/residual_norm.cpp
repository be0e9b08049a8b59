// residual_norm on the CPU: one pass over a row per reduction, the row staying in cache between them.
#include "../args/residual_norm.h"

#include <cmath>
#include <type_traits>
#include <vector>

#include "channels.h"
#include "launch.h"

namespace stitchvm {
namespace {

// What an inner loop reads at channel c: elements of a row, or a constant where the row is absent. Choosing between
// them once per row keeps the loops free of tests.
template <class T>
struct Row {
  const T* data;
  template <int kValues>
  STITCHVM_INLINE void operator()(int64_t c, Accumulate<T> (&v)[kValues]) const {
    load<kValues>(data + c, v);
  }
};

template <class T, int kValue>
struct ConstantRow {
  template <int kValues>
  STITCHVM_INLINE void operator()(int64_t, Accumulate<T> (&v)[kValues]) const {
    for (int k = 0; k < kValues; ++k) v[k] = Accumulate<T>(kValue);
  }
};

// f(the row at data), or f(the constant) where data is null.
template <int kValue, class T, class F>
STITCHVM_INLINE auto with_row(const T* data, F f) {
  return data != nullptr ? f(Row<T>{data}) : f(ConstantRow<T, kValue>{});
}

// The sum of kLanes partial sums, a power of two, in a fixed order.
template <int kLanes, class A>
STITCHVM_INLINE A tree_sum(A* lanes) {
  if constexpr (kLanes > 1) {
#pragma omp simd
    for (int l = 0; l < kLanes / 2; ++l) lanes[l] += lanes[l + kLanes / 2];
    return tree_sum<kLanes / 2>(lanes);
  }
  return lanes[0];
}

template <class A>
struct TwoSums {
  A first;
  A second;
};

// Two sums over the channels at once, in the manner of lane_sum: term(c, width, a, b) sets a[k] and b[k] to the terms
// of channel c + k. 32 interleaved partial sums of each, which fit the registers.
template <class T, class F>
STITCHVM_INLINE TwoSums<Accumulate<T>> channel_sums(int64_t channels, F term) {
  using A = Accumulate<T>;
  constexpr int kValues = kLaneValues<T>;
  constexpr int kLanes = 32 / kValues;
  A first[kLanes] = {}, second[kLanes] = {};
  A first_odd[kLanes] = {}, second_odd[kLanes] = {};  // of the other half of a pair
  int64_t i = 0;
  for (; (i + kLanes) * kValues <= channels; i += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      A a[kValues], b[kValues];
      term((i + l) * kValues, LaneWidth<kValues>{}, a, b);
      first[l] += a[0];
      second[l] += b[0];
      if constexpr (kValues == 2) {
        first_odd[l] += a[1];
        second_odd[l] += b[1];
      }
    }
  }
  int64_t c = i * kValues;
  for (int l = 0; c < channels; ++c, l = (l + 1) % kLanes) {
    A a[1], b[1];
    term(c, LaneWidth<1>{}, a, b);
    first[l] += a[0];
    second[l] += b[0];
  }
  return {tree_sum<kLanes>(first) + tree_sum<kLanes>(first_odd),
          tree_sum<kLanes>(second) + tree_sum<kLanes>(second_odd)};
}

// One sum, with twice the lanes.
template <class T, class F>
STITCHVM_INLINE Accumulate<T> channel_sum(int64_t channels, F term) {
  using A = Accumulate<T>;
  constexpr int kValues = kLaneValues<T>;
  constexpr int kLanes = 64 / kValues;
  A lanes[kLanes] = {};
  A odd[kLanes] = {};
  int64_t i = 0;
  for (; (i + kLanes) * kValues <= channels; i += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      A v[kValues];
      term((i + l) * kValues, LaneWidth<kValues>{}, v);
      lanes[l] += v[0];
      if constexpr (kValues == 2) odd[l] += v[1];
    }
  }
  int64_t c = i * kValues;
  for (int l = 0; c < channels; ++c, l = (l + 1) % kLanes) {
    A v[1];
    term(c, LaneWidth<1>{}, v);
    lanes[l] += v[0];
  }
  return tree_sum<kLanes>(lanes) + tree_sum<kLanes>(odd);
}

STITCHVM_INLINE int64_t table_row(const RowLayout& rows, int64_t row) {
  const int64_t sample = row / rows.tokens;
  return rows.index == nullptr ? sample : rows.index[sample];
}

// residual = x + gate * branch + gate2 * branch2, rounded; returns the sum of the rounded row.
template <class T, class Gate, class Branch2, class Gate2>
STITCHVM_INLINE Accumulate<T> store_and_sum(const T* x, const T* branch, Gate gate, Branch2 branch2, Gate2 gate2,
                                            T* residual, int64_t channels) {
  using A = Accumulate<T>;
  return channel_sum<T>(channels, [=](int64_t c, auto width, auto& rounded) STITCHVM_LAMBDA {
    constexpr int kValues = decltype(width)::value;
    A h[kValues], b[kValues], g[kValues];
    load<kValues>(x + c, h);
    load<kValues>(branch + c, b);
    gate(c, g);
    for (int k = 0; k < kValues; ++k) h[k] += g[k] * b[k];
    if constexpr (!std::is_same_v<Branch2, ConstantRow<T, 0>>) {
      branch2(c, b);
      gate2(c, g);
      for (int k = 0; k < kValues; ++k) h[k] += g[k] * b[k];
    }
    store<kValues>(residual + c, h);
    for (int k = 0; k < kValues; ++k) rounded[k] = widen(narrow<T>(h[k]));
  });
}

template <class T>
STITCHVM_INLINE Accumulate<T> store_residual(const ResidualNormParams<T>& p, int64_t row, int64_t index, T* residual) {
  using A = Accumulate<T>;
  const int64_t channels = p.rows.channels;
  const T* x = p.x + row * channels;
  const T* branch = p.branch + row * channels;
  return with_row<1>(p.gate.row(index), [&](auto gate) STITCHVM_LAMBDA -> A {
    if (p.branch2 == nullptr) {
      return store_and_sum(x, branch, gate, ConstantRow<T, 0>{}, ConstantRow<T, 0>{}, residual, channels);
    }
    const Row<T> branch2{p.branch2 + row * channels};
    return with_row<1>(p.gate2.row(index), [&](auto gate2) STITCHVM_LAMBDA -> A {
      return store_and_sum(x, branch, gate, branch2, gate2, residual, channels);
    });
  });
}

template <class T>
struct ResidualNormKernel {
  using A = Accumulate<T>;

  static STITCHVM_INLINE A sum_of(const T* h, int64_t channels) {
    return channel_sum<T>(
        channels, [=](int64_t c, auto width, auto& v) STITCHVM_LAMBDA { load<decltype(width)::value>(h + c, v); });
  }

  static STITCHVM_INLINE A rstd_of(const T* h, int64_t channels, A mean, double eps) {
    // Squares of deviations, not E[h^2] - mean^2: activations of diffusion transformers have large outlier channels.
    const A square = channel_sum<T>(channels, [=](int64_t c, auto width, auto& v) STITCHVM_LAMBDA {
      constexpr int kValues = decltype(width)::value;
      load<kValues>(h + c, v);
      for (int k = 0; k < kValues; ++k) v[k] = (v[k] - mean) * (v[k] - mean);
    });
    return A(1) / std::sqrt(square / A(channels) + A(eps));
  }

  static STITCHVM_INLINE void modulate(const T* h, A mean, A rstd, A base, const T* scale, const T* shift_data, T* y,
                                       int64_t channels) {
    with_row<0>(shift_data, [=](auto shift) STITCHVM_LAMBDA {
      for_channels<T>(channels, [=](int64_t c, auto width) STITCHVM_LAMBDA {
        constexpr int kValues = decltype(width)::value;
        A v[kValues], s[kValues], t[kValues];
        load<kValues>(h + c, v);
        load<kValues>(scale + c, s);
        shift(c, t);
        for (int k = 0; k < kValues; ++k) v[k] = norm_value(v[k], mean, rstd, base + s[k], t[k]);
        store<kValues>(y + c, v);
      });
    });
  }

  static STITCHVM_INLINE void run(const ResidualNormParams<T>& p, int64_t begin, int64_t end) {
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
        sum = sum_of(h, channels);
      }
      if (p.y == nullptr) continue;
      const A mean = sum / A(channels);
      const A rstd = rstd_of(h, channels, mean, p.eps);
      modulate(h, mean, rstd, base, p.scale.row(index), p.shift.row(index), p.y + row * channels, channels);
      if (p.y2 == nullptr) continue;
      modulate(h, mean, rstd, base, p.scale2.row(index), p.shift2.row(index), p.y2 + row * channels, channels);
    }
  }
};

// A row of unrounded values, channel c + k of a lane of kValues. The halves of bfloat16 pairs lie apart, so that they
// are stored without shuffles.
template <class T>
struct Scratch {
  using A = Accumulate<T>;
  A* data;
  int64_t half;

  template <int kValues>
  STITCHVM_INLINE A& at(int64_t c, int k) const {
    if constexpr (kLaneValues<T> == 1) return data[c];
    if constexpr (kValues == 1) return data[c / 2 + c % 2 * half];
    // data[c / 2 + k * half], but in bytes: the compiler cannot know that c is even, and would divide.
    return *reinterpret_cast<A*>(reinterpret_cast<char*>(data + k * half) + c * static_cast<int64_t>(sizeof(A) / 2));
  }
};

template <class T>
struct ResidualNormGradKernel {
  using A = Accumulate<T>;

  // grad_branch = gate * grad.
  template <class G>
  static STITCHVM_INLINE void gated(const T* gate, G grad, T* grad_branch, int64_t channels) {
    for_channels<T>(channels, [=](int64_t c, auto width) STITCHVM_LAMBDA {
      constexpr int kValues = decltype(width)::value;
      A g[kValues], v[kValues];
      load<kValues>(gate + c, g);
      grad(c, v);
      for (int k = 0; k < kValues; ++k) v[k] *= g[k];
      store<kValues>(grad_branch + c, v);
    });
  }

  // `gradient(c, v)` reads the gradient of the normalised row; `g` has room for it.
  template <class G>
  static STITCHVM_INLINE void norm_row(const ResidualNormGradParams<T>& p, int64_t row, int64_t index, G gradient,
                                       Scratch<T> g) {
    const int64_t channels = p.rows.channels;
    const T* h = p.residual + row * channels;
    const auto sums = channel_sums<T>(channels, [=](int64_t c, auto width, auto& v, auto& v_g) STITCHVM_LAMBDA {
      constexpr int kValues = decltype(width)::value;
      load<kValues>(h + c, v);
      gradient(c, v_g);
      for (int k = 0; k < kValues; ++k) g.template at<kValues>(c, k) = v_g[k];
    });
    const A mean = sums.first / A(channels);
    const A mean_g = sums.second / A(channels);
    const auto products = channel_sums<T>(channels, [=](int64_t c, auto width, auto& v, auto& v_g) STITCHVM_LAMBDA {
      constexpr int kValues = decltype(width)::value;
      load<kValues>(h + c, v);
      for (int k = 0; k < kValues; ++k) {
        const A d = v[k] - mean;
        v[k] = d * d;
        v_g[k] = g.template at<kValues>(c, k) * d;
      }
    });
    const A rstd = A(1) / std::sqrt(products.first / A(channels) + A(p.eps));
    const A mean_gn = products.second / A(channels) * rstd;
    const T* gate = p.gate.row(index);
    const T* gate2 = p.gate2.row(index);
    T* grad_x = p.grad_x + row * channels;
    with_row<0>(
        p.grad_residual == nullptr ? nullptr : p.grad_residual + row * channels, [=](auto straight) STITCHVM_LAMBDA {
          for_channels<T>(channels, [=](int64_t c, auto width) STITCHVM_LAMBDA {
            constexpr int kValues = decltype(width)::value;
            A v[kValues], grad[kValues];
            load<kValues>(h + c, v);
            straight(c, grad);
            for (int k = 0; k < kValues; ++k) {
              grad[k] += norm_grad_value(g.template at<kValues>(c, k), (v[k] - mean) * rstd, rstd, mean_g, mean_gn);
              g.template at<kValues>(c, k) = grad[k];  // unrounded, for the branches
            }
            store<kValues>(grad_x + c, grad);
          });
        });
    const auto grad = [=](int64_t c, auto& v) STITCHVM_LAMBDA {
      constexpr int kValues = std::extent_v<std::remove_reference_t<decltype(v)>>;
      for (int k = 0; k < kValues; ++k) v[k] = g.template at<kValues>(c, k);
    };
    if (gate != nullptr) gated(gate, grad, p.grad_branch + row * channels, channels);
    if (gate2 != nullptr) gated(gate2, grad, p.grad_branch2 + row * channels, channels);
  }

  static STITCHVM_INLINE void run(const ResidualNormGradParams<T>& p, int64_t begin, int64_t end) {
    const int64_t channels = p.rows.channels;
    const A base = scale_base<A>(p.affine);
    std::vector<A> values(p.grad_y == nullptr ? 0 : channels);
    const Scratch<T> g{values.data(), (channels + 1) / 2};
    for (int64_t row = begin; row < end; ++row) {
      const int64_t index = table_row(p.rows, row);
      if (p.grad_y == nullptr) {
        const Row<T> grad{p.grad_residual + row * channels};
        if (p.gate.data != nullptr) gated(p.gate.row(index), grad, p.grad_branch + row * channels, channels);
        if (p.gate2.data != nullptr) gated(p.gate2.row(index), grad, p.grad_branch2 + row * channels, channels);
        continue;
      }
      const T* grad_y = p.grad_y + row * channels;
      const T* scale = p.scale.row(index);
      const auto gradient = [=](int64_t c, auto& v) STITCHVM_LAMBDA {
        constexpr int kValues = std::extent_v<std::remove_reference_t<decltype(v)>>;
        A s[kValues];
        load<kValues>(grad_y + c, v);
        load<kValues>(scale + c, s);
        for (int k = 0; k < kValues; ++k) v[k] *= base + s[k];
      };
      if (p.grad_y2 == nullptr) {
        norm_row(p, row, index, gradient, g);
        continue;
      }
      const T* grad_y2 = p.grad_y2 + row * channels;
      const T* scale2 = p.scale2.row(index);
      const auto both = [=](int64_t c, auto& v) STITCHVM_LAMBDA {
        constexpr int kValues = std::extent_v<std::remove_reference_t<decltype(v)>>;
        A v2[kValues], s2[kValues];
        gradient(c, v);
        load<kValues>(grad_y2 + c, v2);
        load<kValues>(scale2 + c, s2);
        for (int k = 0; k < kValues; ++k) v[k] += v2[k] * (base + s2[k]);
      };
      norm_row(p, row, index, both, g);
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
