// resample_tokens on the CPU: one token of the result at a time, vectorised over channels. The taps of both axes are
// worked out once per call.
#include "../args/resample_tokens.h"

#include <cstring>
#include <vector>

#include "channels.h"
#include "launch.h"

namespace stitchvm {
namespace {

constexpr int kMaxAdd = 3;  // bias, residual, position

// A token: w[0] * x[0] + .. + w[kTerms - 1] * x[kTerms - 1] (x[0] itself where kTerms is 1) + add[0] + .. + add[kAdd -
// 1].
template <class T, int kTerms, int kAdd>
struct TokenSum {
  using A = Accumulate<T>;
  const T* x[kTerms];
  A w[kTerms];
  const T* add[kAdd > 0 ? kAdd : 1];

  STITCHVM_INLINE void write(T* y, int64_t begin, int64_t end) const {
    const TokenSum s = *this;
    for_channels<T>(end - begin, [=](int64_t i, auto width) STITCHVM_LAMBDA {
      constexpr int kValues = decltype(width)::value;
      const int64_t c = begin + i;
      A sum[kValues], v[kValues];
      load<kValues>(s.x[0] + c, sum);
      if constexpr (kTerms > 1) {
        for (int k = 0; k < kValues; ++k) sum[k] *= s.w[0];
        for (int t = 1; t < kTerms; ++t) {
          load<kValues>(s.x[t] + c, v);
          for (int k = 0; k < kValues; ++k) sum[k] += s.w[t] * v[k];
        }
      }
      for (int a = 0; a < kAdd; ++a) {
        load<kValues>(s.add[a] + c, v);
        for (int k = 0; k < kValues; ++k) sum[k] += v[k];
      }
      store<kValues>(y + c, sum);
    });
  }
};

template <class T>
struct ForwardParams {
  ResampleParams<T> p;
  const Tap<Accumulate<T>>* rows;  // out_h of them; null where the grids are equal
  const Tap<Accumulate<T>>* columns;
};

template <class T>
struct ResampleKernel {
  using A = Accumulate<T>;
  static constexpr int64_t kTile = 128;  // channels between two rounds of prefetching

  // A token of the prefix or of an equal grid.
  template <int kAdd>
  static STITCHVM_INLINE void copy(const T* x, const T* const (&add)[kMaxAdd], T* y, int64_t channels) {
    if constexpr (kAdd == 0) {
      std::memcpy(y, x, channels * sizeof(T));
    } else {
      TokenSum<T, 1, kAdd> sum{{x}, {A(1)}, {}};
      for (int a = 0; a < kAdd; ++a) sum.add[a] = add[a];
      sum.write(y, 0, channels);
    }
  }

  // A token of a resampled grid. A coarser grid reads pairs of tokens with gaps between them, which the hardware does
  // not foresee: the four tokens that `next` reads are prefetched then.
  template <int kAdd>
  static STITCHVM_INLINE void interpolate(const T* x, int in_w, const Tap<A>& row, const Tap<A>& column,
                                          const Tap<A>& next, const T* const (&add)[kMaxAdd], T* y, int64_t channels) {
    const T* upper = x + static_cast<int64_t>(row.first) * in_w * channels;
    const T* lower = x + static_cast<int64_t>(row.second) * in_w * channels;
    TokenSum<T, 4, kAdd> sum{{upper + column.first * channels, upper + column.second * channels,
                              lower + column.first * channels, lower + column.second * channels},
                             {(A(1) - row.weight) * (A(1) - column.weight), (A(1) - row.weight) * column.weight,
                              row.weight * (A(1) - column.weight), row.weight * column.weight},
                             {}};
    for (int a = 0; a < kAdd; ++a) sum.add[a] = add[a];
    const bool apart = next.first > column.second;
    for (int64_t c = 0; c < channels; c += kTile) {
      const int64_t end = std::min(c + kTile, channels);
      for (int64_t line = apart ? c : end; line < end; line += 64 / static_cast<int64_t>(sizeof(T))) {
        __builtin_prefetch(upper + next.first * channels + line, 0, 2);
        __builtin_prefetch(upper + next.second * channels + line, 0, 2);
        __builtin_prefetch(lower + next.first * channels + line, 0, 2);
        __builtin_prefetch(lower + next.second * channels + line, 0, 2);
      }
      sum.write(y, c, end);
    }
  }

