// Native checks of the CPU kernels, for every instruction set this processor has, against plain double precision.
// Outputs and workspaces start as NaN, so that a value nothing wrote shows, and lie between guard bands that no kernel
// may touch. Under RECMAS_SANITIZE every buffer has its exact size instead, and AddressSanitizer sees stray reads, too.
#include <algorithm>

#include "layer_case.h"

namespace {

using namespace recmas;
using namespace recmas::tests;

const cpu::Kernels* kernels_of([[maybe_unused]] Isa isa) {
#ifdef RECMAS_X86
  if (isa == Isa::avx2) return &cpu::kernels_avx2;
  if (isa == Isa::avx512) return &cpu::kernels_avx512;
  if (isa == Isa::avx512_bf16) return &cpu::kernels_avx512_bf16;
#endif
#ifdef RECMAS_AMX
  if (isa == Isa::amx) return &cpu::kernels_amx;
#endif
  return &cpu::kernels_baseline;
}

void test_gelu(Isa isa, Gelu kind) {
  std::vector<float> x;
  for (double at = -12.0; at <= 12.0; at += 1.0 / 1024) x.push_back(static_cast<float>(at));
  for (const float at : {-1e30f, -1e10f, -100.0f, -1e-30f, 0.0f, 1e-30f, 100.0f, 1e10f, 1e15f}) x.push_back(at);
  std::vector<float> value(x.size(), kNan), slope(x.size(), kNan);
  kernels_of(isa)->gelu(x.data(), static_cast<int64_t>(x.size()), kind, value.data(), slope.data());
  const double unit = std::ldexp(1.0, -24);
  for (size_t i = 0; i < x.size(); ++i) {
    double exact_slope;
    const double exact = gelu_exact(static_cast<double>(x[i]), kind, &exact_slope);
    const double bound = 4.0 * unit * std::fmax(1.0, std::fabs(static_cast<double>(x[i])));
    CHECK(std::fabs(value[i] - exact) <= bound, "gelu kind %d isa %d x %g: %.9g, exact %.9g", static_cast<int>(kind),
          static_cast<int>(isa), x[i], value[i], exact);
    CHECK(std::fabs(slope[i] - exact_slope) <= 8.0 * unit, "slope kind %d isa %d x %g: %.9g, exact %.9g",
          static_cast<int>(kind), static_cast<int>(isa), x[i], slope[i], exact_slope);
  }
  const float infinity = std::numeric_limits<float>::infinity();
  const float special[3] = {infinity, -infinity, kNan};
  float special_value[3], special_slope[3];
  kernels_of(isa)->gelu(special, 3, kind, special_value, special_slope);
  CHECK(special_value[0] == infinity, "gelu(inf) = %g", special_value[0]);
  CHECK(std::isnan(special_value[1]) && std::isnan(special_value[2]), "gelu(-inf), gelu(nan) = %g, %g",
        special_value[1], special_value[2]);
}

// fp32 sums of n terms of random sign: about sqrt(n) roundings, and a norm divides by the spread.
double tolerance(const Shape& s) {
  return 16.0 * std::sqrt(static_cast<double>(s.in + s.hidden + 16)) * std::ldexp(1.0, -24);
}

// A direction in which one argument moves, and the slope of the loss dy . y along it, by central differences in double.
struct Direction {
  const char* name;
  std::vector<float> Gradients::* gradient;
  std::vector<float> along;
  double slope;

  Direction(const Case& c, const char* of, std::vector<float> Case::* argument, std::vector<float> Gradients::* its)
      : name(of), gradient(its), along(random_values((c.*argument).size(), 99)) {
    const double step = 1.0 / 512;
    const auto loss = [&](double sign) {
      Case moved = c;
      for (size_t i = 0; i < along.size(); ++i) (moved.*argument)[i] += static_cast<float>(sign * step) * along[i];
      const std::vector<double> y = moved.forward(moved.x);
      double total = 0.0;
      for (size_t i = 0; i < y.size(); ++i) total += y[i] * c.dy[i];
      return total;
    };
    slope = (8.0 * (loss(1) - loss(-1)) - (loss(2) - loss(-2))) / (12.0 * step);
  }

