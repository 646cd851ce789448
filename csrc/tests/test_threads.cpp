// Kernels on several threads, at shapes large enough that they use them: the same bits as on one thread, and, built
// under ThreadSanitizer, no race. There, `test_threads <pass> <n>` leaves out the n-th barrier of that pass: forward,
// backward, frozen_forward, frozen_backward, layer_inputs, layer_output or decoder_layers.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "layer_case.h"
#include "skipped_barrier.h"

namespace {

using namespace recmas;
using namespace recmas::tests;

constexpr int kThreads = 3;

// Two blocks of tokens at least in each direction. Every phase of a block reads what another thread wrote before it.
const Shape kShapes[] = {
    {1300, 70, 130, 100, Residual::linear, true, true},  // every phase there is
    {1100, 24, 40, 24, Residual::identity, true, true},
    {1100, 24, 40, 40, Residual::linear, false, true},
    {1100, 40, 24, 17, Residual::none, false, false},
};

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

// Gains in bf16, which the first thread widens for the others.
std::vector<uint16_t> bf16_of(const std::vector<float>& values) {
  std::vector<uint16_t> result(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &values[i], sizeof bits);
    result[i] = static_cast<uint16_t>(bits >> 16);
  }
  return result;
}

struct Results {
  std::vector<float> y;
  Gradients gradients;
};

Results run(const Case& c, Isa isa, int forward_threads, int backward_threads, bool backward) {
  const std::vector<uint16_t> gain_in = bf16_of(c.gi), gain_out = bf16_of(c.go);
  cpu::LinkWeights weights = c.weights();
  if (c.s.norms) {
    weights.norm_in_weight = {gain_in.data(), Dtype::bf16};
    weights.norm_out_weight = {gain_out.data(), Dtype::bf16};
  }
  Results results;
  Kept kept;
  results.y = run_forward(c, weights, isa, forward_threads, &kept);
  if (backward) results.gradients = run_backward(c, weights, kept, isa, backward_threads);
  return results;
}

void test_link(Isa isa, const Shape& shape) {
  const Case c(shape);
  const Results one = run(c, isa, 1, 1, true), several = run(c, isa, kThreads, kThreads, true);
  CHECK(same(one.y, several.y), "isa %d: y differs between thread counts", static_cast<int>(isa));
  const std::vector<float> Gradients::* const members[] = {
      &Gradients::dx,  &Gradients::dw1, &Gradients::db1, &Gradients::dw2, &Gradients::db2, &Gradients::dw3,
      &Gradients::db3, &Gradients::dgi, &Gradients::dci, &Gradients::dgo, &Gradients::dco};
  for (size_t i = 0; i < sizeof members / sizeof members[0]; ++i) {
    CHECK(same(one.gradients.*members[i], several.gradients.*members[i]),
          "isa %d: gradient %zu differs between thread counts", static_cast<int>(isa), i);
  }
}

void test_packing(Isa isa) {
  const int64_t rows = 200, columns = 70, bytes = cpu::packed_bytes(rows, columns, Dtype::f32, isa);
  const std::vector<float> weight = random_values(static_cast<size_t>(rows * columns), 1);
  const Guarded one = workspace_of(bytes), several = workspace_of(bytes);
  cpu::pack_weight({weight.data(), Dtype::f32}, rows, columns, one.get(), Dtype::f32, isa, 1);
  cpu::pack_weight({weight.data(), Dtype::f32}, rows, columns, several.get(), Dtype::f32, isa, kThreads);
  CHECK(std::memcmp(one.get(), several.get(), static_cast<size_t>(bytes)) == 0, "panels differ between thread counts");
}

void test_alignment(Isa isa) {
  const int64_t tokens = 1200, features = 130;
  const size_t count = static_cast<size_t>(tokens * features);
  const std::vector<float> pred = random_values(count, 1), target = random_values(count, 2);
  std::vector<float> grads[2];
  float losses[2];
  for (const int i : {0, 1}) {
    const Guarded grad = Guarded::floats(count);
    const cpu::Alignment call{tokens,
                              features,
                              tokens,
                              {pred.data(), features, Dtype::f32},
                              {target.data(), features, Dtype::f32},
                              nullptr,
                              nullptr,
                              0.75f,
                              0.25f,
                              2.0f,
                              &losses[i],
                              {grad.data(), Dtype::f32},
                              isa,
                              i == 0 ? 1 : kThreads};
    const int64_t bytes = cpu::alignment_workspace(call);
    const Guarded workspace = workspace_of(bytes);
    CHECK(cpu::alignment(call, workspace.get(), bytes) == Status::ok, "alignment failed");
    grads[i] = grad.values();
  }
  CHECK(losses[0] == losses[1] && same(grads[0], grads[1]), "isa %d: the loss differs between thread counts",
        static_cast<int>(isa));
}

struct Frozen {
  std::vector<float> y, dx;
};

struct FrozenShape {
  int64_t tokens, in, out;
  Dtype stored, rows;
};

const FrozenShape kFrozen[] = {
    {150, 512, 1930, Dtype::f32, Dtype::f32},    // rows 2 KB apart are copied; two blocks, and two passes backward
    {40, 6200, 100, Dtype::bf16, Dtype::f32},    // rows that AMX multiplies in parts, in several passes
    {1060, 100, 130, Dtype::bf16, Dtype::bf16},  // rows that are read as they lie, in two blocks at least
};

