// A link call for the native tests: random tensors, the exact result in double, buffers between guard bands.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <vector>

#include "../cpu/kernels.h"
#include "check.h"

namespace recmas::tests {

using cpu::Form;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Evenly spread, with a standard deviation of `scale`: splitmix64, since a normal distribution took up to a third of
// the sanitized checks' time.
inline std::vector<float> random_values(size_t count, uint64_t seed, float scale = 1.0f) {
  std::vector<float> values(count);
  uint64_t state = seed << 32;
  for (float& value : values) {
    uint64_t bits = state += 0x9e3779b97f4a7c15;
    bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9;
    bits = (bits ^ bits >> 27) * 0x94d049bb133111eb;
    value = static_cast<float>(static_cast<int32_t>(bits >> 32)) * (scale * 1.7320508f / 2147483648.0f);
  }
  return values;
}

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kGuard = 0;
#else
constexpr size_t kGuard = 64;
#endif

// Values rounded to a dtype, as stored in it and in fp32. Rounds toward zero: any value of the dtype will do.
struct Rounded {
  std::vector<float> values;
  std::vector<uint16_t> halves;

  Rounded(const std::vector<float>& given, Dtype dtype) : values(given) {
    for (float& value : values) {
      uint32_t bits;
      if (dtype == Dtype::f16) {  // 10 bits of mantissa; exponents from -14 on, smaller values become 0
        std::memcpy(&bits, &value, sizeof bits);
        const int32_t exponent = static_cast<int32_t>(bits >> 23 & 0xff) - 127 + 15;
        const uint32_t sign = bits >> 16 & 0x8000;
        const bool zero = exponent <= 0;
        halves.push_back(
            static_cast<uint16_t>(zero ? sign : sign | (static_cast<uint32_t>(exponent) << 10) | (bits >> 13 & 0x3ff)));
        bits = zero ? sign << 16 : bits & ~0x1fffu;
        std::memcpy(&value, &bits, sizeof bits);
      } else if (dtype == Dtype::bf16) {
        std::memcpy(&bits, &value, sizeof bits);
        halves.push_back(static_cast<uint16_t>(bits >> 16));
        bits &= 0xffff0000u;
        std::memcpy(&value, &bits, sizeof bits);
      }
    }
  }
  const void* data() const {
    return halves.empty() ? static_cast<const void*>(values.data()) : static_cast<const void*>(halves.data());
  }
  size_t bytes() const { return halves.empty() ? values.size() * 4 : halves.size() * 2; }
};

// `bytes` of NaN (all ones, in every floating type), 64-byte aligned, between two bands checked at the end.
class Guarded {
 public:
  explicit Guarded(size_t bytes) : bytes_(bytes) {
    base_ = static_cast<unsigned char*>(std::aligned_alloc(64, (bytes + 2 * kGuard + 63) / 64 * 64));
    std::memset(base_, kBand, bytes + 2 * kGuard);
    std::memset(base_ + kGuard, 0xff, bytes);
  }
  static Guarded floats(size_t count) { return Guarded(count * sizeof(float)); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() {
    bool touched = false;
    for (size_t i = 0; i < kGuard; ++i) touched |= base_[i] != kBand || base_[kGuard + bytes_ + i] != kBand;
    CHECK(!touched, "a kernel wrote outside a buffer of %zu bytes", bytes_);
    std::free(base_);
  }
  void* get() const { return base_ + kGuard; }
  float* data() const { return reinterpret_cast<float*>(base_ + kGuard); }
  std::vector<float> values() const { return std::vector<float>(data(), data() + bytes_ / sizeof(float)); }

 private:
  static constexpr unsigned char kBand = 0xaa;
  size_t bytes_;
  unsigned char* base_;
};

inline Guarded workspace_of(int64_t bytes) { return Guarded(static_cast<size_t>(bytes)); }

inline double gelu_exact(double x, Gelu kind, double* slope) {
  const double pi = 3.14159265358979323846;
  if (kind == Gelu::erf) {
    const double phi = 0.5 * std::erfc(-x / std::sqrt(2.0));
    *slope = phi + x * std::exp(-0.5 * x * x) / std::sqrt(2.0 * pi);
    return x * phi;
  }
  const double inner = std::sqrt(2.0 / pi) * (x + 0.044715 * x * x * x);
  const double t = std::tanh(inner), rate = std::sqrt(2.0 / pi) * (1.0 + 3.0 * 0.044715 * x * x);
  *slope = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * rate;
  return 0.5 * x * (1.0 + t);
}

inline double largest_error(const std::vector<float>& actual, const std::vector<double>& exact) {
  double error = 0.0, scale = 1e-300;
  for (size_t i = 0; i < exact.size(); ++i) {
    if (!std::isfinite(actual[i])) return std::numeric_limits<double>::infinity();
    error = std::fmax(error, std::fabs(static_cast<double>(actual[i]) - exact[i]));
    scale = std::fmax(scale, std::fabs(exact[i]));
  }
  return error / scale;
}

struct Shape {
  int64_t tokens, in, hidden, out;
  Residual residual;
  bool norms, biases;
};

// Everything one link call needs, in fp32, with its exact result in double.
struct Case {
  Shape s;
  Sgemm* sgemm = nullptr;
  std::vector<float> x, w1, b1, w2, b2, w3, b3, gi, ci, go, co, dy;