  void check(const Gradients& gradients, const Shape& s, Isa isa) const {
    const std::vector<float>& found = gradients.*gradient;
    double expected = 0.0, scale = 0.0;
    for (size_t i = 0; i < along.size(); ++i) {
      expected += static_cast<double>(found[i]) * along[i];
      scale += std::fabs(static_cast<double>(found[i]) * along[i]);
    }
    // Central differences of order four at this step are good to about 1e-4; a wrong gradient misses by far more.
    CHECK(std::fabs(slope - expected) <= 2e-3 * scale + 1e-3, "%s isa %d (%lld %lld %lld %lld): slope %g, gradient %g",
          name, static_cast<int>(isa), static_cast<long long>(s.tokens), static_cast<long long>(s.in),
          static_cast<long long>(s.hidden), static_cast<long long>(s.out), slope, expected);
  }
};

// A case with what every instruction set must find.
struct Expected {
  Case c;
  std::vector<double> y;
  std::vector<Direction> directions;

  explicit Expected(const Shape& s) : c(s), y(c.forward(c.x)) {
    const auto add = [&](bool present, const char* name, std::vector<float> Case::* argument,
                         std::vector<float> Gradients::* gradient) {
      if (present) directions.emplace_back(c, name, argument, gradient);
    };
    add(true, "dx", &Case::x, &Gradients::dx);
    add(true, "dw1", &Case::w1, &Gradients::dw1);
    add(true, "dw2", &Case::w2, &Gradients::dw2);
    add(s.residual == Residual::linear, "dw3", &Case::w3, &Gradients::dw3);
    add(s.biases, "db1", &Case::b1, &Gradients::db1);
    add(s.biases, "db2", &Case::b2, &Gradients::db2);
    add(s.norms, "dgi", &Case::gi, &Gradients::dgi);
    add(s.norms, "dgo", &Case::go, &Gradients::dgo);
    add(s.norms && s.biases, "dci", &Case::ci, &Gradients::dci);
    add(s.norms && s.biases, "dco", &Case::co, &Gradients::dco);
  }
};

void test_link(Isa isa, const Expected& expected) {
  const Case& c = expected.c;
  const Shape& s = c.s;
  const std::vector<double>& exact = expected.y;
  const std::vector<float> stored = run_forward(c, c.weights(), isa, 3);
  const double error = largest_error(stored, exact);
  CHECK(error <= tolerance(s), "link isa %d (%lld %lld %lld %lld): error %g, bound %g", static_cast<int>(isa),
        static_cast<long long>(s.tokens), static_cast<long long>(s.in), static_cast<long long>(s.hidden),
        static_cast<long long>(s.out), error, tolerance(s));

  const int64_t bytes1 = cpu::packed_bytes(s.hidden, s.in, Dtype::f32, isa);
  const int64_t bytes2 = cpu::packed_bytes(s.out, s.hidden, Dtype::f32, isa);
  const int64_t bytes3 = cpu::packed_bytes(s.out, s.in, Dtype::f32, isa);
  const Guarded packed1 = workspace_of(bytes1), packed2 = workspace_of(bytes2), packed3 = workspace_of(bytes3);
  cpu::LinkWeights packed = c.weights(Form::packed);
  cpu::pack_weight({c.w1.data(), Dtype::f32}, s.hidden, s.in, packed1.get(), Dtype::f32, isa, 2);
  cpu::pack_weight({c.w2.data(), Dtype::f32}, s.out, s.hidden, packed2.get(), Dtype::f32, isa, 2);
  cpu::pack_weight({c.w3.data(), Dtype::f32}, s.out, s.in, packed3.get(), Dtype::f32, isa, 2);
  packed.w1.data = packed1.get();
  packed.w2.data = packed2.get();
  if (packed.w3.data != nullptr) packed.w3.data = packed3.get();
  const std::vector<float> from_panels = run_forward(c, packed, isa, 3);
  const std::vector<float> in_order = run_forward(c, c.weights(Form::stored_panel_order), isa, 1);
  CHECK(std::memcmp(from_panels.data(), in_order.data(), from_panels.size() * sizeof(float)) == 0,
        "isa %d: packed and stored weights give other bits", static_cast<int>(isa));
  CHECK(largest_error(from_panels, exact) <= tolerance(s), "packed isa %d: error %g", static_cast<int>(isa),
        largest_error(from_panels, exact));

  Kept kept;
  run_forward(c, c.weights(), isa, 3, &kept);
  const Gradients g = run_backward(c, c.weights(), kept, isa, 3);
  for (const Direction& direction : expected.directions) direction.check(g, s, isa);
  const Gradients again = run_backward(c, c.weights(), kept, isa, 3);
  CHECK(std::memcmp(g.dw1.data(), again.dw1.data(), g.dw1.size() * sizeof(float)) == 0, "dw1 differs between runs");
}

// A frozen product and its input gradient, exact in double precision.
struct FrozenCase {
  Dtype stored, row_dtype;
  int64_t tokens, in, out;
  Rounded weight, x, dy;
  std::vector<float> bias;
  std::vector<double> y, dx;

