// The launches of csrc/cuda/launch.h on the CPU, and the fibers behind cuda_shim.h.
#include "launch.h"

#include <algorithm>
#include <bitset>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
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

// The kernels' __shared__ variables.
BlockWork work;
double per_warp[kWarps];

namespace {

constexpr size_t kStackSize = 256 * 1024;

constexpr unsigned kWarp = kWarpSize;
constexpr uintptr_t kSectorSize = 32;

// The n-th accesses of a warp's threads at one instruction are one request.
struct Access {
  Instruction instruction;
  uintptr_t sector;
};

struct Fiber {
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStackSize);
  void* stack_pointer = nullptr;
  bool finished = false;
  const char* waits_at = nullptr;
  bool waits_for_block = false;
  uint64_t sent[2] = {};
  int exchanges = 0;
  bool voted[2] = {};
  int votes = 0;
  std::vector<Access> accesses;
};

Fiber fibers[kThreads];
void* scheduler_stack = nullptr;
void (*kernel_body)() = nullptr;
std::exception_ptr failure;
int64_t block_limit = -1;
uint64_t blocks_run = 0;
bool counts_sectors = false;
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
  // The functions of the fiber's last run have not returned, so AddressSanitizer still guards their variables.
  __asan_unpoison_memory_region(fiber.stack.get(), kStackSize);
#endif
  fiber.finished = false;
  fiber.waits_at = nullptr;
  fiber.waits_for_block = false;
  fiber.exchanges = 0;
  fiber.votes = 0;
  fiber.accesses.clear();
  // fused_tricks_switch expects six registers, then the return address. A function starts with a stack pointer of 8
  // modulo 16.
  auto* top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(fiber.stack.get() + kStackSize) & ~uintptr_t{15});
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}

void resume(unsigned thread) {
  threadIdx.x = thread;
  fibers[thread].waits_at = nullptr;
  fused_tricks_switch(&scheduler_stack, fibers[thread].stack_pointer);
  if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
}

// Returns the place where the unfinished threads of [begin, end) wait for each other, or null if all have finished.
// Throws if the places differ.
const char* common_place(unsigned begin, unsigned end) {
  const char* place = nullptr;
  for (unsigned thread = begin; thread < end; ++thread) {
    const Fiber& fiber = fibers[thread];
    if (fiber.finished) continue;
    if (place != nullptr && place != fiber.waits_at) {
      throw std::logic_error(std::string("threads of one block wait at ") + place + " and at " + fiber.waits_at);
    }
    place = fiber.waits_at;
  }
  return place;
}

// Runs a warp to the next barrier of the block.
void run_warp(unsigned warp, bool backwards) {
  const unsigned begin = warp * kWarp, end = begin + kWarp;
  do {
    for (unsigned i = 0; i < kWarp; ++i) {
      const unsigned thread = backwards ? end - 1 - i : begin + i;
      if (!fibers[thread].finished) resume(thread);
    }
  } while (common_place(begin, end) != nullptr && !fibers[begin].waits_for_block);
}

void count_sectors(unsigned warp) {
  std::map<std::tuple<int, bool, int>, std::set<uintptr_t>> requests;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    std::map<int, int> occurrences;
    for (const Access& access : fibers[warp * kWarp + lane].accesses) {
      const auto& [line, is_store] = access.instruction;
      requests[{line, is_store, occurrences[line]++}].insert(access.sector);
    }
  }
  for (const auto& [request, sectors] : requests) {
    (std::get<bool>(request) ? traffic.element_sectors_written : traffic.element_sectors_read) +=
        static_cast<int64_t>(sectors.size());
  }
}

void spoil_shared_memory() {
  std::memset(&work, 0xa5, sizeof work);
  std::memset(per_warp, 0xa5, sizeof per_warp);
}

void run_block(bool backwards) {
  spoil_shared_memory();
  for (Fiber& fiber : fibers) prepare(fiber);
  do {
    for (unsigned i = 0; i < kWarps; ++i) run_warp(backwards ? kWarps - 1 - i : i, backwards);
  } while (common_place(0, kThreads) != nullptr);
  for (unsigned warp = 0; counts_sectors && warp < kWarps; ++warp) count_sectors(warp);
}

