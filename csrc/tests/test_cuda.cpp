// The few-token CUDA kernels without a GPU: their bodies run whole, thread by thread, on the host, for many sizes,
// dtypes, alignments and kinds of link, against double precision. Every weight must be read exactly once, every output
// written exactly once, nothing outside the buffers (under RECMAS_SANITIZE), nothing before it is there.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "../cuda/link_product.h"
#include "../cuda/link_rows.h"
#include "check.h"
#include "emulated_block.h"

namespace {

using namespace recmas;
using namespace recmas::cuda;

struct Free {
  void operator()(char* data) const { std::free(data); }
};

// Elements of any dtype, `shift` elements past a 16-byte boundary and ending where the allocation ends.
class Array {
 public:
  Array(int64_t count, Dtype dtype, int64_t shift = 0) : dtype_(dtype), count_(count) {
    const int64_t bytes = dtype_bytes(dtype), offset = shift * bytes % 16;
    memory_.reset(static_cast<char*>(std::malloc(static_cast<size_t>(offset + count * bytes))));  // 16-byte aligned
    data_ = memory_.get() + offset;
    std::memset(data_, 0xff, static_cast<size_t>(count * bytes));
  }
  char* data() const { return data_; }
  int64_t bytes() const { return count_ * dtype_bytes(dtype_); }
  Dtype dtype() const { return dtype_; }
  double at(int64_t i) const { return static_cast<double>(load_number(data_, dtype_, i)); }
  void fill(std::mt19937& generator, double scale, double centre = 0.0) {
    std::normal_distribution<double> normal(centre, scale);
    for (int64_t i = 0; i < count_; ++i) store_number(data_, dtype_, i, static_cast<float>(normal(generator)));
  }

 private:
  Dtype dtype_;
  int64_t count_;
  std::unique_ptr<char, Free> memory_;
  char* data_;
};

struct Kind {
  Residual residual;
  bool norm_in, norm_out, biases;
  Gelu gelu;
};

struct Case {
  LinkShape shape;
  Kind kind;
  Dtype compute, x_dtype, vector_dtype;
  int64_t x_shift, x_gap;  // elements off alignment; between the rows of x
  Overlap overlap;
  bool training;
  unsigned seed;
};

double gelu_exact(double x, Gelu kind) {
  if (kind == Gelu::erf) return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
  return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
}

struct Exact {
  std::vector<double> y, pre, z;
};

class Link {
 public:
  explicit Link(const Case& of)
      : c(of),
        x(c.shape.tokens * (c.shape.in_features + c.x_gap), c.x_dtype, c.x_shift),
        w1(c.shape.hidden_features * c.shape.in_features, c.compute),
        w2(c.shape.out_features * c.shape.hidden_features, c.compute),
        w3(c.shape.out_features * c.shape.in_features, c.compute),
        y(c.shape.tokens * c.shape.out_features, c.x_dtype),
        pre(c.shape.tokens * c.shape.hidden_features, c.compute),
        z(c.shape.tokens * c.shape.out_features, c.compute),
        stats(4 * c.shape.tokens, Dtype::f32) {
    std::mt19937 generator(c.seed);
    x.fill(generator, 1.0, 0.3);
    w1.fill(generator, 1.0 / std::sqrt(static_cast<double>(c.shape.in_features)));
    w2.fill(generator, 1.0 / std::sqrt(static_cast<double>(c.shape.hidden_features)));
    w3.fill(generator, 1.0 / std::sqrt(static_cast<double>(c.shape.in_features)));
    const int64_t widths[7] = {c.shape.hidden_features, c.shape.out_features, c.shape.out_features, c.shape.in_features,
                               c.shape.in_features,     c.shape.out_features, c.shape.out_features};
    for (int i = 0; i < 7; ++i) {
      vectors.emplace_back(widths[i], c.vector_dtype, 1);
      vectors.back().fill(generator, 0.3, i == 3 || i == 5 ? 1.0 : 0.0);
    }
  }

