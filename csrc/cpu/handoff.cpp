// The latent handoff is copying whole rows of any element type, and few of them: one thread already fills the bus.
#include <cstring>

#include "../link.h"

namespace recmas::cpu {
namespace {

Status check(const int64_t* slot_rows, int64_t count, int64_t row_bytes, int64_t table_rows) {
  if (count < 0 || row_bytes < 0 || table_rows < 0) return Status::bad_argument;
  for (int64_t i = 0; i < count; ++i) {
    if (slot_rows[i] < 0 || slot_rows[i] >= table_rows) return Status::row_out_of_range;
  }
  return Status::ok;
}

}  // namespace

Status handoff_scatter(const void* rows, int64_t rows_stride, const int64_t* slot_rows, int64_t count,
                       int64_t row_bytes, void* table, int64_t table_stride, int64_t table_rows) {
  const Status status = check(slot_rows, count, row_bytes, table_rows);
  if (status != Status::ok || row_bytes == 0) return status;
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(static_cast<char*>(table) + slot_rows[i] * table_stride,
                static_cast<const char*>(rows) + i * rows_stride, static_cast<size_t>(row_bytes));
  }
  return Status::ok;
}

Status handoff_take(void* table, int64_t table_stride, int64_t table_rows, const int64_t* slot_rows, int64_t count,
                    int64_t row_bytes, void* rows) {
  const Status status = check(slot_rows, count, row_bytes, table_rows);
  if (status != Status::ok || row_bytes == 0) return status;
  for (int64_t i = 0; i < count; ++i) {
    char* row = static_cast<char*>(table) + slot_rows[i] * table_stride;
    std::memcpy(static_cast<char*>(rows) + i * row_bytes, row, static_cast<size_t>(row_bytes));
    std::memset(row, 0, static_cast<size_t>(row_bytes));
  }
  return Status::ok;
}

}  // namespace recmas::cpu
