// The kernels as the host calls them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tables.h"

namespace fused_tricks::cuda {

// Where a launch goes: the current stream of the tensors' device.
struct Target {
  int device;
  void* stream;
};

// Each throws std::runtime_error with the name of the call that failed.
template <typename Args>
void launch_scan(const Args& args, int64_t blocks, const Target& target);
template <typename Args>
void launch_update(const Args& args, int64_t blocks, const Target& target);
// Ordered with the launches on the same stream; `host` must stay as it is until the next call.
void copy_to_device(void* device_memory, const void* host, size_t size, const Target& target);

}  // namespace fused_tricks::cuda
