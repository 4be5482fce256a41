#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "kernels.cuh"
#include "launch.h"

namespace fused_tricks::cuda {

namespace {

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or torch would report it again, for a call of its own
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(status));
}

// The caller's device is current again when this ends.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = previous_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

template <typename Args>
void launch(void (*kernel)(Args), const char* name, const Args& args, int64_t blocks, const Target& target) {
  const DeviceGuard guard(target.device);
  void* arguments[] = {const_cast<Args*>(&args)};
  const auto grid = dim3(static_cast<unsigned>(blocks));
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(kThreads), arguments, 0,
                         static_cast<cudaStream_t>(target.stream)),
        name);
}

}  // namespace

template <typename Args>
void launch_scan(const Args& args, int64_t blocks, const Target& target) {
  launch<Args>(scan_kernel<Args>, "the launch of scan_kernel", args, blocks, target);
}

template <typename Args>
void launch_update(const Args& args, int64_t blocks, const Target& target) {
  launch<Args>(update_kernel<Args>, "the launch of update_kernel", args, blocks, target);
}

void copy_to_device(void* device_memory, const void* host, size_t size, const Target& target) {
  const DeviceGuard guard(target.device);
  check(cudaMemcpyAsync(device_memory, host, size, cudaMemcpyHostToDevice, static_cast<cudaStream_t>(target.stream)),
        "cudaMemcpyAsync");
}

#define FUSED_TRICKS_INSTANTIATE(Args)                                  \
  template void launch_scan<Args>(const Args&, int64_t, const Target&); \
  template void launch_update<Args>(const Args&, int64_t, const Target&);
FUSED_TRICKS_INSTANTIATE(SmallArguments)
FUSED_TRICKS_INSTANTIATE(MediumArguments)
FUSED_TRICKS_INSTANTIATE(LargeArguments)
#undef FUSED_TRICKS_INSTANTIATE

}  // namespace fused_tricks::cuda
