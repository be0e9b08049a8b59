// qk_norm, from the chunks of two projections to the joint layout, and its gradient, against plain loops in double.
#include "driver.h"
// after driver.h, which gives the kernels the CUDA language
#include "../cuda/qk_norm.cuh"

using namespace stitchvm;
using namespace stitchvm::emulator;

namespace {

struct Shape {
  int64_t batch, tokens, context_tokens, heads, dim;

  int64_t joint_tokens() const { return tokens + context_tokens; }
  int64_t channels() const { return heads * dim; }
  int64_t joint_size() const { return batch * joint_tokens() * channels(); }
};

// One of q, k and v: what it is computed from and into, and the gradients.
template <class T>
struct Stream {
  int chunk;  // of the projections
  const Buffer<T>* weight;
  const Buffer<T>* context_weight;
  Buffer<T> joint, grad, grad_image, grad_context;
  Buffer<float> rstd;

  Stream(const Shape& s, int number, const Buffer<T>* w, const Buffer<T>* context_w, int offset)
      : chunk(number),
        weight(w),
        context_weight(context_w),
        joint(s.joint_size(), offset),
        grad(s.joint_size(), offset),
        grad_image(s.batch * s.tokens * s.channels(), offset),
        grad_context(s.batch * s.context_tokens * s.channels(), offset),
        rstd(s.batch * s.joint_tokens() * s.heads) {}
};

// A head of the joint sequence in double.
struct Head {
  std::vector<double> normalised, weight, result, grad;
  double rstd = 1.0;
};

template <class T, int kVec>
void test(const Shape& s, bool context_first, bool rotary, bool all_weights, int offset) {
  const int64_t channels = s.channels(), joint_tokens = s.joint_tokens();
  const double eps = 1e-3;
  // q, k and v are chunks of these.
  const Buffer<T> image(s.batch * s.tokens * 3 * channels, offset);
  const Buffer<T> context(s.batch * s.context_tokens * 3 * channels, offset);
  const Buffer<T> w(s.dim, offset, 4.0), w2(s.dim, offset, 4.0), w3(s.dim, offset, 4.0), w4(s.dim, offset, 4.0);
  Buffer<float> cos(joint_tokens * s.dim), sin(joint_tokens * s.dim);
  for (int64_t i = 0; i < cos.size(); ++i) {  // the channels of a pair have their own cosine and sine
    const double angle = i / 2 + 0.3 * (i % 2);
    cos.data()[i] = static_cast<float>(std::cos(angle));
    sin.data()[i] = static_cast<float>(std::sin(angle));
  }
  // Without all weights, the image tokens of q and the context tokens of k are not normalised.
  Stream<T> q(s, 0, all_weights ? &w : nullptr, &w2, offset);
  Stream<T> k(s, 1, &w3, all_weights ? &w4 : nullptr, offset);
  Stream<T> v(s, 2, nullptr, nullptr, offset);

  const auto head = [&](const Stream<T>& t, int64_t b, int64_t token, int64_t h) {
    const int64_t first = context_first ? s.context_tokens : s.tokens;
    const bool of_context = (token < first) == context_first;
    const int64_t source = b * (of_context ? s.context_tokens : s.tokens) + (token < first ? token : token - first);
    const Buffer<T>* weight = of_context ? t.context_weight : t.weight;
    const bool rotates = rotary && t.chunk < 2;
    const auto rotated = [&](const std::vector<double>& x, int64_t c, double sign) {
      // the other channel's sine for the transpose
      const int64_t other = c ^ 1, at = token * s.dim;
      if (!rotates) return x[c];
      return x[c] * cos[at + c] + (c % 2 == 0 ? -sign : sign) * x[other] * sin[at + (sign > 0 ? c : other)];
    };
    Head out;
    double square = 0.0;
    for (int64_t c = 0; c < s.dim; ++c) {
      const int64_t at = source * 3 * channels + t.chunk * channels + h * s.dim + c;
      out.normalised.push_back(of_context ? context[at] : image[at]);
      out.weight.push_back(weight == nullptr ? 1.0 : (*weight)[c]);
      square += out.normalised[c] * out.normalised[c];
    }
    if (weight != nullptr) out.rstd = 1.0 / std::sqrt(square / s.dim + eps);
    std::vector<double> weighted, grad;
    for (int64_t c = 0; c < s.dim; ++c) {
      out.normalised[c] *= out.rstd;
      weighted.push_back(out.normalised[c] * out.weight[c]);
      grad.push_back(t.grad[((b * s.heads + h) * joint_tokens + token) * s.dim + c]);
    }
    double mean = 0.0;
    std::vector<double> grad_normalised;
    for (int64_t c = 0; c < s.dim; ++c) {
      out.result.push_back(rotated(weighted, c, 1.0));
      grad_normalised.push_back(rotated(grad, c, -1.0) * out.weight[c]);
      if (weight != nullptr) mean += grad_normalised[c] * out.normalised[c] / s.dim;
    }
    for (int64_t c = 0; c < s.dim; ++c) out.grad.push_back(out.rstd * (grad_normalised[c] - out.normalised[c] * mean));
    return out;
  };
  const auto data = [](const Buffer<T>* buffer) { return buffer == nullptr ? nullptr : buffer->data(); };

  const auto stream = [&](Stream<T>& t) {
    const int64_t at = t.chunk * channels, stride = 3 * channels;
    return QkStream<T, float>{{image.data() + at, s.tokens * stride, stride},
                              {context.data() + at, s.context_tokens * stride, stride},
                              data(t.weight),
                              data(t.context_weight),
                              t.joint.data(),
                              t.chunk < 2 ? t.rstd.data() : nullptr,
                              s.tokens,
                              s.context_tokens};
  };
  const float* cosines = rotary ? cos.data() : nullptr;
  const float* sines = rotary ? sin.data() : nullptr;
  unsigned lanes = 1;
  while (lanes < 32 && lanes * kQkUnit<kVec> < s.dim) lanes *= 2;
  const dim3 block(lanes, kQkThreads / lanes);
  const auto blocks = [&](int streams) { return dim3(static_cast<unsigned>(streams * s.batch * joint_tokens)); };
  const QkNormParams<T, float> p = {stream(q), stream(k), stream(v), cosines,       sines,
                                    s.batch,   s.heads,   s.dim,     context_first, eps};
  launch_checked(qk_norm_forward<T, kVec>, blocks(3), block, p, q.joint, q.rstd, k.joint, k.rstd, v.joint);

  // A gradient is [batch, heads, tokens, dim], as attention returns it.
  const auto grad_stream = [&](Stream<T>& t) {
    return QkGradStream<T, float>{t.grad.data(),       joint_tokens * channels, s.dim,          joint_tokens * s.dim,
                                  t.joint.data(),      t.rstd.data(),           data(t.weight), data(t.context_weight),
                                  t.grad_image.data(), t.grad_context.data(),   s.tokens,       s.context_tokens};
  };
  const QkNormGradParams<T, float> g = {grad_stream(q), grad_stream(k), cosines, sines,
                                        s.batch,        s.heads,        s.dim,   context_first};
  launch_checked(qk_norm_backward<T, kVec>, blocks(2), block, g, q.grad_image, q.grad_context, k.grad_image,
                 k.grad_context);

  for (const Stream<T>* t : {&q, &k, &v}) {
    std::vector<double> joint, rstd, grad_image, grad_context;
    for (int64_t i = 0; i < s.batch * joint_tokens * s.heads; ++i) {
      const int64_t token = i / s.heads % joint_tokens;
      const Head exact = head(*t, i / s.heads / joint_tokens, token, i % s.heads);
      joint.insert(joint.end(), exact.result.begin(), exact.result.end());
      rstd.push_back(exact.rstd);
      const bool in_first = token < (context_first ? s.context_tokens : s.tokens);
      auto& grad = in_first == context_first ? grad_context : grad_image;
      grad.insert(grad.end(), exact.grad.begin(), exact.grad.end());
    }
    expect("qk_norm_forward", t->joint, [&](int64_t i) { return joint[i]; });
    if (t == &v) continue;
    expect("qk_norm_forward, rstd", t->rstd, [&](int64_t i) { return rstd[i]; });
    expect("qk_norm_backward", t->grad_image, [&](int64_t i) { return grad_image[i]; });
    expect("qk_norm_backward, context", t->grad_context, [&](int64_t i) { return grad_context[i]; });
  }
}

}  // namespace

int main() {
  return report([] {
    for_each_type([](auto type, auto vec) {
      using T = decltype(type);
      constexpr int kVec = decltype(vec)::value;
      for (const bool context_first : {false, true}) {
        for (const bool rotary : {false, true}) {
          test<T, kVec>({2, 3, 2, 3, 64}, context_first, rotary, true, 0);
          test<T, kVec>({1, 2, 1, 5, 264}, context_first, rotary, false, 0);
        }
      }
      test<T, kVec>({2, 2, 0, 17, 8}, false, true, true, 0);
      if constexpr (kVec == 1) test<T, kVec>({1, 2, 3, 70, 5}, true, false, true, 1);
      if constexpr (kVec == 1) test<T, kVec>({2, 1, 2, 3, 14}, false, true, false, 1);
    });
  });
}
