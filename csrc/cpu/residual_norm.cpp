// residual_norm on the CPU: one pass over a row per reduction, the row staying in cache between them.
#include "../args/residual_norm.h"

#include <array>
#include <cmath>
#include <type_traits>
#include <utility>

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

// kSums, 2 or 4, sums over the channels at once, in the manner of lane_sum: term(c, width, v...) sets the k-th value of
// each v to that sum's term of channel c + k. 64 interleaved partial sums in all, which fit the registers. Arrays and
// terms have names of their own, since the compiler keeps no array of arrays in registers.
template <int kSums, class T, class F>
STITCHVM_INLINE std::array<Accumulate<T>, kSums> channel_sums(int64_t channels, F term) {
  using A = Accumulate<T>;
  constexpr int kValues = kLaneValues<T>;
  constexpr int kLanes = 64 / kSums / kValues;
  A s0[kLanes] = {}, s1[kLanes] = {}, s2[kLanes] = {}, s3[kLanes] = {};
  A odd0[kLanes] = {}, odd1[kLanes] = {}, odd2[kLanes] = {}, odd3[kLanes] = {};  // of the other half of a pair
  int64_t i = 0;
  for (; (i + kLanes) * kValues <= channels; i += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      A v0[kValues], v1[kValues], v2[kValues], v3[kValues];
      if constexpr (kSums == 4) {
        term((i + l) * kValues, LaneWidth<kValues>{}, v0, v1, v2, v3);
        s2[l] += v2[0];
        s3[l] += v3[0];
      } else {
        term((i + l) * kValues, LaneWidth<kValues>{}, v0, v1);
      }
      s0[l] += v0[0];
      s1[l] += v1[0];
      if constexpr (kValues == 2) {
        odd0[l] += v0[1];
        odd1[l] += v1[1];
        if constexpr (kSums == 4) {
          odd2[l] += v2[1];
          odd3[l] += v3[1];
        }
      }
    }
  }
  int64_t c = i * kValues;
  for (int l = 0; c < channels; ++c, l = (l + 1) % kLanes) {
    A v0[1], v1[1], v2[1], v3[1];
    if constexpr (kSums == 4) {
      term(c, LaneWidth<1>{}, v0, v1, v2, v3);
      s2[l] += v2[0];
      s3[l] += v3[0];
    } else {
      term(c, LaneWidth<1>{}, v0, v1);
    }
    s0[l] += v0[0];
    s1[l] += v1[0];
  }
  const auto total = [](A* even, A* odd) STITCHVM_LAMBDA { return tree_sum<kLanes>(even) + tree_sum<kLanes>(odd); };
  if constexpr (kSums == 4) return {total(s0, odd0), total(s1, odd1), total(s2, odd2), total(s3, odd3)};
  if constexpr (kSums == 2) return {total(s0, odd0), total(s1, odd1)};
}

// The mean of kShiftChannels of a row's channels, which the row's own mean and variance are then taken around, in one
// pass. It is off the mean by at most sqrt(channels / kShiftChannels) standard deviations, whatever the row, and for
// most rows by far less, so that little cancels; around 0, as in E[h^2] - mean^2, a row with a large mean would lose
// its variance. The channels' distance is odd, so that they are not the same one of every head.
constexpr int64_t kShiftChannels = 32;

template <class A, class F>
STITCHVM_INLINE A row_shift(int64_t channels, F value) {
  const int64_t n = channels < kShiftChannels ? channels : kShiftChannels;
  const int64_t distance = channels < 2 * n ? 1 : (channels / n - 1) | 1;
  A sum = 0;
  for (int64_t c = 0; c < n * distance; c += distance) {
    A v[1];
    value(c, v);
    sum += v[0];
  }
  return sum / A(n);
}

// 1/std from the mean and the mean square of what the row deviates from its shift by.
template <class A>
STITCHVM_INLINE A rstd_from(A square, A deviation, double eps) {
  const A variance = square - deviation * deviation;
  return A(1) / std::sqrt((variance < 0 ? A(0) : variance) + A(eps));  // a NaN stays one
}

STITCHVM_INLINE int64_t table_row(const RowLayout& rows, int64_t row) {
  const int64_t sample = row / rows.tokens;
  return rows.index == nullptr ? sample : rows.index[sample];
}

// Reads residual = x + gate * branch + gate2 * branch2, rounded, and stores it, which may overwrite x: once per
// channel.
template <class T, class Gate, class Branch2, class Gate2>
struct StoredResidual {
  using A = Accumulate<T>;
  const T* x;
  const T* branch;
  Gate gate;
  Branch2 branch2;
  Gate2 gate2;
  T* residual;

