// A CUDA block on the host: every thread a fiber that runs the kernel's own body, switched where threads meet.
//
// Stricter than a device where that finds mistakes: shared memory and every slot that is being copied into hold NaN,
// asynchronous copies arrive only when they are waited for, threads run in a random order between meetings, and reads
// and writes of watched memory are counted byte by byte.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "../cuda/number.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace recmas::cuda {

[[noreturn]] inline void emulation_failed(const char* what) {
  std::fprintf(stderr, "emulated block: %s\n", what);  // stdout into a pipe would be lost with the process
  std::abort();
}

// How often each byte of a piece of memory was read, or written.
class Watch {
 public:
  Watch(const void* data, int64_t bytes)
      : begin_(static_cast<const char*>(data)), counts_(static_cast<size_t>(bytes)) {}
  void touch(const void* data, int64_t bytes) {
    const int64_t offset = static_cast<const char*>(data) - begin_;
    if (offset < 0 || offset + bytes > static_cast<int64_t>(counts_.size())) return;
    for (int64_t i = 0; i < bytes; ++i) ++counts_[static_cast<size_t>(offset + i)];
  }
  // Whether all bytes were touched exactly `times` times.
  bool all(int times) const {
    for (const uint8_t count : counts_) {
      if (count != times) return false;
    }
    return true;
  }

 private:
  const char* begin_;
  std::vector<uint8_t> counts_;
};

// What all blocks of a call share: who is watched, and the order of threads.
struct Observer {
  std::vector<Watch> read_once, written_once;
  std::mt19937 order{1};
  // While a kernel overlaps the one before, nothing in here may be read: its contents are not there yet.
  const char* unfinished_begin = nullptr;
  const char* unfinished_end = nullptr;
};

class EmulatedBlock;

class EmulatedThread {
 public:
  EmulatedThread(EmulatedBlock& block, int index) : block_(block), index_(index) {}

  int index() const { return index_; }
  int64_t block() const;
  char* shared() const;
  void sync();
  void sync_warp();
  float shuffle_xor(float value, int mask);
  void start_dependents() {
    if (started_) emulation_failed("lets the next kernel start twice");
    started_ = true;
  }
  bool started() const { return started_; }
  void wait_for_previous() { waited_ = true; }
  float load(const void* data, Dtype dtype, int64_t index);
  void store(void* data, Dtype dtype, int64_t index, float value);
  template <class Element>
  uint32_t load_bits(const Element* source) {
    observe_read(source, sizeof(Element));
    if constexpr (sizeof(Element) == 4) {
      return bits_as<uint32_t>(*source);
    } else {
      return static_cast<uint32_t>(source->bits);
    }
  }
  void copy_async(void* target, const void* source, bool inside) {
    constexpr int kBytes = 16;
    if (reinterpret_cast<uintptr_t>(target) % kBytes != 0 || reinterpret_cast<uintptr_t>(source) % kBytes != 0) {
      emulation_failed("a misaligned asynchronous copy");
    }
    std::memset(target, 0xff, kBytes);
    if (inside) observe_read(source, kBytes);
    groups_.back().push_back({target, inside ? source : nullptr, kBytes});
  }
  void commit() { groups_.emplace_back(); }
  template <int kPending>
  void wait_for_copies() {
    while (static_cast<int>(groups_.size()) - 1 > kPending) {  // the last group is open
      for (const Copy& copy : groups_.front()) {
        if (copy.source == nullptr) {
          std::memset(copy.target, 0, copy.bytes);
        } else {
          std::memcpy(copy.target, copy.source, copy.bytes);
        }
      }
      groups_.erase(groups_.begin());
    }
  }
  template <class Element>
  void multiply_tile(float (&sums)[4], const uint32_t (&rows)[4], const uint32_t (&columns)[2]);

 private:
  struct Copy {
    void* target;
    const void* source;
    size_t bytes;
  };
  void observe_read(const void* data, int64_t bytes);

  EmulatedBlock& block_;
  int index_;
  bool waited_ = false, started_ = false;
  std::vector<std::vector<Copy>> groups_{1};
};