  static STITCHVM_INLINE void run(const ForwardParams<T>& f, int64_t begin, int64_t end) {
    const ResampleParams<T>& p = f.p;
    const int64_t patches = static_cast<int64_t>(p.out_h) * p.out_w;
    const int64_t tokens = p.prefix_tokens + patches;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t sample = t / tokens;
      const int64_t token = t - sample * tokens;
      const int64_t patch = token - p.prefix_tokens;
      T* y = p.y + t * p.channels;
      const T* add[kMaxAdd];
      int count = 0;
      if (patch >= 0 && p.bias != nullptr) add[count++] = p.bias;
      if (patch >= 0 && p.residual != nullptr) add[count++] = p.residual + (sample * patches + patch) * p.channels;
      if (p.position != nullptr) add[count++] = p.position + token * p.channels;
      if (patch < 0 || f.rows == nullptr) {
        const T* x = patch < 0 ? p.prefix + token * p.channels : p.x + (sample * patches + patch) * p.channels;
        if (count == 0) copy<0>(x, add, y, p.channels);
        if (count == 1) copy<1>(x, add, y, p.channels);
        if (count == 2) copy<2>(x, add, y, p.channels);
        if (count == 3) copy<3>(x, add, y, p.channels);
      } else {
        const T* x = p.x + sample * p.in_h * p.in_w * p.channels;
        const int64_t oy = patch / p.out_w;
        const int64_t ox = patch - oy * p.out_w;
        const Tap<A>& row = f.rows[oy];
        const Tap<A>& column = f.columns[ox];
        const Tap<A>& next = f.columns[std::min<int64_t>(ox + 1, p.out_w - 1)];
        if (count == 0) interpolate<0>(x, p.in_w, row, column, next, add, y, p.channels);
        if (count == 1) interpolate<1>(x, p.in_w, row, column, next, add, y, p.channels);
        if (count == 2) interpolate<2>(x, p.in_w, row, column, next, add, y, p.channels);
        if (count == 3) interpolate<3>(x, p.in_w, row, column, next, add, y, p.channels);
      }
    }
  }
};

template <class A>
std::vector<Tap<A>> axis_taps(int in, int out) {
  std::vector<Tap<A>> taps(out);
  for (int o = 0; o < out; ++o) taps[o] = bilinear_tap<A>(o, in, out);
  return taps;
}

// The output positions that read an input position with a weight other than 0, of one axis.
template <class A>
struct Reader {
  int position;
  A weight;
};

template <class A>
struct AxisReaders {
  std::vector<Reader<A>> readers;
  std::vector<int64_t> first;  // of input position i: readers[first[i]] up to readers[first[i + 1]]

  AxisReaders(int in, int out) {
    for (int i = 0; i < in; ++i) {
      first.push_back(static_cast<int64_t>(readers.size()));
      for (int o = reader_begin(i, in, out); o < reader_end(i, in, out); ++o) {
        const A weight = reader_weight<A>(o, i, in, out);
        if (weight != A(0)) readers.push_back({o, weight});
      }
    }
    first.push_back(static_cast<int64_t>(readers.size()));
  }
};

template <class T>
struct BackwardParams {
  ResampleGradParams<T> p;
  const Reader<Accumulate<T>>* rows;
  const int64_t* first_row;
  const Reader<Accumulate<T>>* columns;
  const int64_t* first_column;
};

// The adjoint as a gather: every input token sums the output tokens that read it, in a fixed order.
template <class T>
struct ResampleGradKernel {
  using A = Accumulate<T>;
  static constexpr int kTile = 512;  // channels whose sums stay in the first-level cache
  static constexpr int kGroup = 4;   // readers summed in one pass over a tile

