#include "threads.h"

#include <stdexcept>

namespace fused_tricks {

namespace {
using TorchParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain_size, RangeFunction, void* context);
TorchParallelFor torch_parallel_for = nullptr;
}  // namespace

void set_parallel_for(void* address) { torch_parallel_for = reinterpret_cast<TorchParallelFor>(address); }

void parallel_ranges(int64_t count, bool small, RangeFunction function, void* context) {
  if (small || count < 2 || torch_parallel_for == nullptr) {
    function(0, count, context);
  } else if (torch_parallel_for(0, count, 1, function, context) != 0) {
    throw std::runtime_error("torch_parallel_for failed");
  }
}

}  // namespace fused_tricks
