// Parallel loops on torch's own threads, through `torch_parallel_for` of libtorch's stable C interface.
#pragma once

#include <cstdint>

namespace fused_tricks {

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);

// Sets the address of `torch_parallel_for`; null: all loops run on the calling thread.
void set_parallel_for(void* torch_parallel_for);

// Splits [0, count) over the threads. `small`: the calling thread runs the whole range.
void parallel_ranges(int64_t count, bool small, RangeFunction function, void* context);

// Calls body(begin, end) for ranges that cover [0, count).
template <typename Body>
void parallel_for(int64_t count, bool small, const Body& body) {
  parallel_ranges(
      count, small, [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace fused_tricks
