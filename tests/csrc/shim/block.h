// The threads of a block on the CPU: fibers that run one after the other and change where one has to wait.
//
// A fiber takes the block's threads in order and runs the kernel for each. Where a thread waits at a barrier,
// its fiber is set aside and another one goes on with the next thread, so that a kernel without barriers
// needs one fiber and no change. The order is always the same: a test that fails does so every time.
//
// What only real threads would show, two accesses to shared memory without a barrier between them, remains
// unseen as long as this order happens to be right; compute-sanitizer's racecheck is for that.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace shim {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kMostSharedBytes = 227 * 1024;

alignas(1024) inline unsigned char shared_memory[kMostSharedBytes];  // the block's, of the launch's size

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "block (%u, %u, %u), thread (%u, %u, %u): %s\n", blockIdx.x, blockIdx.y, blockIdx.z,
               threadIdx.x, threadIdx.y, threadIdx.z, what);
  std::abort();
}

struct Barrier {
  unsigned arrived = 0;
  uint32_t mask = 0;    // of those who have arrived
  uint64_t passed = 0;  // how often all have arrived
};

struct Warp {
  Barrier barrier;
  uint32_t running = 0;  // lanes that have not left the kernel
  uint64_t values[kWarp];
};

struct Copy {  // an asynchronous copy; the end of a group has 0 bytes
  void* target;
  const void* source;
  size_t bytes, zeros;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  dim3 thread;
  unsigned number = 0;              // of the thread in its block
  const Barrier* waits = nullptr;   // where the thread waits
  uint64_t passed = 0;              // that barrier's count when it came
  bool idle = true;                 // has no thread
  std::deque<Copy> copies;          // begun, not waited for
};

class Block {
 public:
  void run(const std::function<void()>& kernel) {
    kernel_ = &kernel;
    threads_ = blockDim.x * blockDim.y * blockDim.z;
    if (threads_ == 0 || threads_ > 1024) fail("a block has 1 to 1024 threads");
    next_ = 0;
    running_ = threads_;
    barrier_ = {};
    warps_.assign((threads_ + kWarp - 1) / kWarp, {});
    for (unsigned t = 0; t < threads_; ++t) warps_[t / kWarp].running |= 1u << t % kWarp;
    while (running_ > 0) {
      bool moved = false;
      for (size_t f = 0; f < fibers_.size(); ++f) {  // a fiber added on the way starts below
        Fiber& fiber = *fibers_[f];
        if (!fiber.idle && fiber.waits->passed != fiber.passed) moved = resume(fiber);
      }
      if (next_ < threads_) moved = resume(idle_fiber());
      if (!moved && running_ > 0) fail("deadlock: the threads of a block wait at different barriers");
    }
  }

  void sync_threads() { wait(barrier_, running_); }

  void sync_warp(uint32_t mask) {
    Warp& warp = warps_[current_->number / kWarp];
    if (!(mask >> current_->number % kWarp & 1)) fail("the mask of a warp operation leaves its caller out");
    if (warp.barrier.arrived > 0 && warp.barrier.mask != mask) fail("a warp waits with two masks at once");
    warp.barrier.mask = mask;
    wait(warp.barrier, __builtin_popcount(mask & warp.running));
  }

  // Every lane of the mask gives a value and gets that of lane source(own lane).
  template <typename T>
  T exchange(uint32_t mask, T value, int source) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "at most 8 bytes");
    Warp& warp = warps_[current_->number / kWarp];
    std::memcpy(&warp.values[current_->number % kWarp], &value, sizeof(T));
    sync_warp(mask);
    if (!((mask & warp.running) >> source & 1)) fail("a shuffle reads a lane that does not take part");
    std::memcpy(&value, &warp.values[source], sizeof(T));
    sync_warp(mask);  // nobody writes the next value before all have read this one
    return value;
  }

  int lane() const { return current_->number % kWarp; }
  std::deque<Copy>& copies() { return current_->copies; }

 private:
  void wait(Barrier& barrier, unsigned expected) {
    if (++barrier.arrived == expected) return pass(barrier);
    Fiber& own = *current_;
    own.waits = &barrier;
    own.passed = barrier.passed;
    swapcontext(&own.context, &scheduler_);
  }

  static void pass(Barrier& barrier) {
    barrier.arrived = 0;
    ++barrier.passed;
  }

  bool resume(Fiber& fiber) {
    current_ = &fiber;
    threadIdx = fiber.thread;
    swapcontext(&scheduler_, &fiber.context);
    return true;
  }

  Fiber& idle_fiber() {
    for (auto& fiber : fibers_)
      if (fiber->idle) return *fiber;
    fibers_.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *fibers_.back();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Block::work, 0);
    return fiber;
  }

  static void work();

  void take_threads() {
    Fiber& own = *current_;
    while (next_ < threads_) {
      own.number = next_++;
      own.idle = false;
      own.thread = dim3(own.number % blockDim.x, own.number / blockDim.x % blockDim.y,
                        own.number / (blockDim.x * blockDim.y));
      threadIdx = own.thread;
      (*kernel_)();
      leave();
    }
    own.idle = true;
    swapcontext(&own.context, &scheduler_);
  }

  void leave() {
    for (const Copy& copy : current_->copies)
      if (copy.bytes > 0) fail("left the kernel without waiting for its asynchronous copies");
    current_->copies.clear();
    Warp& warp = warps_[current_->number / kWarp];
    warp.running &= ~(1u << current_->number % kWarp);
    --running_;
    if (running_ > 0 && barrier_.arrived == running_) pass(barrier_);
    const unsigned lanes = __builtin_popcount(warp.running);
    if (lanes > 0 && warp.barrier.arrived == lanes) pass(warp.barrier);
  }

  const std::function<void()>* kernel_ = nullptr;
  unsigned threads_ = 0, next_ = 0, running_ = 0;
  Barrier barrier_;
  std::vector<Warp> warps_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  Fiber* current_ = nullptr;
  ucontext_t scheduler_;
};

inline Block block;

inline void Block::work() {
  for (;;) block.take_threads();
}

}  // namespace shim

inline void __syncthreads() { shim::block.sync_threads(); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { shim::block.sync_warp(mask); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = shim::kWarp) {
  const int lane = shim::block.lane();
  return shim::block.exchange(mask, value, lane / width * width + (source & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = shim::kWarp) {
  const int lane = shim::block.lane(), source = lane ^ bits;
  return shim::block.exchange(mask, value, source / width > lane / width ? lane : source);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = shim::kWarp) {
  const int lane = shim::block.lane();
  const bool inside = lane % width + static_cast<int>(distance) < width;
  return shim::block.exchange(mask, value, inside ? lane + static_cast<int>(distance) : lane);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = shim::kWarp) {
  const int lane = shim::block.lane();
  const bool inside = lane % width >= static_cast<int>(distance);
  return shim::block.exchange(mask, value, inside ? lane - static_cast<int>(distance) : lane);
}