class EmulatedBlock {
 public:
  EmulatedBlock(int64_t number, int threads, int64_t shared_bytes, Observer& observer)
      : number_(number), observer_(observer), warps_(static_cast<size_t>(threads / 32)) {
    shared_.reset(static_cast<char*>(std::aligned_alloc(16, static_cast<size_t>((shared_bytes + 15) / 16 * 16))));
    std::memset(shared_.get(), 0xff, static_cast<size_t>(shared_bytes));
    everyone_.size = threads;
    for (Meeting& warp : warps_) warp.size = 32;
    for (int i = 0; i < threads; ++i) fibers_.push_back(std::make_unique<Fiber>(*this, i));
  }

  void run(const std::function<void(EmulatedThread&)>& body) {
    body_ = &body;
    for (auto& fiber : fibers_) {
      ucontext_t& context = fiber->place.context;
      fiber->place.was_left = false;
      getcontext(&context);
      context.uc_stack.ss_sp = fiber->stack.get();
      context.uc_stack.ss_size = kStackBytes;
      context.uc_link = &scheduler_.context;
      const auto address = reinterpret_cast<uintptr_t>(fiber.get());
      makecontext(&context, reinterpret_cast<void (*)()>(&start), 2, static_cast<unsigned>(address >> 32),
                  static_cast<unsigned>(address & 0xffffffffu));
    }
    // Some warps run ahead until they must wait for the others: what a missing barrier lets happen shows.
    std::vector<size_t> awake, warps(warps_.size());
    for (size_t i = 0; i < warps.size(); ++i) warps[i] = i;
    bool all = false;
    while (!finished()) {
      std::shuffle(warps.begin(), warps.end(), observer_.order);
      awake.assign(warps.begin(), all ? warps.end() : warps.begin() + static_cast<int64_t>((warps.size() + 1) / 2));
      const uint64_t before = progress_;
      do {
        const uint64_t start = progress_;
        for (const size_t warp : awake) run_warp(warp);
        if (progress_ == start) break;
      } while (true);
      if (all && progress_ == before) emulation_failed("deadlock: threads wait for others that will not come");
      all = progress_ == before;
    }
  }

 private:
  friend class EmulatedThread;
  static constexpr size_t kStackBytes = 64 * 1024;

  // Where a stack goes on.
  struct Place {
    ucontext_t context{};
    jmp_buf jump;
    bool was_left = false;
  };

  struct Fiber {
    Fiber(EmulatedBlock& owner, int index) : block(owner), thread(owner, index), stack(new char[kStackBytes]) {}
    EmulatedBlock& block;
    EmulatedThread thread;
    std::unique_ptr<char[]> stack;
    Place place;
    void* fake_stack = nullptr;
    bool done = false;
  };

  // Threads that wait for one another, and what each of a warp offers to the others.
  struct Meeting {
    int size = 0, arrived = 0;
    uint64_t generation = 0;
    float values[2][32];
    uint32_t rows[2][32][4], columns[2][32][2];
  };

  bool finished() const {
    return std::all_of(fibers_.begin(), fibers_.end(), [](const auto& fiber) { return fiber->done; });
  }

  // Every thread of the warp once, in a random order.
  void run_warp(size_t warp) {
    size_t lanes[32];
    for (size_t i = 0; i < 32; ++i) lanes[i] = i;
    std::shuffle(lanes, lanes + 32, observer_.order);
    for (const size_t lane : lanes) {
      Fiber& fiber = *fibers_[warp * 32 + lane];
      if (!fiber.done) enter(fiber);
    }
  }

  static void start(unsigned high, unsigned low) {
    auto* fiber = reinterpret_cast<Fiber*>(static_cast<uintptr_t>(high) << 32 | low);
    fiber->block.landed(nullptr);
    (*fiber->block.body_)(fiber->thread);
    if (!fiber->thread.started()) emulation_failed("never lets the next kernel start");
    fiber->done = true;
    ++fiber->block.progress_;
    fiber->block.leave(*fiber);
  }

  // swapcontext asks the kernel for the signal mask, which takes four fifths of all time; a jump does not. At a jump
  // AddressSanitizer would forget what it knows of the stack.
  static void swap(Place& from, Place& to) {
#if defined(__SANITIZE_ADDRESS__)
    swapcontext(&from.context, &to.context);
#else
    if (_setjmp(from.jump) != 0) return;
    from.was_left = true;
    if (to.was_left) _longjmp(to.jump, 1);
    setcontext(&to.context);
#endif
  }

