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

template <typename Args>
void launch(void (*kernel)(Args), const char* name, const Args& args, int64_t blocks, const Target& target) {
  // Torch has another instance of the runtime than this module. What is current in that one is restored by the caller,
  // who can tell whether a device has a context yet: to make a device current creates one.
  int current = 0;
  check(cudaGetDevice(&current), "cudaGetDevice");
  if (current != target.device) check(cudaSetDevice(target.device), "cudaSetDevice");
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

void launch_decide(const DecideArguments& args, const Target& target) {
  launch<DecideArguments>(decide_kernel, "the launch of decide_kernel", args, 1, target);
}

void launch_write(const WriteArguments& args, const Target& target) {
  launch<WriteArguments>(write_kernel, "the launch of write_kernel", args, 1, target);
}

#define FUSED_TRICKS_INSTANTIATE(Args)                                  \
  template void launch_scan<Args>(const Args&, int64_t, const Target&); \
  template void launch_update<Args>(const Args&, int64_t, const Target&);
FUSED_TRICKS_INSTANTIATE(SmallArguments)
FUSED_TRICKS_INSTANTIATE(MediumArguments)
FUSED_TRICKS_INSTANTIATE(LargeArguments)
#undef FUSED_TRICKS_INSTANTIATE

}  // namespace fused_tricks::cuda
