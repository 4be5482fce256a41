// All kernels. The tests also compile this file as plain C++, with a shim in place of the CUDA language.
#pragma once

#include "scan.cuh"
#include "update.cuh"

namespace fused_tricks::cuda {

__global__ void __launch_bounds__(kThreads) write_kernel(const __grid_constant__ WriteArguments args) {
  for (int64_t i = threadIdx.x; i < args.count; i += kThreads) store(args.to + i, args.words[i]);
}

}  // namespace fused_tricks::cuda
