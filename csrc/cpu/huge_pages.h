// Memory that packed weights are written to, in pages as large as the system has.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace recmas::cpu {

// Asks for pages of 2 MB wherever they lie within [data, data + bytes), whose contents are lost. A weight that is
// streamed from memory waits for the addresses of its pages, too (docs/kernels.md, Huge pages). Advice only: where the
// system has none, small pages serve.
inline void ask_for_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  if (begin >= end) return;
  void* const pages = reinterpret_cast<void*>(begin);
  // Pages that the allocator has handed out before stay small unless they are dropped.
  if (madvise(pages, end - begin, MADV_HUGEPAGE) == 0) madvise(pages, end - begin, MADV_DONTNEED);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace recmas::cpu
