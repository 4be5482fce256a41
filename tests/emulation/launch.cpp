// The launches of csrc/cuda/launch.h on the CPU, and the fibers behind cuda_shim.h.
#include "launch.h"

#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels.cuh"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

// Saves the callee-saved registers on the current stack, whose pointer goes to *from, and continues on stack `to`.
extern "C" void fused_tricks_switch(void** from, void* to);
asm(R"(
.text
.globl fused_tricks_switch
fused_tricks_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace fused_tricks::cuda {

Index threadIdx{}, blockIdx{}, gridDim{};
Traffic traffic{};

namespace {

constexpr size_t kStackSize = 256 * 1024;

struct Fiber {
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStackSize);
  void* stack_pointer = nullptr;
  bool finished = false;
  const char* waits_at = nullptr;
  uint64_t sent[2] = {};
  int exchanges = 0;
};

Fiber fibers[kThreads];
void* scheduler_stack = nullptr;
void (*kernel_body)() = nullptr;
std::exception_ptr failure;
int64_t block_limit = -1;
bool captures = false;
std::vector<std::function<void()>> graph;  // launches, with their arguments by value

Fiber& current() { return fibers[threadIdx.x]; }

void yield_to_scheduler() { fused_tricks_switch(&current().stack_pointer, scheduler_stack); }

void fiber_main() {
  try {
    kernel_body();
  } catch (...) {
    failure = std::current_exception();
  }
  current().finished = true;
  yield_to_scheduler();
}

void prepare(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  // The functions that the fiber left last have not returned, and their variables are still guarded.
  __asan_unpoison_memory_region(fiber.stack.get(), kStackSize);
#endif
  fiber.finished = false;
  fiber.waits_at = nullptr;
  fiber.exchanges = 0;
  // As fused_tricks_switch leaves a stack: six registers, then the address to return to, which enters a function with
  // a stack pointer of 8 modulo 16.
  auto* top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(fiber.stack.get() + kStackSize) & ~uintptr_t{15});
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}

// Every thread runs to its next barrier or shuffle, then all go on; they must all wait at the same one.
void run_block() {
  for (Fiber& fiber : fibers) prepare(fiber);
  for (bool running = true; running;) {
    running = false;
    const char* waits_at = nullptr;
    for (unsigned thread = 0; thread < kThreads; ++thread) {
      if (fibers[thread].finished) continue;
      threadIdx.x = thread;
      fused_tricks_switch(&scheduler_stack, fibers[thread].stack_pointer);
      if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
      if (fibers[thread].finished) continue;
      if (running && waits_at != fibers[thread].waits_at) {
        throw std::logic_error(std::string("threads of one block wait at ") + waits_at + " and at " +
                               fibers[thread].waits_at);
      }
      waits_at = fibers[thread].waits_at;
      running = true;
    }
  }
}

template <auto kKernel, typename Args>
void run_grid(const Args& args, int64_t blocks) {
  if (captures) {
    graph.emplace_back([args, blocks] { run_grid<kKernel>(args, blocks); });
    return;
  }
  static const Args* launched = nullptr;
  launched = &args;
  kernel_body = [] { kKernel(*launched); };
  traffic.launches += 1;
  gridDim.x = static_cast<unsigned>(blocks);
  const bool limited = block_limit >= 0 && block_limit < blocks;
  const auto end = static_cast<unsigned>(limited ? block_limit : blocks);
  for (blockIdx.x = 0; blockIdx.x < end; ++blockIdx.x) run_block();
}

}  // namespace

void synchronize(const char* what) {
  current().waits_at = what;
  yield_to_scheduler();
}

// Two places take turns: a thread that is ahead has sent its next value before the others have read this one.
uint64_t exchange(uint64_t bits, int lane_mask) {
  const int place = current().exchanges++ % 2;
  current().sent[place] = bits;
  synchronize("__shfl_xor_sync");
  const Fiber& partner = fibers[threadIdx.x ^ static_cast<unsigned>(lane_mask)];
  if (partner.exchanges < current().exchanges) throw std::logic_error("a shuffle with a thread that takes no part");
  return partner.sent[place];
}

int __syncthreads_or(int predicate) {
  const int place = current().exchanges++ % 2;
  current().sent[place] = static_cast<uint64_t>(predicate);
  synchronize("__syncthreads_or");
  int any = 0;
  for (const Fiber& fiber : fibers) any |= static_cast<int>(fiber.sent[place]);
  return any;
}

void check_alignment(const void* address, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
    throw std::logic_error("misaligned access of " + std::to_string(alignment) + " bytes");
  }
}

template <typename Args>
void launch_scan(const Args& args, int64_t blocks, const Target&) {
  run_grid<scan_kernel<Args>>(args, blocks);
}

template <typename Args>
void launch_update(const Args& args, int64_t blocks, const Target&) {
  run_grid<update_kernel<Args>>(args, blocks);
}

void launch_write(const WriteArguments& args, const Target&) { run_grid<write_kernel>(args, 1); }

template void launch_scan<SmallArguments>(const SmallArguments&, int64_t, const Target&);
template void launch_scan<MediumArguments>(const MediumArguments&, int64_t, const Target&);
template void launch_scan<LargeArguments>(const LargeArguments&, int64_t, const Target&);
template void launch_update<SmallArguments>(const SmallArguments&, int64_t, const Target&);
template void launch_update<MediumArguments>(const MediumArguments&, int64_t, const Target&);
template void launch_update<LargeArguments>(const LargeArguments&, int64_t, const Target&);

}  // namespace fused_tricks::cuda

// Hands over what was counted since the last call, in the order of Traffic.
extern "C" __attribute__((visibility("default"))) void fused_tricks_take_traffic(fused_tricks::cuda::Traffic* counted) {
  *counted = fused_tricks::cuda::traffic;
  fused_tricks::cuda::traffic = {};
}

// While `captures`, launches are not run but put into a graph, a new one each time; `replay` runs them.
extern "C" __attribute__((visibility("default"))) void fused_tricks_capture(bool captures) {
  fused_tricks::cuda::captures = captures;
  if (captures) fused_tricks::cuda::graph.clear();
}
extern "C" __attribute__((visibility("default"))) void fused_tricks_replay() {
  for (const auto& launch : fused_tricks::cuda::graph) launch();
}

// Runs only the first `count` blocks of every launch, for tensors too large to be walked; -1 runs all.
extern "C" __attribute__((visibility("default"))) void fused_tricks_limit_blocks(int64_t count) {
  fused_tricks::cuda::block_limit = count;
}
