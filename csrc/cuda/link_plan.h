// Few tokens through a link: what is launched over what, as plain numbers. Compiles for the host alone.
//
// Up to four launches, each described by a struct that its kernel takes by value:
//
//     rows     u = norm_in(x), and a copy of x where its own layout cannot be streamed      (if either is needed)
//     product  a = gelu(u W1^T + b1)
//     product  z = [a | x] [W2 | W3]^T + b2 + b3 + residual                                 (y itself without norm_out)
//     rows     y = norm_out(z)                                                              (if there is a norm_out)
#pragma once

#include <cstdint>

#include "../link.h"
#include "number.h"

namespace recmas::cuda {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kTokenGroup = 8;   // tokens are multiplied in groups of eight, the narrow side of mma.sync
constexpr int kTileRows = 16;    // weight rows of a block, the wide side
constexpr int kPiece = 16;       // bytes: what a thread copies, keeps and multiplies at a time
constexpr int kRowPieces = 4;    // consecutive pieces of a weight row that one warp takes in a step
constexpr int kTileRowsPad = 4;  // keeps the partial sums of eight tokens in different shared-memory banks

// One factor pair of a product: weights [rows, depth], contiguous, and tokens [tokens, token_stride >= depth]. Rows of
// both are whole pieces at aligned addresses.
struct Operand {
  const void* weights;  // absent if null
  int64_t depth;
  const void* tokens;
  int64_t token_stride;
};

// target[token, row] = f(sum over both operands + biases + residual), f = gelu or nothing.
struct Product {
  Operand operands[2];
  int64_t rows;
  int32_t tokens;
  bool activate;
  bool overlaps;     // launched before the previous kernel has ended: only weights may be read until it has
  bool starts_late;  // lets the next kernel start when the weights have been read, not at once
  Gelu gelu;
  VectorView biases[2];
  MatrixView residual;  // [tokens, rows], rounded to `compute` when read
  Dtype compute;
  Output target;  // [tokens, rows]
  Output sum;     // [tokens, rows]: what f is applied to, for a backward pass; not wanted if null
};

// For each row of source: its LayerNorm and a copy. Source and norm are of the target's dtype or fp32.
struct Rows {
  MatrixView source;  // [tokens, width]
  int64_t width;
  int32_t tokens;
  bool overlaps, starts_late;
  bool rounds;  // the row to the target's dtype, before anything is computed of it
  float eps;
  VectorView gain, bias;  // of one dtype; absent gain: no norm, the copy alone
  Dtype target;
  void *normalised, *copy;  // [tokens, width] each; not wanted if null
  float *mean, *rstd;       // [tokens], for a backward pass; not wanted if null
};

struct LinkPlan {
  bool prepares, normalises;
  Rows prepare, normalise;
  Product first, second;
};

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
constexpr int64_t blocks_of(const Product& product) { return (product.rows + kTileRows - 1) / kTileRows; }

// How many groups of eight tokens a kernel is built for: 1, 2 or 4.
RECMAS_ANYWHERE constexpr int groups_for(int64_t tokens) { return tokens <= 8 ? 1 : tokens <= 16 ? 2 : 4; }

// Every step, a thread copies a piece of two weight rows and one piece of each group's tokens.
RECMAS_ANYWHERE constexpr int stage_bytes(int groups) { return (2 + groups) * kThreads * kPiece; }
// 96 KB of them: with two blocks on a processor both kernels' weights are on their way at once (227 KB on sm_90), and
// one block fits the smallest chips (99 KB on sm_86).
RECMAS_ANYWHERE constexpr int stages_for(int groups) { return groups == 1 ? 8 : groups == 2 ? 6 : 4; }

RECMAS_ANYWHERE constexpr int64_t step_depth(int64_t bytes_per_element) {
  return kWarps * kRowPieces * kPiece / bytes_per_element;
}
RECMAS_ANYWHERE constexpr int64_t steps_of(const Operand& operand, int64_t bytes_per_element) {
  return operand.weights == nullptr
             ? 0
             : (operand.depth + step_depth(bytes_per_element) - 1) / step_depth(bytes_per_element);
}

RECMAS_ANYWHERE constexpr int sums_bytes(int groups) {
  return kWarps * groups * kTokenGroup * (kTileRows + kTileRowsPad) * 4;
}
constexpr int64_t shared_bytes(const Product& product) {
  const int groups = groups_for(product.tokens);
  const int64_t steps = steps_of(product.operands[0], dtype_bytes(product.compute)) +
                        steps_of(product.operands[1], dtype_bytes(product.compute));
  const int64_t ring = (steps < stages_for(groups) ? steps : stages_for(groups)) * stage_bytes(groups);
  return ring > sums_bytes(groups) ? ring : sums_bytes(groups);
}

inline bool aligned(const void* data, int64_t row_bytes, int64_t to) {
  return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(to) == 0 && row_bytes % to == 0;
}

// What is served: x and the norms, in the dtype of what they are written with or in fp32 ...
inline bool has_kernels(const LinkForward& call) {
  const auto fits = [](const VectorView& gain, const VectorView& bias, Dtype target) {
    if (gain.data == nullptr) return bias.data == nullptr;
    const bool alike = bias.data == nullptr || bias.dtype == gain.dtype;
    return alike && (gain.dtype == Dtype::f32 || gain.dtype == target);
  };
  return (call.x.dtype == Dtype::f32 || call.x.dtype == call.compute) && call.y.dtype == call.x.dtype &&
         fits(call.norm_in_weight, call.norm_in_bias, call.compute) &&
         fits(call.norm_out_weight, call.norm_out_bias, call.y.dtype);
}

// ... and weights that are streamed in whole pieces.
inline bool whole_pieces(const LinkForward& call) {
  const int64_t bytes = dtype_bytes(call.compute);
  const int64_t in = call.shape.in_features * bytes, hidden = call.shape.hidden_features * bytes;
  return aligned(call.w1, in, kPiece) && aligned(call.w2, hidden, kPiece) && aligned(call.w3, in, kPiece);
}

// Whether a product can stream x as it lies.
inline bool streams(const LinkForward& call) {
  const int64_t bytes = dtype_bytes(call.compute);
  const bool rows_aligned = call.shape.tokens == 1 || call.x.stride * bytes % kPiece == 0;
  return call.x.dtype == call.compute && rows_aligned && aligned(call.x.data, call.shape.in_features * bytes, kPiece);
}

struct LinkWorkspace {
  int64_t normalised, copy, activations, sums, bytes;  // offsets; a part that is not needed has no bytes
};

inline LinkWorkspace link_workspace(const LinkForward& call) {
  const LinkShape& shape = call.shape;
  const int64_t bytes = dtype_bytes(call.compute);
  LinkWorkspace space{};
  const auto take = [&space](bool wanted, int64_t size) {
    const int64_t offset = space.bytes;
    space.bytes += wanted ? round_up(size, 128) : 0;
    return offset;
  };
  const bool norm_in = call.norm_in_weight.data != nullptr;
  space.normalised = take(norm_in, shape.tokens * shape.in_features * bytes);
  // Needed or not: how much workspace a call takes then does not depend on its addresses.
  space.copy = take(true, shape.tokens * shape.in_features * bytes);
  space.activations = take(true, shape.tokens * shape.hidden_features * bytes);
  space.sums = take(call.norm_out_weight.data != nullptr, shape.tokens * shape.out_features * 4);
  return space;
}

inline LinkPlan plan_link(const LinkForward& call, void* workspace, Overlap wanted) {
  const bool overlap = wanted != Overlap::off, late = wanted == Overlap::late;
  const LinkShape& shape = call.shape;
  const LinkWorkspace space = link_workspace(call);
  char* base = static_cast<char*>(workspace);
  const auto tokens = static_cast<int32_t>(shape.tokens);
  const bool norm_in = call.norm_in_weight.data != nullptr, norm_out = call.norm_out_weight.data != nullptr;
  const bool linear = call.residual == Residual::linear, direct = streams(call);
  const bool copies = !direct && (!norm_in || linear);

  LinkPlan plan{};
  plan.prepares = norm_in || copies;
  plan.normalises = norm_out;

  Rows& prepare = plan.prepare;
  prepare.source = call.x;
  prepare.width = shape.in_features;
  prepare.tokens = tokens;
  prepare.starts_late = late;
  prepare.rounds = true;
  prepare.target = call.compute;
  prepare.eps = call.eps;
  prepare.gain = call.norm_in_weight;
  prepare.bias = call.norm_in_bias;
  if (norm_in) prepare.normalised = base + space.normalised;
  if (copies) prepare.copy = base + space.copy;
  if (norm_in && call.stats != nullptr) {
    prepare.mean = call.stats;
    prepare.rstd = call.stats + tokens;
  }

  const void* raw = direct ? call.x.data : base + space.copy;
  const int64_t raw_stride = direct ? call.x.stride : shape.in_features;
  const auto operand = [&](const void* weights, int64_t depth, const void* rows, int64_t stride) {
    return Operand{weights, depth, rows, stride};
  };

  Product& first = plan.first;
  first.operands[0] = norm_in ? operand(call.w1, shape.in_features, base + space.normalised, shape.in_features)
                              : operand(call.w1, shape.in_features, raw, raw_stride);
  first.rows = shape.hidden_features;
  first.tokens = tokens;
  first.activate = true;
  first.overlaps = overlap && plan.prepares;
  first.starts_late = late;
  first.gelu = call.gelu;
  first.biases[0] = call.b1;
  first.compute = call.compute;
  first.target = {base + space.activations, call.compute};
  first.sum = call.pre;

  Product& second = plan.second;
  second.operands[0] = operand(call.w2, shape.hidden_features, base + space.activations, shape.hidden_features);
  if (linear) second.operands[1] = operand(call.w3, shape.in_features, raw, raw_stride);
  second.rows = shape.out_features;
  second.tokens = tokens;
  second.overlaps = overlap;
  second.starts_late = late;
  second.biases[0] = call.b2;
  second.biases[1] = call.b3;
  if (call.residual == Residual::identity) second.residual = call.x;
  second.compute = call.compute;
  second.target = norm_out ? Output{base + space.sums, Dtype::f32} : call.y;
  second.sum = call.z;

  Rows& normalise = plan.normalise;
  normalise.source = {base + space.sums, shape.out_features, Dtype::f32};
  normalise.width = shape.out_features;
  normalise.tokens = tokens;
  normalise.overlaps = overlap;
  normalise.starts_late = late;
  normalise.target = call.y.dtype;
  normalise.eps = call.eps;
  normalise.gain = call.norm_out_weight;
  normalise.bias = call.norm_out_bias;
  normalise.normalised = call.y.data;
  if (call.stats != nullptr) {
    normalise.mean = call.stats + 2 * shape.tokens;
    normalise.rstd = call.stats + 3 * shape.tokens;
  }
  return plan;
}

}  // namespace recmas::cuda