  template <int kValues>
  STITCHVM_INLINE void unrounded(int64_t c, A (&h)[kValues]) const {
    A b[kValues], g[kValues];
    load<kValues>(x + c, h);
    load<kValues>(branch + c, b);
    gate(c, g);
    for (int k = 0; k < kValues; ++k) h[k] += g[k] * b[k];
    if constexpr (!std::is_same_v<Branch2, ConstantRow<T, 0>>) {
      branch2(c, b);
      gate2(c, g);
      for (int k = 0; k < kValues; ++k) h[k] += g[k] * b[k];
    }
  }

  template <int kValues>
  STITCHVM_INLINE void operator()(int64_t c, A (&h)[kValues]) const {
    unrounded(c, h);
    store<kValues>(residual + c, h);
    for (int k = 0; k < kValues; ++k) h[k] = widen(narrow<T>(h[k]));
  }
};

template <class T, class F>
STITCHVM_INLINE auto with_stored_residual(const ResidualNormParams<T>& p, int64_t row, int64_t index, F f) {
  const int64_t channels = p.rows.channels;
  const T* x = p.x + row * channels;
  const T* branch = p.branch + row * channels;
  T* residual = p.residual + row * channels;
  return with_row<1>(p.gate.row(index), [&](auto gate) STITCHVM_LAMBDA {
    using Gate = decltype(gate);
    using None = ConstantRow<T, 0>;
    if (p.branch2 == nullptr) {
      return f(StoredResidual<T, Gate, None, None>{x, branch, gate, None{}, None{}, residual});
    }
    const Row<T> branch2{p.branch2 + row * channels};
    return with_row<1>(p.gate2.row(index), [&](auto gate2) STITCHVM_LAMBDA {
      return f(StoredResidual<T, Gate, Row<T>, decltype(gate2)>{x, branch, gate, branch2, gate2, residual});
    });
  });
}

template <class A>
struct Stats {
  A mean;
  A rstd;
};

template <class T>
struct ResidualNormKernel {
  using A = Accumulate<T>;

  // Of the row that `value(c, v)` reads, each channel once.
  template <class F>
  static STITCHVM_INLINE Stats<A> stats_of(int64_t channels, double eps, A shift, F value) {
    const auto sums = channel_sums<2, T>(channels, [=](int64_t c, auto width, auto& v, auto& square) STITCHVM_LAMBDA {
      value(c, v);
      for (int k = 0; k < decltype(width)::value; ++k) {
        v[k] -= shift;
        square[k] = v[k] * v[k];
      }
    });
    const A deviation = sums[0] / A(channels);
    return {shift + deviation, rstd_from(sums[1] / A(channels), deviation, eps)};
  }