  FrozenCase(Dtype weights, Dtype rows, int64_t count, int64_t in_features, int64_t out_features)
      : stored(weights),
        row_dtype(rows),
        tokens(count),
        in(in_features),
        out(out_features),
        weight(random_values(static_cast<size_t>(out * in), 1, 1.0f / std::sqrt(static_cast<float>(in))), stored),
        x(random_values(static_cast<size_t>(tokens * in), 2), rows),
        dy(random_values(static_cast<size_t>(tokens * out), 3), rows),
        bias(random_values(static_cast<size_t>(out), 4)),
        y(static_cast<size_t>(tokens * out)),
        dx(static_cast<size_t>(tokens * in), 0.0) {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t o = 0; o < out; ++o) {
        double sum = bias[o];
        for (int64_t i = 0; i < in; ++i) {
          sum += static_cast<double>(x.values[t * in + i]) * weight.values[o * in + i];
          dx[t * in + i] += static_cast<double>(dy.values[t * out + o]) * weight.values[o * in + i];
        }
        y[t * out + o] = sum;
      }
    }
  }
};

// Both, and the weight back from its panels.
void test_frozen(Isa isa, const FrozenCase& c) {
  const int64_t tokens = c.tokens, in = c.in, out = c.out;
  const Dtype stored = c.stored, rows = c.row_dtype;
  const Rounded &weight = c.weight, &x = c.x, &dy = c.dy;
  const int64_t bytes = cpu::packed_bytes(out, in, stored, isa);
  const Guarded panels = workspace_of(bytes), back = workspace_of(static_cast<int64_t>(weight.bytes()));
  CHECK(cpu::pack_weight({weight.data(), stored}, out, in, panels.get(), stored, isa, 2) == Status::ok, "not packed");
  CHECK(cpu::unpack_weight(panels.get(), out, in, back.get(), stored, isa, 3) == Status::ok, "not unpacked");
  CHECK(std::memcmp(back.get(), weight.data(), weight.bytes()) == 0, "isa %d dtype %d: other bits came back",
        static_cast<int>(isa), static_cast<int>(stored));

  const Guarded y = Guarded::floats(static_cast<size_t>(tokens * out));
  const Guarded dx = Guarded::floats(static_cast<size_t>(tokens * in));
  const cpu::FrozenForward forward{tokens,
                                   in,
                                   out,
                                   {x.data(), in, rows},
                                   panels.get(),
                                   {c.bias.data(), Dtype::f32},
                                   {y.get(), Dtype::f32},
                                   stored,
                                   Form::packed,
                                   isa,
                                   3};
  const cpu::FrozenBackward backward{tokens, in,  out, {dy.data(), out, rows}, panels.get(), {dx.get(), Dtype::f32},
                                     stored, isa, 3};
  const int64_t forward_bytes = cpu::frozen_forward_workspace(forward);
  const int64_t backward_bytes = cpu::frozen_backward_workspace(backward);
  const Guarded scratch = workspace_of(forward_bytes), more = workspace_of(backward_bytes);
  CHECK(cpu::frozen_forward(forward, scratch.get(), forward_bytes) == Status::ok, "frozen_forward failed");
  CHECK(cpu::frozen_backward(backward, more.get(), backward_bytes) == Status::ok, "frozen_backward failed");

  cpu::FrozenForward in_place = forward;
  const Guarded streamed = Guarded::floats(static_cast<size_t>(tokens * out));
  in_place.weight = weight.data();
  in_place.form = Form::stored;
  in_place.y = {streamed.get(), Dtype::f32};
  const int64_t in_place_bytes = cpu::frozen_forward_workspace(in_place);
  CHECK((in_place_bytes < 0) == (tokens > 16), "more rows than can be streamed");
  if (tokens <= 16) {
    const Guarded rows_copied = workspace_of(in_place_bytes);
    CHECK(cpu::frozen_forward(in_place, rows_copied.get(), in_place_bytes) == Status::ok, "not streamed");
  }

  const double bound = 16.0 * std::sqrt(static_cast<double>(in + out + 16)) * std::ldexp(1.0, -24);
  const double y_error = largest_error(y.values(), c.y), dx_error = largest_error(dx.values(), c.dx);
  if (tokens <= 16) {
    const double error = largest_error(streamed.values(), c.y);
    CHECK(error <= bound, "streamed isa %d dtypes %d %d: error %g", static_cast<int>(isa), static_cast<int>(stored),
          static_cast<int>(rows), error);
  }
  CHECK(y_error <= bound && dx_error <= bound, "frozen isa %d dtypes %d %d (%lld %lld %lld): errors %g %g, bound %g",
        static_cast<int>(isa), static_cast<int>(stored), static_cast<int>(rows), static_cast<long long>(tokens),
        static_cast<long long>(in), static_cast<long long>(out), y_error, dx_error, bound);
}

