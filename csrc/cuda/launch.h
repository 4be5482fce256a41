// The host functions that launch the kernels.
#pragma once

#include <cstdint>
#include <string>

#include "tables.h"

namespace fused_tricks::cuda {

// The target of a launch: torch's current stream of the tensors' device. The caller has made the device current in
// torch.
struct Target {
  int device;
  void* stream;
};

// Returns the reason why the kernels cannot run on a device; empty if the kernels can run. Makes the device current and
// loads every kernel into the device, which may fail while a stream is captured.
std::string unusable_because(int device);

// Each function throws std::runtime_error with the name of the failed call.
template <typename Args>
void launch_scan(const Args& args, int64_t blocks, const Target& target);
template <typename Args>
void launch_update(const Args& args, int64_t blocks, const Target& target);
void launch_decide(const DecideArguments& args, const Target& target);
void launch_write(const WriteArguments& args, const Target& target);

}  // namespace fused_tricks::cuda