  explicit Case(const Shape& shape) : s(shape) {
    const auto count = [](int64_t a, int64_t b) { return static_cast<size_t>(a * b); };
    x = random_values(count(s.tokens, s.in), 1);
    w1 = random_values(count(s.hidden, s.in), 2, 1.0f / std::sqrt(static_cast<float>(s.in)));
    w2 = random_values(count(s.out, s.hidden), 3, 1.0f / std::sqrt(static_cast<float>(s.hidden)));
    w3 = random_values(count(s.out, s.in), 4, 1.0f / std::sqrt(static_cast<float>(s.in)));
    b1 = random_values(count(s.hidden, 1), 5);
    b2 = random_values(count(s.out, 1), 6);
    b3 = random_values(count(s.out, 1), 7);
    gi = random_values(count(s.in, 1), 8);
    ci = random_values(count(s.in, 1), 9);
    go = random_values(count(s.out, 1), 10);
    co = random_values(count(s.out, 1), 11);
    dy = random_values(count(s.tokens, s.out), 12);
  }

  cpu::LinkConfig config(Isa isa, int threads) const {
    return {{s.tokens, s.in, s.hidden, s.out}, s.residual, Gelu::erf, 1e-5f, Dtype::f32, isa, threads, sgemm};
  }

  cpu::LinkWeights weights(Form form = Form::stored) const {
    const auto vector = [](const std::vector<float>& v, bool present) {
      return VectorView{present ? v.data() : nullptr, Dtype::f32};
    };
    const bool linear = s.residual == Residual::linear;
    return {{w1.data(), Dtype::f32, form, nullptr},
            {w2.data(), Dtype::f32, form, nullptr},
            {linear ? w3.data() : nullptr, Dtype::f32, form, nullptr},
            vector(b1, s.biases),
            vector(b2, s.biases),
            vector(b3, s.biases && linear),
            vector(gi, s.norms),
            vector(ci, s.norms && s.biases),
            vector(go, s.norms),
            vector(co, s.norms && s.biases)};
  }

  // y [tokens, out] of the mathematics in double, for the given rows.
  std::vector<double> forward(const std::vector<float>& rows) const {
    std::vector<double> y(static_cast<size_t>(s.tokens * s.out));
    std::vector<double> u(static_cast<size_t>(s.in)), a(static_cast<size_t>(s.hidden)), z(static_cast<size_t>(s.out));
    for (int64_t t = 0; t < s.tokens; ++t) {
      const float* row = rows.data() + t * s.in;
      for (int64_t i = 0; i < s.in; ++i) u[i] = row[i];
      if (s.norms) normalise(u, gi, s.biases ? &ci : nullptr);
      for (int64_t h = 0; h < s.hidden; ++h) {
        double p = s.biases ? b1[h] : 0.0, slope;
        for (int64_t i = 0; i < s.in; ++i) p += u[i] * w1[h * s.in + i];
        a[h] = gelu_exact(p, Gelu::erf, &slope);
      }
      for (int64_t o = 0; o < s.out; ++o) {
        double sum = s.biases ? b2[o] : 0.0;
        for (int64_t h = 0; h < s.hidden; ++h) sum += a[h] * w2[o * s.hidden + h];
        if (s.residual == Residual::identity) sum += row[o];
        if (s.residual == Residual::linear) {
          sum += s.biases ? b3[o] : 0.0;
          for (int64_t i = 0; i < s.in; ++i) sum += static_cast<double>(row[i]) * w3[o * s.in + i];
        }
        z[o] = sum;
      }
      if (s.norms) normalise(z, go, s.biases ? &co : nullptr);
      for (int64_t o = 0; o < s.out; ++o) y[t * s.out + o] = z[o];
    }
    return y;
  }

