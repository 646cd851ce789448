// A few tokens times a weight matrix: the kernel's body, over a Thread (thread.h on the device, an emulation in
// csrc/tests), so that the host can run all of it but the instructions themselves.
//
// A block owns 16 rows of the weights and streams them once, 512 bytes of each row per step: warp w takes the w-th 64
// bytes, and in it lane 4 g + c the c-th piece of 16 bytes of rows g and g + 8, and of token g of every group of eight.
// That is mma.m16n8k16's own layout with the depth renumbered alike on both sides, so pieces go from memory to the
// multiplication without changing lanes: every thread copies asynchronously into slots of shared memory that it alone
// reads, nothing synchronises before the warps' partial sums are added, and the bytes in flight are the slots.
#pragma once

#include <type_traits>

#include "link_plan.h"

namespace recmas::cuda {

struct alignas(kPiece) Piece {
  uint32_t words[4];
};

// Where a thread stands in its block.
struct Place {
  int warp, row, piece, lane;
  RECMAS_ANYWHERE explicit Place(int thread)
      : warp(thread / 32), row(thread % 32 / kRowPieces), piece(thread % kRowPieces), lane(thread % 32) {}
};

// A stage of the ring: two pieces of weights and one of each token group for every thread.
RECMAS_ANYWHERE Piece* slot_of(char* shared, int groups, int stage, int which, int thread) {
  return reinterpret_cast<Piece*>(shared + static_cast<int64_t>(stage) * stage_bytes(groups)) + which * kThreads +
         thread;
}

RECMAS_ANYWHERE float* sum_of(char* shared, int groups, int warp, int token, int row) {
  return reinterpret_cast<float*>(shared) + (warp * groups * kTokenGroup + token) * (kTileRows + kTileRowsPad) + row;
}

// The sums of one thread. 16-bit elements: those of mma.sync's result.
template <class Element, int kGroups>
struct Sums {
  float values[kGroups][4];

  template <class Thread>
  RECMAS_ANYWHERE void multiply(Thread& thread, char* shared, int stage, int) {
    const Piece low = *slot_of(shared, kGroups, stage, 0, thread.index());
    const Piece high = *slot_of(shared, kGroups, stage, 1, thread.index());
    RECMAS_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      const Piece tokens = *slot_of(shared, kGroups, stage, 2 + group, thread.index());
      RECMAS_UNROLL
      for (int half = 0; half < 4; half += 2) {
        const uint32_t rows[4] = {low.words[half], high.words[half], low.words[half + 1], high.words[half + 1]};
        const uint32_t columns[2] = {tokens.words[half], tokens.words[half + 1]};
        thread.template multiply_tile<Element>(values[group], rows, columns);
      }
    }
  }

  template <class Thread>
  RECMAS_ANYWHERE void deposit(Thread&, char* shared, const Place& place) {
    RECMAS_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      RECMAS_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int token = group * kTokenGroup + 2 * place.piece + i % 2;
        *sum_of(shared, kGroups, place.warp, token, place.row + i / 2 * 8) = values[group][i];
      }
    }
  }
};

// fp32: a lane multiplies its pieces of two rows by that piece of all tokens, which its warp has copied.
template <int kGroups>
struct Sums<float, kGroups> {
  float values[2][kGroups * kTokenGroup];

  template <class Thread>
  RECMAS_ANYWHERE void multiply(Thread& thread, char* shared, int stage, int tokens) {
    thread.sync_warp();  // the other lanes' copies have arrived
    const Place place(thread.index());
    const Piece low = *slot_of(shared, kGroups, stage, 0, thread.index());
    const Piece high = *slot_of(shared, kGroups, stage, 1, thread.index());
    RECMAS_UNROLL
    for (int token = 0; token < kGroups * kTokenGroup; ++token) {
      if (token < tokens) {
        const int copier = place.warp * 32 + token % kTokenGroup * kRowPieces + place.piece;
        const Piece piece = *slot_of(shared, kGroups, stage, 2 + token / kTokenGroup, copier);
        RECMAS_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float factor = bits_as<float>(piece.words[i]);
          values[0][token] += bits_as<float>(low.words[i]) * factor;
          values[1][token] += bits_as<float>(high.words[i]) * factor;
        }
      }
    }
    thread.sync_warp();  // the slots may be filled again
  }

  template <class Thread>
  RECMAS_ANYWHERE void deposit(Thread& thread, char* shared, const Place& place) {
    RECMAS_UNROLL
    for (int half = 0; half < 2; ++half) {
      RECMAS_UNROLL
      for (int token = 0; token < kGroups * kTokenGroup; ++token) {
        float sum = values[half][token];
        sum += thread.shuffle_xor(sum, 1);
        sum += thread.shuffle_xor(sum, 2);
        if (token % kRowPieces == place.piece) {
          *sum_of(shared, kGroups, place.warp, token, place.row + half * 8) = sum;
        }
      }
    }
  }
};

// A thread's outputs: one row of the tile, every 16th token. What they need beside the sums is read while the weights
// are on their way.
template <int kGroups>
struct Outputs {
  static constexpr int kTokenStep = kThreads / kTileRows;
  static constexpr int kCount = (kGroups * kTokenGroup + kTokenStep - 1) / kTokenStep;