  LinkForward call() {
    const auto vector = [this](int i, bool present) {
      return present ? VectorView{vectors[static_cast<size_t>(i)].data(), c.vector_dtype} : VectorView{};
    };
    const Kind& k = c.kind;
    const bool linear = k.residual == Residual::linear;
    LinkForward call{};
    call.shape = c.shape;
    call.residual = k.residual;
    call.gelu = k.gelu;
    call.eps = 1e-5f;
    call.compute = c.compute;
    call.w1 = w1.data();
    call.w2 = w2.data();
    call.w3 = linear ? w3.data() : nullptr;
    call.b1 = vector(0, k.biases);
    call.b2 = vector(1, k.biases);
    call.b3 = vector(2, k.biases && linear);
    call.norm_in_weight = vector(3, k.norm_in);
    call.norm_in_bias = vector(4, k.norm_in && k.biases);
    call.norm_out_weight = vector(5, k.norm_out);
    call.norm_out_bias = vector(6, k.norm_out && k.biases);
    call.x = {x.data(), c.shape.in_features + c.x_gap, c.x_dtype};
    call.y = {y.data(), c.x_dtype};
    if (c.training) {
      call.pre = {pre.data(), c.compute};
      if (k.norm_out) call.z = {z.data(), c.compute};
      call.stats = reinterpret_cast<float*>(stats.data());
    }
    return call;
  }

  // y in double; with `narrow` as eager torch computes: every intermediate rounded to the compute dtype, products
  // summed in fp32, eight sums side by side.
  Exact expected(bool narrow) const {
    const auto rounded = [&](double value) {
      return narrow ? static_cast<double>(round_to(c.compute, static_cast<float>(value))) : value;
    };
    const auto norm = [&](std::vector<double>& row, const Array& gain, const Array& bias) {
      double mean = 0.0, squares = 0.0;
      const auto width = static_cast<double>(row.size());
      for (const double value : row) mean += value / width;
      for (const double value : row) squares += (value - mean) * (value - mean) / width;
      for (size_t i = 0; i < row.size(); ++i) {
        const auto at = static_cast<int64_t>(i);
        row[i] =
            rounded((row[i] - mean) / std::sqrt(squares + 1e-5) * gain.at(at) + (c.kind.biases ? bias.at(at) : 0.0));
      }
    };
    const auto product = [&](const std::vector<double>& row, const Array& weight, int64_t rows, const Array& bias) {
      std::vector<double> out(static_cast<size_t>(rows));
      for (int64_t r = 0; r < rows; ++r) {
        double sum = c.kind.biases ? bias.at(r) : 0.0;
        float sums[8] = {};
        for (size_t k = 0; k < row.size(); ++k) {
          const double term = row[k] * weight.at(r * static_cast<int64_t>(row.size()) + static_cast<int64_t>(k));
          if (narrow) {
            sums[k % 8] += static_cast<float>(term);
          } else {
            sum += term;
          }
        }
        for (const float part : sums) sum += static_cast<double>(part);
        out[static_cast<size_t>(r)] = rounded(sum);
      }
      return out;
    };
    Exact result;
    for (int64_t t = 0; t < c.shape.tokens; ++t) {
      std::vector<double> raw;
      for (int64_t i = 0; i < c.shape.in_features; ++i) {
        const double value = x.at(t * (c.shape.in_features + c.x_gap) + i);
        raw.push_back(static_cast<double>(round_to(c.compute, static_cast<float>(value))));
      }
      std::vector<double> u = raw;
      if (c.kind.norm_in) norm(u, vectors[3], vectors[4]);
      std::vector<double> a = product(u, w1, c.shape.hidden_features, vectors[0]);
      result.pre.insert(result.pre.end(), a.begin(), a.end());
      for (double& value : a) value = rounded(gelu_exact(value, c.kind.gelu));
      std::vector<double> z = product(a, w2, c.shape.out_features, vectors[1]);
      if (c.kind.residual != Residual::none) {
        const bool linear = c.kind.residual == Residual::linear;
        const std::vector<double> r = linear ? product(raw, w3, c.shape.out_features, vectors[2]) : raw;
        for (size_t i = 0; i < z.size(); ++i) z[i] = rounded(z[i] + r[i]);
      }
      result.z.insert(result.z.end(), z.begin(), z.end());
      if (c.kind.norm_out) norm(z, vectors[5], vectors[6]);
      result.y.insert(result.y.end(), z.begin(), z.end());
    }
    return result;
  }