template <class Body>
void each_isa(const Body& body) {
  for (int level = 0; level <= static_cast<int>(cpu::best_isa()); ++level) body(static_cast<Isa>(level));
}

void test_frozen() {
  const auto test = [](Dtype stored, Dtype rows, int64_t tokens, int64_t in, int64_t out) {
    const FrozenCase c(stored, rows, tokens, in, out);
    each_isa([&](Isa isa) { test_frozen(isa, c); });
  };
  for (const Dtype stored : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
    for (const Dtype rows : {Dtype::f32, stored}) {
      for (const int64_t tokens : {int64_t{1}, int64_t{5}, int64_t{9}, int64_t{131}}) {
        test(stored, rows, tokens, 37, 53);
        test(stored, rows, tokens, 96, 17);
      }
      test(stored, rows, 3, 1, 1);
      test(stored, rows, 3, 512, 20);     // rows 2 KB apart
      test(stored, rows, 2, 50, 1950);    // several passes over the out features
      test(stored, rows, 515, 19, 1930);  // and several blocks of rows
      test(stored, rows, 513, 49, 1930);  // the last of them a single row
      test(stored, rows, 33, 6200, 49);   // several passes over the in features
    }
  }
}

void test_refused(Isa isa) {
  float number = 1.0f;
  cpu::FrozenForward call{
      1, 1, 1, {&number, 1, Dtype::f16}, &number, {}, {&number, Dtype::f32}, Dtype::bf16, Form::packed, isa, 1};
  CHECK(cpu::frozen_forward_workspace(call) == -1, "rows of a dtype that the kernel does not read");
  CHECK(cpu::frozen_forward(call, &number, 0) == Status::bad_argument, "rows of a dtype that the kernel does not read");
}

// A row times a weight that no cache holds, as it lies in memory: the bits of products with parts of it.
void test_large(Isa isa) {
  const int64_t in = 8195, out = 1031, part = 500;
  static const std::vector<float> weight = random_values(static_cast<size_t>(out * in), 1);
  const std::vector<float> x = random_values(static_cast<size_t>(in), 2);
  const auto product = [&](int64_t first, int64_t columns) {
    const Guarded y = Guarded::floats(static_cast<size_t>(columns));
    const cpu::FrozenForward call{1,
                                  in,
                                  columns,
                                  {x.data(), in, Dtype::f32},
                                  weight.data() + first * in,
                                  {},
                                  {y.get(), Dtype::f32},
                                  Dtype::f32,
                                  Form::stored,
                                  isa,
                                  2};
    const int64_t bytes = cpu::frozen_forward_workspace(call);
    const Guarded workspace = workspace_of(bytes);
    CHECK(cpu::frozen_forward(call, workspace.get(), bytes) == Status::ok, "a large weight was not streamed");
    return y.values();
  };
  std::vector<float> parts;
  for (int64_t first = 0; first < out; first += part) {
    const std::vector<float> found = product(first, std::min(part, out - first));
    parts.insert(parts.end(), found.begin(), found.end());
  }
  CHECK(product(0, out) == parts, "isa %d: a large weight gives other bits", static_cast<int>(isa));
}