Frozen run_frozen(const FrozenShape& shape, Isa isa, int forward_threads, int backward_threads) {
  const int64_t tokens = shape.tokens, in = shape.in, out = shape.out;
  const Rounded weight(random_values(static_cast<size_t>(out * in), 1), shape.stored);
  const Rounded x(random_values(static_cast<size_t>(tokens * in), 2), shape.rows);
  const Rounded dy(random_values(static_cast<size_t>(tokens * out), 3), shape.rows);
  const Guarded panels = workspace_of(cpu::packed_bytes(out, in, shape.stored, isa));
  cpu::pack_weight({weight.data(), shape.stored}, out, in, panels.get(), shape.stored, isa, 1);
  const Guarded y = Guarded::floats(static_cast<size_t>(tokens * out));
  const Guarded dx = Guarded::floats(static_cast<size_t>(tokens * in));
  const cpu::FrozenForward forward{tokens,
                                   in,
                                   out,
                                   {x.data(), in, shape.rows},
                                   panels.get(),
                                   {},
                                   {y.get(), Dtype::f32},
                                   shape.stored,
                                   Form::packed,
                                   isa,
                                   forward_threads};
  const cpu::FrozenBackward backward{
      tokens,          in, out, {dy.data(), out, shape.rows}, panels.get(), {dx.get(), Dtype::f32}, shape.stored, isa,
      backward_threads};
  const int64_t forward_bytes = cpu::frozen_forward_workspace(forward);
  const int64_t backward_bytes = cpu::frozen_backward_workspace(backward);
  const Guarded scratch = workspace_of(forward_bytes), more = workspace_of(backward_bytes);
  CHECK(cpu::frozen_forward(forward, scratch.get(), forward_bytes) == Status::ok, "frozen_forward failed");
  CHECK(cpu::frozen_backward(backward, more.get(), backward_bytes) == Status::ok, "frozen_backward failed");
  return {y.values(), dx.values()};
}

void test_frozen(Isa isa) {
  for (const FrozenShape& shape : kFrozen) {
    const Frozen one = run_frozen(shape, isa, 1, 1), several = run_frozen(shape, isa, kThreads, kThreads);
    CHECK(same(one.y, several.y) && same(one.dx, several.dx),
          "isa %d, %lld rows: frozen products differ between thread counts", static_cast<int>(isa),
          static_cast<long long>(shape.tokens));
  }
}

// All norms, so that every barrier is there; more heads to a key than attention takes at once.
LayerCase layer_case(Isa isa, int64_t rows = 5, Dtype stored = Dtype::f32) {
  return {{rows, 260, 20, 2, 34, 260, 19}, stored, stored, Dtype::f32, isa};
}

void test_layer(Isa isa, int64_t rows, Dtype stored) {
  const auto layer = [&] { return layer_case(isa, rows, stored); };
  const LayerResults one = layer().run(1, 1), several = layer().run(kThreads, kThreads);
  CHECK(same(one.queries, several.queries) && same(one.y, several.y), "isa %d: layers differ between thread counts",
        static_cast<int>(isa));
  const LayerResults apart = layer().run_layers(3, 1, false);
  const LayerResults together = layer().run_layers(3, kThreads, true);
  CHECK(same(apart.queries, together.queries) && same(apart.y, together.y), "isa %d: layers differ in one call",
        static_cast<int>(isa));
}

#ifdef RECMAS_POSIX_THREADS
void run_without_barrier(const std::string& pass_name, int barrier) {
  skipped_barrier = barrier;
  const Case c(kShapes[0]);
  const auto run_pass = [&] {
    if (pass_name == "forward") run(c, Isa::baseline, kThreads, kThreads, false);
    if (pass_name == "backward") run(c, Isa::baseline, 1, kThreads, true);
    if (pass_name == "frozen_forward") run_frozen(kFrozen[0], Isa::baseline, kThreads, 1);
    if (pass_name == "frozen_backward") run_frozen(kFrozen[0], Isa::baseline, 1, kThreads);
    if (pass_name == "layer_inputs") layer_case(Isa::baseline).run(kThreads, 1);
    if (pass_name == "layer_output") layer_case(Isa::baseline).run(1, kThreads);
    if (pass_name == "decoder_layers") layer_case(Isa::baseline).run_layers(2, kThreads, true);
  };
  // ThreadSanitizer remembers the last few accesses only, so that one pass shows the race in about half of all runs.
  for (int pass = 0; pass < 20; ++pass) run_pass();
}
#endif

}  // namespace

int main(int count, char** arguments) {
#ifdef RECMAS_POSIX_THREADS
  if (count == 3) {
    run_without_barrier(arguments[1], std::atoi(arguments[2]));
    return 0;
  }
#endif
  if (count != 1) {
    std::printf("%s: unexpected arguments\n", arguments[0]);
    return 2;
  }
  for (int level = 0; level <= static_cast<int>(cpu::best_isa()); ++level) {
    const Isa isa = static_cast<Isa>(level);
    for (const Shape& shape : kShapes) test_link(isa, shape);
    test_packing(isa);
    test_alignment(isa);
    test_frozen(isa);
    test_layer(isa, 5, Dtype::f32);
    test_layer(isa, 16, Dtype::bf16);
  }
  if (failures == 0) std::printf("all checks of threads passed\n");
  return failures == 0 ? 0 : 1;
}