  // The sums of a tile between two passes over it. The two values of a lane lie in arrays of their own.
  struct Sums {
    A of[kLaneValues<T>][kTile / kLaneValues<T>];
  };

  // sums (or 0 without kCarry) + w[0] * g[0] + .. into y with kLast, else into sums.
  template <int kTerms, bool kCarry, bool kLast>
  static STITCHVM_INLINE void add_group(const T* const (&rows)[kGroup], const A (&weights)[kGroup], Sums* sums, T* y,
                                        int64_t channels) {
    struct Terms {
      const T* g[kTerms];
      A w[kTerms];
    } s;
    for (int t = 0; t < kTerms; ++t) s.g[t] = rows[t];
    for (int t = 0; t < kTerms; ++t) s.w[t] = weights[t];
    for_channels<T>(channels, [=](int64_t c, auto width) STITCHVM_LAMBDA {
      constexpr int kValues = decltype(width)::value;
      A total[kValues], v[kValues];
      for (int k = 0; k < kValues; ++k) total[k] = kCarry ? sums->of[k][c / kLaneValues<T>] : A(0);
      for (int t = 0; t < kTerms; ++t) {
        load<kValues>(s.g[t] + c, v);
        for (int k = 0; k < kValues; ++k) total[k] += s.w[t] * v[k];
      }
      if constexpr (kLast) {
        store<kValues>(y + c, total);
      } else {
        for (int k = 0; k < kValues; ++k) sums->of[k][c / kLaneValues<T>] = total[k];
      }
    });
  }

  template <bool kCarry>
  static STITCHVM_INLINE void finish(int count, const T* const (&rows)[kGroup], const A (&weights)[kGroup], Sums* sums,
                                     T* y, int64_t channels) {
    if (count == 1) add_group<1, kCarry, true>(rows, weights, sums, y, channels);
    if (count == 2) add_group<2, kCarry, true>(rows, weights, sums, y, channels);
    if (count == 3) add_group<3, kCarry, true>(rows, weights, sums, y, channels);
    if (count == 4) add_group<4, kCarry, true>(rows, weights, sums, y, channels);
  }

  static STITCHVM_INLINE void run(const BackwardParams<T>& b, int64_t begin, int64_t end) {
    const ResampleGradParams<T>& p = b.p;
    const int64_t tokens = static_cast<int64_t>(p.in_h) * p.in_w;
    const int64_t out_tokens = p.prefix_tokens + static_cast<int64_t>(p.out_h) * p.out_w;
    Sums sums;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t sample = t / tokens;
      const int64_t iy = (t - sample * tokens) / p.in_w;
      const int64_t ix = t - sample * tokens - iy * p.in_w;
      const T* grad = p.grad + (sample * out_tokens + p.prefix_tokens) * p.channels;
      T* y = p.grad_x + t * p.channels;
      const int64_t y_begin = b.first_row[iy], y_end = b.first_row[iy + 1];
      const int64_t x_begin = b.first_column[ix], x_end = b.first_column[ix + 1];
      int64_t left = (y_end - y_begin) * (x_end - x_begin);
      if (left == 0) {
        std::memset(y, 0, p.channels * sizeof(T));
        continue;
      }
      const bool one_pass = left <= kGroup;
      const int64_t tile = one_pass ? p.channels : kTile;
      for (int64_t c = 0; c < p.channels; c += tile) {
        const int64_t width = std::min(tile, p.channels - c);
        const T* rows[kGroup];
        A weights[kGroup];
        int count = 0;
        bool carry = false;
        left = (y_end - y_begin) * (x_end - x_begin);
        for (int64_t oy = y_begin; oy < y_end; ++oy) {
          for (int64_t ox = x_begin; ox < x_end; ++ox) {
            rows[count] =
                grad + (static_cast<int64_t>(b.rows[oy].position) * p.out_w + b.columns[ox].position) * p.channels + c;
            weights[count++] = b.rows[oy].weight * b.columns[ox].weight;
            --left;
            if (count == kGroup && left > 0) {
              if (carry) add_group<kGroup, true, false>(rows, weights, &sums, y + c, width);
              if (!carry) add_group<kGroup, false, false>(rows, weights, &sums, y + c, width);
              carry = true;
              count = 0;
            }
          }
        }
        if (carry) finish<true>(count, rows, weights, &sums, y + c, width);
        if (!carry) finish<false>(count, rows, weights, &sums, y + c, width);
      }
    }
  }
};