void test_rms_norm(Isa isa) {
  const int64_t rows = 3;
  for (const int64_t columns : {int64_t{1}, int64_t{37}, int64_t{64}, int64_t{200}}) {
    const size_t count = static_cast<size_t>(rows * columns);
    const std::vector<float> x = random_values(count, 1), gain = random_values(static_cast<size_t>(columns), 2);
    const Guarded y = Guarded::floats(count);
    const cpu::RmsNorm call{rows, columns, {x.data(), columns, Dtype::f32}, {gain.data(), Dtype::f32},
                            1.0f, 1e-6f,   {y.get(), Dtype::f32},           isa,
                            2};
    CHECK(cpu::rms_norm(call) == Status::ok, "rms_norm failed");
    std::vector<double> exact(count);
    for (int64_t r = 0; r < rows; ++r) {
      double squares = 0.0;
      for (int64_t c = 0; c < columns; ++c) squares += static_cast<double>(x[r * columns + c]) * x[r * columns + c];
      const double scale = 1.0 / std::sqrt(squares / static_cast<double>(columns) + 1e-6);
      for (int64_t c = 0; c < columns; ++c) exact[r * columns + c] = x[r * columns + c] * scale * (1.0 + gain[c]);
    }
    const double error = largest_error(y.values(), exact), bound = 32.0 * std::ldexp(1.0, -24);
    CHECK(error <= bound, "rms_norm isa %d columns %lld: error %g", static_cast<int>(isa),
          static_cast<long long>(columns), error);
  }
}

void test_handoff() {
  const std::vector<float> rows = random_values(2 * 5, 1), table = random_values(4 * 5, 2);
  const Guarded out = Guarded::floats(20), taken = Guarded::floats(10);
  std::memcpy(out.get(), table.data(), 80);
  const int64_t slots[2] = {3, 0}, outside[2] = {3, 4};
  CHECK(cpu::handoff_scatter(rows.data(), 20, slots, 2, 20, out.data(), 20, 4) == Status::ok, "scatter failed");
  CHECK(std::memcmp(out.data() + 15, rows.data(), 20) == 0 && std::memcmp(out.data(), rows.data() + 5, 20) == 0 &&
            std::memcmp(out.data() + 5, table.data() + 5, 40) == 0,
        "scatter wrote wrong rows");
  CHECK(cpu::handoff_take(out.data(), 20, 4, slots, 2, 20, taken.data()) == Status::ok, "take failed");
  CHECK(std::memcmp(taken.data(), rows.data(), 40) == 0 && out.data()[0] == 0.0f && out.data()[19] == 0.0f,
        "take read wrong rows");
  CHECK(cpu::handoff_scatter(rows.data(), 20, outside, 2, 20, out.data(), 20, 4) == Status::row_out_of_range,
        "a row outside the table was written");
}

void test_alignment(Isa isa) {
  const int64_t tokens = 7, features = 37, table_rows = 5;
  const std::vector<float> pred = random_values(static_cast<size_t>(tokens * features), 1);
  const std::vector<float> table = random_values(static_cast<size_t>(table_rows * features), 2);
  const int64_t ids[7] = {4, 0, 1, 1, 2, 3, 4};
  const float mask[7] = {1, 0, 1, 0.5f, 1, 1, 0};
  const Guarded grad = Guarded::floats(pred.size());
  float loss = kNan;
  cpu::Alignment call{tokens,
                      features,
                      table_rows,
                      {pred.data(), features, Dtype::f32},
                      {table.data(), features, Dtype::f32},
                      ids,
                      mask,
                      0.75f,
                      0.25f,
                      2.0f,
                      &loss,
                      {grad.data(), Dtype::f32},
                      isa,
                      2};
  const int64_t bytes = cpu::alignment_workspace(call);
  const Guarded workspace = workspace_of(bytes);
  CHECK(cpu::alignment(call, workspace.get(), bytes) == Status::ok, "alignment failed");
  const auto exact = [&](const std::vector<float>& rows) {
    double total = 0.0, weight = 0.0;
    for (int64_t t = 0; t < tokens; ++t) {
      double along = 0.0, pp = 0.0, ee = 0.0, squares = 0.0;
      for (int64_t i = 0; i < features; ++i) {
        const double p = rows[t * features + i], e = 2.0 * table[ids[t] * features + i];
        along += p * e, pp += p * p, ee += e * e, squares += (p - e) * (p - e) / static_cast<double>(features);
      }
      total += mask[t] * (0.75 * (1.0 - along / std::sqrt(pp * ee)) + 0.25 * squares);
      weight += mask[t];
    }
    return total / weight;
  };
  CHECK(std::fabs(loss - exact(pred)) <= 1e-5 * std::fabs(exact(pred)), "loss %g, exact %g", loss, exact(pred));
  for (size_t i = 0; i < pred.size(); i += 11) {
    std::vector<float> up = pred, down = pred;
    up[i] += 1.0f / 256, down[i] -= 1.0f / 256;
    const double slope = (exact(up) - exact(down)) * 128.0;
    CHECK(std::fabs(slope - grad.data()[i]) <= 1e-4, "gradient %g, slope %g", grad.data()[i], slope);
  }
  const int64_t outside[7] = {4, 0, 1, 5, 2, 3, 4};
  call.token_ids = outside;
  CHECK(cpu::alignment(call, workspace.get(), bytes) == Status::row_out_of_range, "an id outside the table was read");
}