  template <class Thread>
  RECMAS_ANYWHERE Outputs(Thread& thread, const Product& product)
      : row_in_tile(thread.index() % kTileRows),
        first_token(thread.index() / kTileRows),
        row(thread.block() * kTileRows + row_in_tile) {
    for (const VectorView& vector : product.biases) {
      if (vector.data != nullptr && row < product.rows) bias += thread.load(vector.data, vector.dtype, row);
    }
  }

  template <class Thread>
  RECMAS_ANYWHERE void read_residual(Thread& thread, const Product& product) {
    const MatrixView& matrix = product.residual;
    RECMAS_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const int64_t token = first_token + i * kTokenStep;
      residual[i] = 0.0f;
      if (matrix.data != nullptr && row < product.rows && token < product.tokens) {
        residual[i] = thread.load(matrix.data, matrix.dtype, token * matrix.stride + row);
      }
    }
  }

  template <class Thread>
  RECMAS_ANYWHERE void finish(Thread& thread, const Product& product, char* shared) {
    if (row >= product.rows) return;
    RECMAS_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const int token = first_token + i * kTokenStep;
      if (token >= product.tokens) continue;
      const int64_t place = token * product.rows + row;
      float value = 0.0f;
      for (int warp = 0; warp < kWarps; ++warp) value += *sum_of(shared, kGroups, warp, token, row_in_tile);
      value += bias;
      value += round_to(product.compute, residual[i]);
      if (product.sum.data != nullptr) thread.store(product.sum.data, product.sum.dtype, place, value);
      if (product.activate) value = gelu(value, product.gelu);
      thread.store(product.target.data, product.target.dtype, place, value);
    }
  }

  int row_in_tile, first_token;
  int64_t row;
  float bias = 0.0f;
  float residual[kCount];
};

template <class Element, int kGroups, class Thread>
RECMAS_ANYWHERE void run_product(Thread& thread, const Product& product) {
  constexpr int kStages = stages_for(kGroups);
  constexpr int64_t kBytes = sizeof(Element);
  char* shared = thread.shared();
  const Place place(thread.index());
  const int64_t tile = thread.block();
  const int64_t first_steps = steps_of(product.operands[0], kBytes);
  const int64_t steps = first_steps + steps_of(product.operands[1], kBytes);

  const auto depth_at = [&](int64_t step) {
    const int64_t within = step < first_steps ? step : step - first_steps;
    return within * step_depth(kBytes) + (place.warp * kRowPieces + place.piece) * (kPiece / kBytes);
  };
  const auto request_weights = [&](int64_t step, int stage) {
    if (step >= steps) return;
    const Operand& operand = product.operands[step < first_steps ? 0 : 1];
    const int64_t depth = depth_at(step);
    RECMAS_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int64_t row = tile * kTileRows + place.row + half * 8;
      const bool inside = row < product.rows && depth < operand.depth;
      const auto* source = static_cast<const Element*>(operand.weights) + row * operand.depth + depth;
      thread.copy_async(slot_of(shared, kGroups, stage, half, thread.index()), inside ? source : operand.weights,
                        inside);
    }
  };
  const auto request_tokens = [&](int64_t step, int stage) {
    if (step >= steps) return;
    const Operand& operand = product.operands[step < first_steps ? 0 : 1];
    const int64_t depth = depth_at(step);
    RECMAS_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      const int token = group * kTokenGroup + place.row;
      const bool inside = token < product.tokens && depth < operand.depth;
      const auto* source = static_cast<const Element*>(operand.tokens) + token * operand.token_stride + depth;
      thread.copy_async(slot_of(shared, kGroups, stage, 2 + group, thread.index()), inside ? source : operand.tokens,
                        inside);
    }
  };

  if (!product.starts_late) thread.start_dependents();
  for (int stage = 0; stage < kStages; ++stage) {
    request_weights(stage, stage);
    if (!product.overlaps) request_tokens(stage, stage);
    thread.commit();
  }
  Outputs<kGroups> outputs(thread, product);
  if (product.overlaps) {
    thread.wait_for_previous();
    for (int stage = 0; stage < kStages; ++stage) {
      request_tokens(stage, stage);
      thread.commit();
    }
  }
  outputs.read_residual(thread, product);

  Sums<Element, kGroups> sums{};
  int stage = 0;
  for (int64_t step = 0; step < steps; ++step) {
    thread.template wait_for_copies<kStages - 1>();
    sums.multiply(thread, shared, stage, product.tokens);
    request_weights(step + kStages, stage);
    request_tokens(step + kStages, stage);
    thread.commit();
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }

  if (product.starts_late) thread.start_dependents();
  // The partial sums take the ring's place.
  thread.template wait_for_copies<0>();
  thread.sync();
  sums.deposit(thread, shared, place);
  thread.sync();
  outputs.finish(thread, product, shared);
}

// act(element, groups) with values of the types that a product's kernel is built for.
template <class Act>
auto with_product_types(const Product& product, Act act) {
  const auto with_groups = [&](auto element) {
    switch (groups_for(product.tokens)) {
      case 1:
        return act(element, std::integral_constant<int, 1>{});
      case 2:
        return act(element, std::integral_constant<int, 2>{});
      default:
        return act(element, std::integral_constant<int, 4>{});
    }
  };
  return with_element(product.compute, with_groups);
}

}  // namespace recmas::cuda
