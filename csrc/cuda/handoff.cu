// Rows of latents into rows of input embeddings, and the way back. Pure copies: the element type does not matter, only
// how many bytes a row has and how far every address is aligned.
#include <cuda_runtime.h>

#include "link.h"

namespace recmas::cuda {
namespace {

constexpr int kThreads = 256;
// Enough blocks to fill any chip; more rows than this share blocks.
constexpr int64_t kMaxBlocks = 16384;

// A row of the table; a number outside it must not become an address, so it ends the kernel and, as every device
// failure does, the process's use of the device.
template <class Word>
__device__ Word* table_row(char* table, int64_t stride, int64_t table_rows, int64_t row) {
  if (row < 0 || row >= table_rows) __trap();
  return reinterpret_cast<Word*>(table + row * stride);
}

// One block per row: at d = 4096 in bf16 a thread moves two 16-byte words, so a launch of a few dozen rows is all
// latency.
template <class Word>
__global__ void scatter_rows(const char* __restrict__ rows, int64_t rows_stride,
                             const int64_t* __restrict__ slot_rows,  // [count], unique
                             int64_t count, char* __restrict__ table, int64_t table_stride, int64_t table_rows,
                             int64_t words) {
  for (int64_t row = blockIdx.x; row < count; row += gridDim.x) {
    const auto* source = reinterpret_cast<const Word*>(rows + row * rows_stride);
    Word* target = table_row<Word>(table, table_stride, table_rows, slot_rows[row]);
    for (int64_t word = threadIdx.x; word < words; word += kThreads) target[word] = source[word];
  }
}

template <class Word>
__global__ void take_rows(char* __restrict__ table, int64_t table_stride, int64_t table_rows,
                          const int64_t* __restrict__ slot_rows,  // [count], unique
                          int64_t count, Word* __restrict__ rows, int64_t words) {
  for (int64_t row = blockIdx.x; row < count; row += gridDim.x) {
    Word* source = table_row<Word>(table, table_stride, table_rows, slot_rows[row]);
    Word* target = rows + row * words;
    for (int64_t word = threadIdx.x; word < words; word += kThreads) {
      target[word] = source[word];
      source[word] = Word{};
    }
  }
}

// The widest word, in bytes, that divides every address and every row.
int64_t common_alignment(const void* rows, int64_t rows_stride, const void* table, int64_t table_stride,
                         int64_t row_bytes) {
  const uint64_t bits = reinterpret_cast<uint64_t>(rows) | reinterpret_cast<uint64_t>(table) |
                        static_cast<uint64_t>(rows_stride) | static_cast<uint64_t>(table_stride) |
                        static_cast<uint64_t>(row_bytes);
  return bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : bits % 2 == 0 ? 2 : 1;
}

unsigned blocks_for(int64_t count) { return static_cast<unsigned>(count < kMaxBlocks ? count : kMaxBlocks); }

// Calls launch(word) with a value of the word type of that many bytes, and returns the launch's error.
template <class Launch>
int32_t with_word(int64_t bytes, Launch launch) {
  switch (bytes) {
    case 16:
      launch(uint4{});
      break;
    case 4:
      launch(uint32_t{});
      break;
    case 2:
      launch(uint16_t{});
      break;
    default:
      launch(uint8_t{});
      break;
  }
  return cudaGetLastError();
}

}  // namespace

int32_t handoff_scatter(const void* rows, int64_t rows_stride, const int64_t* slot_rows, int64_t count,
                        int64_t row_bytes, void* table, int64_t table_stride, int64_t table_rows, uintptr_t stream) {
  if (count == 0 || row_bytes == 0) return cudaSuccess;
  return with_word(common_alignment(rows, rows_stride, table, table_stride, row_bytes), [&](auto word) {
    using Word = decltype(word);
    scatter_rows<Word><<<blocks_for(count), kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
        static_cast<const char*>(rows), rows_stride, slot_rows, count, static_cast<char*>(table), table_stride,
        table_rows, row_bytes / static_cast<int64_t>(sizeof(Word)));
  });
}

int32_t handoff_take(void* table, int64_t table_stride, int64_t table_rows, const int64_t* slot_rows, int64_t count,
                     int64_t row_bytes, void* rows, uintptr_t stream) {
  if (count == 0 || row_bytes == 0) return cudaSuccess;
  return with_word(common_alignment(rows, row_bytes, table, table_stride, row_bytes), [&](auto word) {
    using Word = decltype(word);
    take_rows<Word><<<blocks_for(count), kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
        static_cast<char*>(table), table_stride, table_rows, slot_rows, count, static_cast<Word*>(rows),
        row_bytes / static_cast<int64_t>(sizeof(Word)));
  });
}

}  // namespace recmas::cuda