  Case c;
  Array x, w1, w2, w3;
  std::vector<Array> vectors;
  Array y, pre, z, stats;
};

void emulate(const Rows& rows, Observer& observer) {
  for (int64_t block = 0; block < rows.tokens; ++block) {
    with_rows_types(rows, [&](auto source, auto parameter, auto target, auto whole) {
      EmulatedBlock(block, kThreads, kWarps * 4, observer).run([&](EmulatedThread& thread) {
        run_rows<decltype(source), decltype(parameter), decltype(target), decltype(whole)::value>(thread, rows);
      });
    });
  }
}

void emulate(const Product& product, Observer& observer) {
  for (int64_t block = 0; block < blocks_of(product); ++block) {
    with_product_types(product, [&](auto element, auto groups) {
      EmulatedBlock(block, kThreads, shared_bytes(product), observer).run([&](EmulatedThread& thread) {
        run_product<decltype(element), decltype(groups)::value>(thread, product);
      });
    });
  }
}

double relative_error(const std::vector<double>& actual, const std::vector<double>& truth) {
  double error = 0.0, scale = 1e-300;
  for (size_t i = 0; i < truth.size(); ++i) {
    error = std::max(error, std::isfinite(actual[i]) ? std::fabs(actual[i] - truth[i]) : HUGE_VAL);
    scale = std::max(scale, std::fabs(truth[i]));
  }
  return error / scale;
}

// Means and reciprocal deviations of the rows that were normalised; nothing else is written.
void check_stats(const Link& link, const Exact& truth, const char* name) {
  const Case& c = link.c;
  const bool present[2] = {c.kind.norm_in, c.kind.norm_out};
  const int64_t widths[2] = {c.shape.in_features, c.shape.out_features};
  const double slack = c.compute == Dtype::f32 ? 1e-5 : 0.05;  // z differs by the rounding of what came before
  for (int64_t t = 0; t < c.shape.tokens; ++t) {
    for (int side = 0; side < 2; ++side) {
      const double mean = link.stats.at(2 * side * c.shape.tokens + t);
      const double rstd = link.stats.at((2 * side + 1) * c.shape.tokens + t);
      if (!present[side]) {
        CHECK(std::isnan(mean) && std::isnan(rstd), "%s: statistics of no norm", name);
        continue;
      }
      double exact_mean = 0.0, squares = 0.0;
      const auto value = [&](int64_t i) {
        return side == 1 ? truth.z[static_cast<size_t>(t * widths[1] + i)]
                         : static_cast<double>(round_to(
                               c.compute, static_cast<float>(link.x.at(t * (c.shape.in_features + c.x_gap) + i))));
      };
      for (int64_t i = 0; i < widths[side]; ++i) exact_mean += value(i) / static_cast<double>(widths[side]);
      for (int64_t i = 0; i < widths[side]; ++i) {
        squares += (value(i) - exact_mean) * (value(i) - exact_mean) / static_cast<double>(widths[side]);
      }
      const double exact_rstd = 1.0 / std::sqrt(squares + 1e-5);
      CHECK(std::fabs(mean - exact_mean) <= slack * std::fmax(1.0, std::fabs(exact_mean)), "%s: mean", name);
      // Of nearly constant rows the deviation is all rounding.
      if (squares > 0.01)
        CHECK(std::fabs(rstd - exact_rstd) <= 4 * slack * exact_rstd, "%s: rstd %g %g", name, rstd, exact_rstd);
    }
  }
}

void check(const Case& c) {
  Link link(c);
  const LinkForward call = link.call();
  Array workspace(link_workspace(call).bytes / 2, Dtype::f16);
  const LinkPlan plan = plan_link(call, workspace.data(), c.overlap);

  Observer observer;
  observer.order.seed(c.seed);
  for (const Array* weight : {&link.w1, &link.w2, &link.w3})
    observer.read_once.emplace_back(weight->data(), weight->bytes());
  observer.written_once.emplace_back(link.y.data(), link.y.bytes());
  observer.unfinished_begin = workspace.data();
  observer.unfinished_end = workspace.data() + workspace.bytes();
  const auto launch = [&](const auto& kernel) {
    observer.unfinished_end = kernel.overlaps ? workspace.data() + workspace.bytes() : workspace.data();
    emulate(kernel, observer);
  };
  if (plan.prepares) launch(plan.prepare);
  launch(plan.first);
  launch(plan.second);
  if (plan.normalises) launch(plan.normalise);

  char name[200];
  std::snprintf(
      name, sizeof name, "%d x %d -> %d -> %d, residual %d norms %d%d biases %d gelu %d dtype %d of x %d shift %d",
      static_cast<int>(c.shape.tokens), static_cast<int>(c.shape.in_features),
      static_cast<int>(c.shape.hidden_features), static_cast<int>(c.shape.out_features),
      static_cast<int>(c.kind.residual), c.kind.norm_in, c.kind.norm_out, c.kind.biases, static_cast<int>(c.kind.gelu),
      static_cast<int>(c.compute), static_cast<int>(c.x_dtype), static_cast<int>(c.x_shift));
  CHECK(observer.read_once[0].all(1) && observer.read_once[1].all(1), "%s: a weight is not read exactly once", name);
  CHECK(observer.read_once[2].all(c.kind.residual == Residual::linear), "%s: w3 is not read exactly once", name);
  CHECK(observer.written_once[0].all(1), "%s: an output is not written exactly once", name);
  const Exact truth = link.expected(false), eager = link.expected(true);
  const auto compare = [&](const char* what, const Array& array, const std::vector<double>& exact,
                           const std::vector<double>& rounded) {
    std::vector<double> actual;
    for (size_t i = 0; i < exact.size(); ++i) actual.push_back(array.at(static_cast<int64_t>(i)));
    const double eps = std::ldexp(1.0, c.compute == Dtype::f32 ? -23 : c.compute == Dtype::bf16 ? -7 : -10);
    const double budget = 2.0 * relative_error(rounded, exact) + eps, error = relative_error(actual, exact);
    CHECK(error <= budget, "%s: error of %s %.3g, budget %.3g", name, what, error, budget);
  };
  compare("y", link.y, truth.y, eager.y);
  if (!c.training) return;
  compare("pre", link.pre, truth.pre, eager.pre);
  if (c.kind.norm_out) compare("z", link.z, truth.z, eager.z);
  check_stats(link, truth, name);
}

void test_numbers() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const F16 narrow{static_cast<uint16_t>(bits)};
    const Bf16 brain{static_cast<uint16_t>(bits)};
    const float value = to_float(narrow);
    if (std::isnan(value)) {
      CHECK(std::isnan(to_float(from_float<F16>(value))), "f16 %04x: NaN is lost", bits);
    } else {
      CHECK(from_float<F16>(value).bits == bits, "f16 %04x does not survive", bits);
      const float next = to_float(F16{static_cast<uint16_t>(bits + 1)});
      if ((bits & 0x7fff) < 0x7bff) {  // halfway goes to the even one
        const F16 middle = from_float<F16>(0.5f * (value + next));
        CHECK(middle.bits == bits + (bits & 1), "f16 %04x: the middle rounds to %04x", bits, middle.bits);
      }
    }
    if (!std::isnan(to_float(brain))) CHECK(from_float<Bf16>(to_float(brain)).bits == bits, "bf16 %04x", bits);
  }
  CHECK(to_float(F16{0x3c01}) == 1.0f + 0x1p-10f && to_float(F16{0x0001}) == 0x1p-24f, "f16 values");
  CHECK(from_float<F16>(65520.0f).bits == 0x7c00 && from_float<F16>(65519.0f).bits == 0x7bff, "f16 overflow");
  CHECK(from_float<Bf16>(1.0f + 0x1p-8f).bits == 0x3f80 && from_float<Bf16>(1.0f + 0x1.8p-7f).bits == 0x3f82,
        "bf16 ties");
}

