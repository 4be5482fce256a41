// The kernels as the host calls them.
#pragma once

#include <cstdint>
#include <string>

#include "tables.h"

namespace fused_tricks::cuda {

// Where a launch goes: the current stream of the tensors' device, which the caller has made current in torch.
struct Target {
  int device;
  void* stream;
};

// Returns why the kernels cannot run on a device; empty where they can. Loads every kernel into the device, which a
// stream that is being captured does not allow everywhere, and makes the device current.
std::string unusable_because(int device);

// Each throws std::runtime_error with the name of the call that failed.
template <typename Args>
void launch_scan(const Args& args, int64_t blocks, const Target& target);
template <typename Args>
void launch_update(const Args& args, int64_t blocks, const Target& target);
void launch_decide(const DecideArguments& args, const Target& target);
void launch_write(const WriteArguments& args, const Target& target);

}  // namespace fused_tricks::cuda
