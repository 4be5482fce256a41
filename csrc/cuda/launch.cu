#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.cuh"
#include "launch.h"

namespace fused_tricks::cuda {

namespace {

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // the runtime keeps the error until this read
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(status));
}

// Returns "12.4" for the version number 12040.
std::string release(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

template <typename Args>
void add_kernels(std::vector<const void*>& kernels) {
  kernels.push_back(reinterpret_cast<const void*>(scan_kernel<Args>));
  kernels.push_back(reinterpret_cast<const void*>(update_kernel<Args>));
}

template <typename Args>
void launch(void (*kernel)(Args), const char* name, const Args& args, int64_t blocks, const Target& target) {
  // This module links its own CUDA runtime. The caller restores torch's current device, because cudaSetDevice creates a
  // context, and torch skips the call for a device without a context.
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

std::string unusable_because(int device) {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    cudaGetLastError();
    return "there is no driver for NVIDIA GPUs";
  }
  if (driver / 1000 < CUDART_VERSION / 1000) {
    return "the driver supports CUDA " + release(driver) + " and the extension was built with CUDA " +
           release(CUDART_VERSION) + "; update the driver, or build fused_tricks with a CUDA " +
           std::to_string(driver / 1000) + " toolkit";
  }
  std::vector<const void*> kernels = {reinterpret_cast<const void*>(decide_kernel),
                                      reinterpret_cast<const void*>(write_kernel)};
  add_kernels<SmallArguments>(kernels);
  add_kernels<MediumArguments>(kernels);
  add_kernels<LargeArguments>(kernels);
  cudaError_t status = cudaSetDevice(device);
  for (const void* kernel : kernels) {
    cudaFuncAttributes attributes;
    if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, kernel);
  }
  if (status == cudaSuccess) return "";
  cudaGetLastError();
  return std::string("its kernels cannot be loaded (") + cudaGetErrorString(status) +
         "); TORCH_CUDA_ARCH_LIST chooses the architectures that fused_tricks is built for";
}

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