const Kind kKinds[] = {
    {Residual::identity, true, true, true, Gelu::erf},    {Residual::linear, true, true, true, Gelu::erf},
    {Residual::identity, false, false, false, Gelu::erf}, {Residual::linear, false, false, true, Gelu::tanh},
    {Residual::none, true, false, true, Gelu::tanh},      {Residual::none, false, true, false, Gelu::erf},
    {Residual::linear, true, false, false, Gelu::erf},    {Residual::linear, false, true, true, Gelu::erf},
};

// Corners by hand: whole tiles, one step, exactly the ring, more than the ring, one of everything.
void test_chosen() {
  const int64_t kTokens[] = {1, 7, 8, 9, 17, 32};
  unsigned seed = 1;
  for (const Dtype dtype : {Dtype::bf16, Dtype::f16, Dtype::f32}) {
    for (int k = 0; k < 8; ++k) {
      const Kind& kind = kKinds[k];
      const int64_t out = kind.residual == Residual::identity ? 40 : 23;
      for (int i = 0; i < 3; ++i) {  // every kind with three of them, every three with other kinds
        const int64_t tokens = kTokens[(k + 2 * i) % 6];
        check({{tokens, 40, 48, out}, kind, dtype, dtype, dtype, 0, 0, usual_overlap, seed % 2 == 0, ++seed});
      }
    }
    check({{1, 8, 8, 8}, kKinds[0], dtype, Dtype::f32, Dtype::f32, 0, 0, usual_overlap, seed % 2 == 0, ++seed});
    check({{5, 256, 512, 16}, kKinds[1], dtype, dtype, dtype, 0, 0, usual_overlap, seed % 2 == 0, ++seed});
    // With 8 stages of 256 or 128 elements: one more than the ring holds, in W1 and across W2 and W3.
    check({{2, 2304, 16, 24}, kKinds[1], dtype, dtype, dtype, 0, 0, usual_overlap, seed % 2 == 0, ++seed});
    check({{19, 1288, 24, 16}, kKinds[3], dtype, dtype, dtype, 0, 0, Overlap::off, seed % 2 == 0, ++seed});
  }
  // Rows that a block of link_rows does not hold at once, on either side.
  check({{2, 4104, 8, 24}, kKinds[1], Dtype::bf16, Dtype::bf16, Dtype::bf16, 0, 0, usual_overlap, true, ++seed});
  check({{1, 8, 8, 8200}, kKinds[5], Dtype::f16, Dtype::f16, Dtype::f32, 0, 0, usual_overlap, true, ++seed});
}