// Every instruction set computes what the baseline does in fp32, whose sums are those of the tests in Python.
void test_layer(Isa isa) {
  struct Dtypes {
    Dtype stored, others, rows;
  };
  const LayerShape shapes[] = {
      {1, 40, 3, 1, 22, 50, 1}, {16, 33, 4, 2, 6, 70, 9}, {16, 100, 4, 2, 30, 170, 9}, {3, 130, 6, 6, 70, 300, 37}};
  for (const LayerShape& shape : shapes) {
    for (const Dtypes& dtypes : {Dtypes{Dtype::f32, Dtype::f32, Dtype::f32},
                                 {Dtype::bf16, Dtype::bf16, Dtype::f32},
                                 {Dtype::bf16, Dtype::f32, Dtype::f32},
                                 {Dtype::f16, Dtype::bf16, Dtype::f32},
                                 {Dtype::bf16, Dtype::bf16, Dtype::bf16}}) {
      const LayerResults found = LayerCase(shape, dtypes.stored, dtypes.others, dtypes.rows, isa).run(3, 3);
      const LayerResults plain = LayerCase(shape, dtypes.stored, dtypes.others, dtypes.rows, Isa::baseline).run(1, 1);
      const double bound = dtypes.rows == Dtype::f32 ? 1e-5 : 4e-2;  // bf16 rows are rounded between the products
      const std::vector<double> queries(plain.queries.begin(), plain.queries.end()), y(plain.y.begin(), plain.y.end());
      CHECK(largest_error(found.queries, queries) <= bound && largest_error(found.y, y) <= bound,
            "layer isa %d dtypes %d %d %d: errors %g %g", static_cast<int>(isa), static_cast<int>(dtypes.stored),
            static_cast<int>(dtypes.others), static_cast<int>(dtypes.rows), largest_error(found.queries, queries),
            largest_error(found.y, y));
    }
  }
  cpu::LayerInputs none{};
  CHECK(cpu::layer_inputs_workspace(none) == -1, "a layer without rows");
  cpu::LayerOutput nothing{};
  CHECK(cpu::layer_output(nothing, nullptr, 0) == Status::bad_argument, "a layer without rows");
  CHECK(cpu::decoder_layers_workspace(nullptr, 0) == -1, "no layers");
  const cpu::DecoderLayer neither{};
  CHECK(cpu::decoder_layers(&neither, 1, nullptr, 0) == Status::bad_argument, "layers without rows");
}

}  // namespace

int main() {
  const auto test = [](const Shape& shape) {
    const Expected expected(shape);
    each_isa([&](Isa isa) { test_link(isa, expected); });
  };
  for (const int64_t tokens : {int64_t{1}, int64_t{7}, int64_t{33}}) {
    test({tokens, 17, 51, 17, Residual::identity, true, true});
    test({tokens, 40, 23, 57, Residual::linear, true, true});
    test({tokens, 13, 49, 50, Residual::linear, false, false});
    test({tokens, 8, 16, 3, Residual::none, false, true});
  }
  test({1100, 5, 6, 7, Residual::linear, true, true});      // several blocks of tokens, both ways
  test({288, 300, 16, 256, Residual::linear, true, true});  // bands of rows, two terms of few pieces
  test({300, 256, 270, 130, Residual::linear, false, true});
  test_frozen();
  each_isa([](Isa isa) {
    test_gelu(isa, Gelu::erf);
    test_gelu(isa, Gelu::tanh);
    test_alignment(isa);
    test_refused(isa);
    test_large(isa);
    test_rms_norm(isa);
    test_layer(isa);
  });
  test_handoff();
  if (failures == 0)
    std::printf("all native CPU checks passed, best instruction set %d\n", static_cast<int>(cpu::best_isa()));
  return failures == 0 ? 0 : 1;
}