  static void normalise(std::vector<double>& v, const std::vector<float>& gain, const std::vector<float>* bias) {
    double mean = 0.0, squares = 0.0;
    for (const double value : v) mean += value / static_cast<double>(v.size());
    for (const double value : v) squares += (value - mean) * (value - mean) / static_cast<double>(v.size());
    for (size_t i = 0; i < v.size(); ++i) {
      v[i] = (v[i] - mean) / std::sqrt(squares + 1e-5) * gain[i] + (bias ? (*bias)[i] : 0.0f);
    }
  }
};

// What a forward pass keeps for the backward one.
struct Kept {
  std::vector<float> pre, z, stats;
};

inline std::vector<float> run_forward(const Case& c, const cpu::LinkWeights& weights, Isa isa, int threads,
                                      Kept* kept = nullptr) {
  const size_t tokens = static_cast<size_t>(c.s.tokens), outs = tokens * static_cast<size_t>(c.s.out);
  const Guarded y = Guarded::floats(outs);
  const Guarded kept_pre = Guarded::floats(tokens * static_cast<size_t>(c.s.hidden));
  const Guarded kept_z = Guarded::floats(outs), kept_stats = Guarded::floats(4 * tokens);
  cpu::LinkForward call{};
  call.config = c.config(isa, threads);
  call.weights = weights;
  call.x = {c.x.data(), c.s.in, Dtype::f32};
  call.y = {y.data(), Dtype::f32};
  if (kept != nullptr) {
    call.pre = {kept_pre.data(), Dtype::f32};
    call.z = {c.s.norms ? kept_z.data() : nullptr, Dtype::f32};
    call.stats = kept_stats.data();
  }
  const int64_t bytes = cpu::link_forward_workspace(call);
  CHECK(bytes > 0, "workspace %lld", static_cast<long long>(bytes));
  const Guarded workspace = workspace_of(bytes);
  CHECK(cpu::link_forward(call, workspace.get(), bytes - 1) == Status::workspace_too_small, "short workspace taken");
  const Status status = cpu::link_forward(call, workspace.get(), bytes);
  CHECK(status == Status::ok, "link_forward status %d", static_cast<int>(status));
  if (kept != nullptr) *kept = {kept_pre.values(), kept_z.values(), kept_stats.values()};
  return y.values();
}

struct Gradients {
  std::vector<float> dx, dw1, db1, dw2, db2, dw3, db3, dgi, dci, dgo, dco;
};

inline Gradients run_backward(const Case& c, const cpu::LinkWeights& weights, const Kept& kept, Isa isa, int threads) {
  Gradients g;
  cpu::LinkBackward call{};
  call.config = c.config(isa, threads);
  call.weights = weights;
  call.dy = {c.dy.data(), c.s.out, Dtype::f32};
  call.x = {c.x.data(), c.s.in, Dtype::f32};
  call.pre = {kept.pre.data(), c.s.hidden, Dtype::f32};
  call.z = {kept.z.data(), c.s.out, Dtype::f32};
  call.stats = kept.stats.data();
  struct Wanted {
    Wanted(std::vector<float>& to, size_t count) : result(&to), kept(count * sizeof(float)) {}
    std::vector<float>* result;
    Guarded kept;
  };
  std::deque<Wanted> wanted;
  const auto want = [&](std::vector<float>& result, size_t count, bool present) {
    if (!present) return Output{nullptr, Dtype::f32};
    wanted.emplace_back(result, count);
    return Output{wanted.back().kept.data(), Dtype::f32};
  };
  call.dx = want(g.dx, c.x.size(), true);
  call.dw1 = want(g.dw1, c.w1.size(), true);
  call.db1 = want(g.db1, c.b1.size(), c.s.biases);
  call.dw2 = want(g.dw2, c.w2.size(), true);
  call.db2 = want(g.db2, c.b2.size(), c.s.biases);
  call.dw3 = want(g.dw3, c.w3.size(), c.s.residual == Residual::linear);
  call.db3 = want(g.db3, c.b3.size(), c.s.residual == Residual::linear && c.s.biases);
  call.dnorm_in_weight = want(g.dgi, c.gi.size(), c.s.norms);
  call.dnorm_in_bias = want(g.dci, c.ci.size(), c.s.norms && c.s.biases);
  call.dnorm_out_weight = want(g.dgo, c.go.size(), c.s.norms);
  call.dnorm_out_bias = want(g.dco, c.co.size(), c.s.norms && c.s.biases);
  const int64_t bytes = cpu::link_backward_workspace(call);
  const Guarded workspace = workspace_of(bytes);
  const Status status = cpu::link_backward(call, workspace.get(), bytes);
  CHECK(status == Status::ok, "link_backward status %d", static_cast<int>(status));
  for (const Wanted& w : wanted) *w.result = w.kept.values();
  return g;
}

}  // namespace recmas::tests