  // Every switch of stacks is announced to AddressSanitizer, which would take the new one for an overflow.
  void enter(Fiber& fiber) {
    running_ = &fiber;
#if defined(__SANITIZE_ADDRESS__)
    void* mine = nullptr;
    __sanitizer_start_switch_fiber(&mine, fiber.stack.get(), kStackBytes);
#endif
    swap(scheduler_, fiber.place);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(mine, nullptr, nullptr);
#endif
  }
  void leave(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fiber.fake_stack, scheduler_stack_, scheduler_stack_bytes_);
#endif
    swap(fiber.place, scheduler_);
    landed(fiber.fake_stack);
  }
  void landed([[maybe_unused]] void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack_, &scheduler_stack_bytes_);
#endif
  }

  // Returns once all of the meeting have come; answers which half of its double buffers this round uses.
  int meet(Meeting& meeting) {
    const uint64_t generation = meeting.generation;
    ++progress_;
    if (++meeting.arrived == meeting.size) {
      meeting.arrived = 0;
      ++meeting.generation;
    } else {
      Fiber& fiber = *running_;
      while (meeting.generation == generation) leave(fiber);
    }
    return static_cast<int>(generation % 2);
  }

  int64_t number_;
  Observer& observer_;
  struct Free {
    void operator()(char* data) const { std::free(data); }
  };
  std::unique_ptr<char, Free> shared_;
  Meeting everyone_;
  std::vector<Meeting> warps_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  const std::function<void(EmulatedThread&)>* body_ = nullptr;
  Fiber* running_ = nullptr;
  Place scheduler_;
  uint64_t progress_ = 0;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
};

inline int64_t EmulatedThread::block() const { return block_.number_; }
inline char* EmulatedThread::shared() const { return block_.shared_.get(); }
inline void EmulatedThread::sync() { block_.meet(block_.everyone_); }
inline void EmulatedThread::sync_warp() { block_.meet(block_.warps_[static_cast<size_t>(index_ / 32)]); }

inline float EmulatedThread::shuffle_xor(float value, int mask) {
  auto& warp = block_.warps_[static_cast<size_t>(index_ / 32)];
  warp.values[warp.generation % 2][index_ % 32] = value;
  return warp.values[block_.meet(warp)][(index_ % 32) ^ mask];
}

inline void EmulatedThread::observe_read(const void* data, int64_t bytes) {
  const Observer& observer = block_.observer_;
  const char* address = static_cast<const char*>(data);
  if (!waited_ && address < observer.unfinished_end && address + bytes > observer.unfinished_begin) {
    emulation_failed("reads what the kernel before has not finished, without waiting for it");
  }
  for (Watch& watch : block_.observer_.read_once) watch.touch(data, bytes);
}

inline float EmulatedThread::load(const void* data, Dtype dtype, int64_t index) {
  const int64_t bytes = dtype_bytes(dtype);
  observe_read(static_cast<const char*>(data) + index * bytes, bytes);
  return load_number(data, dtype, index);
}

inline void EmulatedThread::store(void* data, Dtype dtype, int64_t index, float value) {
  const int64_t bytes = dtype_bytes(dtype);
  for (Watch& watch : block_.observer_.written_once) watch.touch(static_cast<char*>(data) + index * bytes, bytes);
  store_number(data, dtype, index, value);
}

// The layout of mma.m16n8k16 as the PTX manual gives it.
template <class Element>
void EmulatedThread::multiply_tile(float (&sums)[4], const uint32_t (&rows)[4], const uint32_t (&columns)[2]) {
  if constexpr (sizeof(Element) == 2) {
    auto& warp = block_.warps_[static_cast<size_t>(index_ / 32)];
    const int lane = index_ % 32;
    std::memcpy(warp.rows[warp.generation % 2][lane], rows, sizeof rows);
    std::memcpy(warp.columns[warp.generation % 2][lane], columns, sizeof columns);
    const int round = block_.meet(warp);
    const auto half_of = [](uint32_t word, int high) {
      return to_float(Element{static_cast<uint16_t>(high ? word >> 16 : word & 0xffff)});
    };
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k) {
        const int word = k / 8;  // columns 8 to 15 of the depth lie in the second half of the registers
        const uint32_t left = warp.rows[round][row % 8 * 4 + k % 8 / 2][word * 2 + row / 8];
        const uint32_t right = warp.columns[round][column * 4 + k % 8 / 2][word];
        sums[i] += half_of(left, k % 2) * half_of(right, k % 2);
      }
    }
  }
}

}  // namespace recmas::cuda
