// Links whose large products a library does: against the same without one, packed and not, with every block of the
// result in bounds.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "link_case.h"

using namespace recmas;
using namespace recmas::tests;

namespace {

std::atomic<int> products{0};

// sums[r] of one column of A B. Not sanitized, else this takes minutes: plain_sgemm looks at the corners.
__attribute__((no_sanitize("address", "undefined"))) void add_column(bool turned, int64_t rows, int64_t k,
                                                                     const float* left, int64_t left_stride,
                                                                     const float* right, int64_t apart, float* sums) {
  for (int64_t r = 0; turned && r < rows; ++r) {
    float lanes[16] = {};
    for (int64_t i = 0; i < k; ++i) lanes[i % 16] += left[r * left_stride + i] * right[i * apart];
    for (const float lane : lanes) sums[r] += lane;
  }
  for (int64_t i = 0; !turned && i < k; ++i) {
    for (int64_t r = 0; r < rows; ++r) sums[r] += left[i * left_stride + r] * right[i * apart];
  }
}

// BLAS's, as it is defined: C = A B + keep C, all stored by columns.
void plain_sgemm(const char* turn_left, const char* turn_right, const int64_t* rows, const int64_t* columns,
                 const int64_t* k, const float* factor, const float* left, const int64_t* left_stride,
                 const float* right, const int64_t* right_stride, const float* keep, float* result,
                 const int64_t* result_stride) {
  ++products;
  const bool turned = *turn_left == 'T', right_turned = *turn_right == 'T';
  const int64_t last_left = turned ? (*rows - 1) * *left_stride + *k - 1 : (*k - 1) * *left_stride + *rows - 1;
  const int64_t last_right =
      right_turned ? (*k - 1) * *right_stride + *columns - 1 : (*columns - 1) * *right_stride + *k - 1;
  volatile float corner = left[0] + left[last_left] + right[0] + right[last_right];
  (void)corner;
  std::vector<float> sums(static_cast<size_t>(*rows));
  for (int64_t c = 0; c < *columns; ++c) {
    std::fill(sums.begin(), sums.end(), 0.0f);
    add_column(turned, *rows, *k, left, *left_stride, right + c * (right_turned ? 1 : *right_stride),
               right_turned ? *right_stride : 1, sums.data());
    for (int64_t r = 0; r < *rows; ++r) {
      float& to = result[c * *result_stride + r];
      to = *factor * sums[static_cast<size_t>(r)] + (*keep == 0.0f ? 0.0f : *keep * to);
    }
  }
}

void check_same(const char* name, const std::vector<float>& found, const std::vector<float>& plain, const Shape& s) {
  const double error = largest_error(found, std::vector<double>(plain.begin(), plain.end()));
  CHECK(error <= 1e-4, "%s of %lld %lld %lld %lld: error %g", name, static_cast<long long>(s.tokens),
        static_cast<long long>(s.in), static_cast<long long>(s.hidden), static_cast<long long>(s.out), error);
}

// forward: whether a product of the forward pass is large enough, and not those of the weights' gradients alone.
void test_link(const Shape& s, int threads, bool forward = true) {
  Case c(s);
  const Isa isa = cpu::best_isa();
  Kept kept, by_library;
  const std::vector<float> plain = run_forward(c, c.weights(), isa, threads, &kept);
  const Gradients gradients = run_backward(c, c.weights(), kept, isa, threads);
  CHECK(products == 0, "a library was called that nobody gave");
  c.sgemm = plain_sgemm;
  const std::vector<float> found = run_forward(c, c.weights(), isa, threads, &by_library);
  CHECK((products > 0) == forward, "%d products of the forward pass went to the library", products.load());
  products = 0;
  const Gradients others = run_backward(c, c.weights(), kept, isa, threads);
  CHECK(products > 0, "no product of the backward pass went to the library");
  products = 0;
  check_same("y", found, plain, s);
  check_same("pre", by_library.pre, kept.pre, s);
  if (s.norms) check_same("z", by_library.z, kept.z, s);
  check_same("dx", others.dx, gradients.dx, s);
  check_same("dw1", others.dw1, gradients.dw1, s);
  check_same("dw2", others.dw2, gradients.dw2, s);
  if (s.residual == Residual::linear) check_same("dw3", others.dw3, gradients.dw3, s);
  if (s.biases) check_same("db1", others.db1, gradients.db1, s);

  cpu::LinkWeights packed = c.weights(Form::packed);
  const auto room = [&](int64_t rows, int64_t columns) {
    return workspace_of(cpu::packed_bytes(rows, columns, Dtype::f32, isa));
  };
  const Guarded panels1 = room(s.hidden, s.in), panels2 = room(s.out, s.hidden), panels3 = room(s.out, s.in);
  const auto pack = [&](cpu::Weight& weight, int64_t rows, int64_t columns, const Guarded& panels) {
    if (weight.data == nullptr) return;
    cpu::pack_weight({weight.data, Dtype::f32}, rows, columns, panels.get(), Dtype::f32, isa, 2);
    weight.packed_from = weight.data;
    weight.data = panels.get();
  };
  pack(packed.w1, s.hidden, s.in, panels1);
  pack(packed.w2, s.out, s.hidden, panels2);
  pack(packed.w3, s.out, s.in, panels3);
  const std::vector<float> from_panels = run_forward(c, packed, isa, threads);
  CHECK((products > 0) == forward, "%d products of packed weights went to the library", products.load());
  const std::vector<float> in_order = run_forward(c, c.weights(Form::stored_panel_order), isa, threads);
  products = 0;
  CHECK(std::memcmp(from_panels.data(), in_order.data(), from_panels.size() * sizeof(float)) == 0,
        "packed and stored weights give other bits");
}

}  // namespace

int main() {
  if (cpu::best_isa() != Isa::amx) {
    std::printf("no instruction set of this processor leaves products to a library\n");
    return 0;
  }
  for (const int threads : {1, 3, 7}) {
    test_link({200, 400, 401, 400, Residual::identity, true, true}, threads);
    test_link({1100, 330, 140, 300, Residual::linear, true, true}, threads);  // a last block of few tokens
  }
  test_link({600, 230, 300, 250, Residual::none, false, false}, 3);
  test_link({300, 2100, 130, 2100, Residual::linear, false, true}, 3);      // blocks of columns
  test_link({300, 400, 90, 410, Residual::linear, true, true}, 3, false);   // the residual's product alone, backward
  test_link({300, 100, 400, 600, Residual::linear, true, true}, 3, false);  // one term of few
  if (failures == 0) std::printf("all checks of products by a library passed\n");
  return failures == 0 ? 0 : 1;
}