  static STITCHVM_INLINE void modulate(const T* h, Stats<A> stats, A base, const T* scale, const T* shift_data, T* y,
                                       int64_t channels) {
    with_row<0>(shift_data, [=](auto shift) STITCHVM_LAMBDA {
      for_channels<T>(channels, [=](int64_t c, auto width) STITCHVM_LAMBDA {
        constexpr int kValues = decltype(width)::value;
        A v[kValues], s[kValues], t[kValues];
        load<kValues>(h + c, v);
        load<kValues>(scale + c, s);
        shift(c, t);
        for (int k = 0; k < kValues; ++k) v[k] = norm_value(v[k], stats.mean, stats.rstd, base + s[k], t[k]);
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
      Stats<A> stats{};
      if (p.branch == nullptr) {
        const Row<T> x{h};
        stats = stats_of(channels, p.eps, row_shift<A>(channels, x), x);
      } else {
        h = p.residual + row * channels;
        stats = with_stored_residual(p, row, index, [&](auto stored) STITCHVM_LAMBDA {
          if (p.y != nullptr) {
            const auto unstored = [=](int64_t c, auto& v) STITCHVM_LAMBDA { stored.unrounded(c, v); };
            return stats_of(channels, p.eps, row_shift<A>(channels, unstored), stored);
          }
          for_channels<T>(channels, [=](int64_t c, auto width) STITCHVM_LAMBDA {
            A v[decltype(width)::value];
            stored(c, v);
          });
          return Stats<A>{};
        });
      }
      if (p.y == nullptr) continue;
      modulate(h, stats, base, p.scale.row(index), p.shift.row(index), p.y + row * channels, channels);
      if (p.y2 == nullptr) continue;
      modulate(h, stats, base, p.scale2.row(index), p.shift2.row(index), p.y2 + row * channels, channels);
    }
  }
};

template <class T>
struct ResidualNormGradKernel {
  using A = Accumulate<T>;

  // Stores grad_branch = gate * grad; without a gate the branch's gradient is grad itself, and nothing is stored.
  struct Gated {
    const T* gate = nullptr;
    T* grad_branch = nullptr;

    static STITCHVM_INLINE Gated at(const T* gate, T* grad_branch, int64_t start) {
      return gate == nullptr ? Gated{} : Gated{gate, grad_branch + start};
    }

    template <int kValues>
    STITCHVM_INLINE void operator()(int64_t c, const A (&grad)[kValues]) const {
      A g[kValues];
      load<kValues>(gate + c, g);
      for (int k = 0; k < kValues; ++k) g[k] *= grad[k];
      store<kValues>(grad_branch + c, g);
    }
  };

  struct NoBranch {
    template <int kValues>
    STITCHVM_INLINE void operator()(int64_t, const A (&)[kValues]) const {}
  };

  static STITCHVM_INLINE void gated(Row<T> grad, Gated branch, int64_t channels) {
    if (branch.gate == nullptr) return;
    for_channels<T>(channels, [=](int64_t c, auto width) STITCHVM_LAMBDA {
      A v[decltype(width)::value];
      grad(c, v);
      branch(c, v);
    });
  }

  // `gradient(c, v)` reads the gradient of the normalised row.
  template <class G>
  static STITCHVM_INLINE void norm_row(const ResidualNormGradParams<T>& p, int64_t row, G gradient, Gated first,
                                       Gated second) {
    const int64_t channels = p.rows.channels;
    const Row<T> h{p.residual + row * channels};
    const A shift = row_shift<A>(channels, h);
    T* grad_x = p.grad_x + row * channels;
    const auto sums = channel_sums<4, T>(
        channels, [=](int64_t c, auto width, auto& v, auto& g, auto& square, auto& product) STITCHVM_LAMBDA {
          h(c, v);
          gradient(c, g);
          for (int k = 0; k < decltype(width)::value; ++k) {
            v[k] -= shift;
            square[k] = v[k] * v[k];
            product[k] = v[k] * g[k];
          }
        });
    const A deviation = sums[0] / A(channels);
    const A mean = shift + deviation;
    const A rstd = rstd_from(sums[2] / A(channels), deviation, p.eps);
    const A mean_g = sums[1] / A(channels);
    const A mean_gn = (sums[3] / A(channels) - mean_g * deviation) * rstd;
    const auto write = [=](auto straight, auto first, auto second) STITCHVM_LAMBDA {
      for_channels<T>(channels, [=](int64_t c, auto width) STITCHVM_LAMBDA {
        constexpr int kValues = decltype(width)::value;
        A v[kValues], g[kValues], grad[kValues];
        h(c, v);
        gradient(c, g);
        straight(c, grad);
        for (int k = 0; k < kValues; ++k) {
          grad[k] += norm_grad_value(g[k], (v[k] - mean) * rstd, rstd, mean_g, mean_gn);
        }
        store<kValues>(grad_x + c, grad);
        first(c, grad);
        second(c, grad);
      });
    };
    if (first.gate == nullptr) std::swap(first, second);
    with_row<0>(p.grad_residual == nullptr ? nullptr : p.grad_residual + row * channels,
                [=](auto straight) STITCHVM_LAMBDA {
                  if (first.gate == nullptr) return write(straight, NoBranch{}, NoBranch{});
                  if (second.gate == nullptr) return write(straight, first, NoBranch{});
                  write(straight, first, second);
                });
  }

  static STITCHVM_INLINE void run(const ResidualNormGradParams<T>& p, int64_t begin, int64_t end) {
    const int64_t channels = p.rows.channels;
    const A base = scale_base<A>(p.affine);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t index = table_row(p.rows, row);
      const auto first = Gated::at(p.gate.row(index), p.grad_branch, row * channels);
      const auto second = Gated::at(p.gate2.row(index), p.grad_branch2, row * channels);
      if (p.grad_y == nullptr) {
        const Row<T> grad{p.grad_residual + row * channels};
        gated(grad, first, channels);
        gated(grad, second, channels);
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
        norm_row(p, row, gradient, first, second);
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
      norm_row(p, row, both, first, second);
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