// Returns the blocks in an order that no kernel can rely on. The order is the same in every run.
std::vector<unsigned> shuffled(unsigned blocks) {
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), std::minstd_rand(blocks));
  return order;
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
  for (const unsigned block : shuffled(end)) {
    blockIdx.x = block;
    // By the Thue-Morse sequence, every kernel and every block of a kernel runs in both directions.
    run_block(std::bitset<64>(blocks_run++).count() % 2 != 0);
  }
}

// Suspends the thread until the other threads of the warp, or of the block, have reached the same place.
void synchronize(const char* place, bool of_block) {
  current().waits_at = place;
  current().waits_for_block = of_block;
  yield_to_scheduler();
}

}  // namespace

void __syncthreads() { synchronize("__syncthreads", true); }

// Two slots alternate, here and below: a thread that is ahead writes its next value before the other threads have read
// this value.
int __syncthreads_or(int predicate) {
  const int place = current().votes++ % 2;
  current().voted[place] = predicate != 0;
  synchronize("__syncthreads_or", true);
  return std::any_of(fibers, fibers + kThreads, [place](const Fiber& fiber) { return fiber.voted[place]; });
}

uint64_t exchange(uint64_t bits, int lane_mask) {
  const int place = current().exchanges++ % 2;
  current().sent[place] = bits;
  synchronize("__shfl_xor_sync", false);
  const Fiber& partner = fibers[threadIdx.x ^ static_cast<unsigned>(lane_mask)];
  if (partner.exchanges < current().exchanges)
    throw std::logic_error("a shuffle with a thread that does not take part");
  return partner.sent[place];
}

void check_alignment(const void* address, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
    throw std::logic_error("misaligned access of " + std::to_string(alignment) + " bytes");
  }
}

void count_element_access(const void* address, size_t size, size_t alignment, Instruction instruction) {
  check_alignment(address, alignment);
  (instruction.is_store ? traffic.element_bytes_written : traffic.element_bytes_read) += static_cast<int64_t>(size);
  // An aligned element or vector lies in one sector.
  if (counts_sectors) {
    current().accesses.push_back({instruction, reinterpret_cast<uintptr_t>(address) / kSectorSize});
  }
}

std::string unusable_because(int) { return ""; }

template <typename Args>
void launch_scan(const Args& args, int64_t blocks, const Target&) {
  run_grid<scan_kernel<Args>>(args, blocks);
}

template <typename Args>
void launch_update(const Args& args, int64_t blocks, const Target&) {
  run_grid<update_kernel<Args>>(args, blocks);
}

void launch_decide(const DecideArguments& args, const Target&) { run_grid<decide_kernel>(args, 1); }

void launch_write(const WriteArguments& args, const Target&) { run_grid<write_kernel>(args, 1); }

template void launch_scan<SmallArguments>(const SmallArguments&, int64_t, const Target&);
template void launch_scan<MediumArguments>(const MediumArguments&, int64_t, const Target&);
template void launch_scan<LargeArguments>(const LargeArguments&, int64_t, const Target&);
template void launch_update<SmallArguments>(const SmallArguments&, int64_t, const Target&);
template void launch_update<MediumArguments>(const MediumArguments&, int64_t, const Target&);
template void launch_update<LargeArguments>(const LargeArguments&, int64_t, const Target&);

}  // namespace fused_tricks::cuda

// Copies the counts since the last call, in the order of Traffic, and resets the counts.
extern "C" __attribute__((visibility("default"))) void fused_tricks_take_traffic(fused_tricks::cuda::Traffic* counted) {
  *counted = fused_tricks::cuda::traffic;
  fused_tricks::cuda::traffic = {};
}

// Sectors are counted only on demand, because counting takes longer than the kernels.
extern "C" __attribute__((visibility("default"))) void fused_tricks_count_sectors(bool counts) {
  fused_tricks::cuda::counts_sectors = counts;
}

// While `captures` is true, launches go into a new graph instead of running. `replay` runs the graph.
extern "C" __attribute__((visibility("default"))) void fused_tricks_capture(bool captures) {
  fused_tricks::cuda::captures = captures;
  if (captures) fused_tricks::cuda::graph.clear();
}
extern "C" __attribute__((visibility("default"))) void fused_tricks_replay() {
  for (const auto& launch : fused_tricks::cuda::graph) launch();
}

// Runs only the first `count` blocks of every launch, for tensors that are too large for all. -1 runs all blocks.
extern "C" __attribute__((visibility("default"))) void fused_tricks_limit_blocks(int64_t count) {
  fused_tricks::cuda::block_limit = count;
}
