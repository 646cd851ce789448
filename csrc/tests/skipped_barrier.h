// Which barrier posix_threads.h leaves out.
#pragma once

namespace recmas::tests {

inline int skipped_barrier = -1;  // by number, counted from the start of a team; -1: none

}  // namespace recmas::tests