// What is refused: rows of weights that are not whole pieces, and weights that begin beside them.
void test_refused() {
  Case c{{2, 40, 48, 40}, kKinds[0], Dtype::bf16, Dtype::bf16, Dtype::bf16, 0, 0, usual_overlap, false, 1};
  CHECK(whole_pieces(Link(c).call()), "whole pieces are refused");
  for (const LinkShape& shape : {LinkShape{2, 41, 48, 41}, LinkShape{2, 40, 47, 40}}) {
    c.shape = shape;
    CHECK(!whole_pieces(Link(c).call()), "half a piece is served");
  }
  c.shape = {2, 40, 48, 40};
  Link link(c);
  LinkForward call = link.call();
  call.w2 = link.w2.data() + 2;
  CHECK(!whole_pieces(call), "weights off alignment are served");
  call = link.call();
  CHECK(has_kernels(call), "one dtype is refused");
  call.norm_out_bias.dtype = Dtype::f32;
  CHECK(!has_kernels(call), "a norm of two dtypes is served");
  call = link.call();
  call.compute = Dtype::f16;
  CHECK(!has_kernels(call), "bf16 rows are served in fp16");
}

// Every launch but the first may start early, and lets the next start when it was asked to.
void test_launches() {
  Link link({{2, 40, 48, 40}, kKinds[0], Dtype::bf16, Dtype::bf16, Dtype::bf16, 0, 0, usual_overlap, false, 1});
  const LinkForward call = link.call();
  std::vector<char> workspace(static_cast<size_t>(link_workspace(call).bytes));
  for (const Overlap wanted : {Overlap::off, Overlap::late, Overlap::early}) {
    const bool overlaps = wanted != Overlap::off, late = wanted == Overlap::late;
    const LinkPlan plan = plan_link(call, workspace.data(), wanted);
    CHECK(plan.prepares && plan.normalises, "norms on both sides are four launches");
    CHECK(!plan.prepare.overlaps && plan.prepare.starts_late == late, "the rows before, overlap %d", int(wanted));
    CHECK(plan.first.overlaps == overlaps && plan.first.starts_late == late, "first product, overlap %d", int(wanted));
    CHECK(plan.second.overlaps == overlaps && plan.second.starts_late == late, "second product, overlap %d",
          int(wanted));
    CHECK(plan.normalise.overlaps == overlaps && plan.normalise.starts_late == late, "the rows after, overlap %d",
          int(wanted));
  }
}

void test_random(int count) {
  std::mt19937 generator(2);
  const auto pick = [&generator](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(generator);
  };
  const Dtype dtypes[] = {Dtype::f32, Dtype::bf16, Dtype::f16};
  for (int i = 0; i < count; ++i) {
    Case c{};
    c.kind = kKinds[pick(0, 7)];
    c.compute = dtypes[pick(0, 2)];
    const int64_t unit = kPiece / dtype_bytes(c.compute);
    const auto width = [&] { return pick(1, 300 / unit) * unit; };
    c.shape = {pick(1, 32), width(), width(), pick(1, 300)};
    if (c.kind.residual == Residual::identity) c.shape.out_features = c.shape.in_features;
    c.x_dtype = pick(0, 3) == 0 ? Dtype::f32 : c.compute;
    c.vector_dtype = c.x_dtype != c.compute || pick(0, 3) == 0 ? Dtype::f32 : c.compute;
    c.x_shift = pick(0, 3) == 0 ? pick(0, 7) : 0;
    c.x_gap = pick(0, 2) == 0 ? pick(0, 9) : 0;
    c.overlap = static_cast<Overlap>(pick(0, 2));
    c.training = pick(0, 3) == 0;
    c.seed = static_cast<unsigned>(i + 1000);
    check(c);
  }
}

}  // namespace

int main(int argc, char** argv) {
  test_numbers();
  test_chosen();
  test_refused();
  test_launches();
  test_random(argc > 1 ? std::atoi(argv[1]) : 60);
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
