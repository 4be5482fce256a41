// The launches of the kernels, as host functions.
#pragma once

#include <cstdint>
#include <string>

#include "tables.h"

namespace fused_tricks::cuda {

// The target of a launch: the current stream of the tensors' device, which is torch's current device.
struct Target {
  int device;
  void* stream;
};

// Returns the reason why the kernels cannot run on a device; empty if they can. Loads every kernel into the device,
// because some drivers cannot load a kernel during a capture. Sets the current device.
std::string unusable_because(int device);

// Each function throws std::runtime_error with the name of the failed call.
template <typename Args>
void launch_scan(const Args& args, int64_t blocks, const Target& target);
template <typename Args>
void launch_update(const Args& args, int64_t blocks, const Target& target);
void launch_decide(const DecideArguments& args, const Target& target);
void launch_write(const WriteArguments& args, const Target& target);

}  // namespace fused_tricks::cuda