void resample_tokens_cpu_out(const Tensor& x_in, const std::optional<Tensor>& bias_in,
                             const std::optional<Tensor>& position_in, const std::optional<Tensor>& prefix_in,
                             const std::optional<Tensor>& residual_in, int64_t h, int64_t w, int64_t out_h,
                             int64_t out_w, const Tensor& y) {
  const Grids grids{h, w, out_h, out_w, rows_of(prefix_in)};
  check_resample("resample_tokens", x_in, bias_in, position_in, prefix_in, residual_in, grids, y);
  const Tensor x = torch::stable::contiguous(x_in);
  const auto bias = contiguous(bias_in);
  const auto position = contiguous(position_in);
  const auto prefix = contiguous(prefix_in);
  const auto residual = contiguous(residual_in);
  dispatch_cpu_dtype("resample_tokens", x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    ForwardParams<T> f{resample_params<T>(x, bias, position, prefix, residual, grids, y), nullptr, nullptr};
    const auto rows = axis_taps<Accumulate<T>>(f.p.in_h, f.p.out_h);
    const auto columns = axis_taps<Accumulate<T>>(f.p.in_w, f.p.out_w);
    if (h != out_h || w != out_w) {
      f.rows = rows.data();
      f.columns = columns.data();
    }
    parallel_rows<ResampleKernel<T>>(f, f.p.batch * grids.out_tokens(), f.p.channels);
  });
}

Tensor resample_tokens_cpu(const Tensor& x, const std::optional<Tensor>& bias, const std::optional<Tensor>& position,
                           const std::optional<Tensor>& prefix, const std::optional<Tensor>& residual, int64_t h,
                           int64_t w, int64_t out_h, int64_t out_w) {
  const Grids grids{h, w, out_h, out_w, rows_of(prefix)};
  const Tensor y = empty_tokens("resample_tokens", x, grids, grids.out_tokens());
  resample_tokens_cpu_out(x, bias, position, prefix, residual, h, w, out_h, out_w, y);
  return y;
}

void resample_tokens_input_grad_cpu_out(const Tensor& grad_in, int64_t prefix_tokens, int64_t h, int64_t w,
                                        int64_t out_h, int64_t out_w, const Tensor& grad_x) {
  const Grids grids{h, w, out_h, out_w, prefix_tokens};
  check_resample_grad("resample_tokens_input_grad", grad_in, grids, grad_x);
  const Tensor grad = torch::stable::contiguous(grad_in);
  dispatch_cpu_dtype("resample_tokens_input_grad", grad.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const auto p = resample_grad_params<T>(grad, grids, grad_x);
    const AxisReaders<Accumulate<T>> rows(p.in_h, p.out_h);
    const AxisReaders<Accumulate<T>> columns(p.in_w, p.out_w);
    const BackwardParams<T> b{p, rows.readers.data(), rows.first.data(), columns.readers.data(), columns.first.data()};
    parallel_rows<ResampleGradKernel<T>>(b, p.batch * grids.tokens(), p.channels);
  });
}

Tensor resample_tokens_input_grad_cpu(const Tensor& grad, int64_t prefix_tokens, int64_t h, int64_t w, int64_t out_h,
                                      int64_t out_w) {
  const Grids grids{h, w, out_h, out_w, prefix_tokens};
  const Tensor grad_x = empty_tokens("resample_tokens_input_grad", grad, grids, grids.tokens());
  resample_tokens_input_grad_cpu_out(grad, prefix_tokens, h, w, out_h, out_w, grad_x);
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
