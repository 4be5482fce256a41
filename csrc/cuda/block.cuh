// The common part of scan and update: the work of one block, the test for the last block, and the decision.
#pragma once

#include "memory.cuh"
#include "tables.h"

namespace fused_tricks::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;

// The work of one block, which thread 0 reads from the device tables.
struct BlockWork {
  Rule<float> rule;
  Rule<double> double_rule;  // for FP64 parameters
  const char* grad;          // null: no work
  char* weight;
  char* state[kStateTensors];  // undefined if the parameter has no such tensor
  char* param;
  int count;
  DType type;
  DType grad_type;
};

template <typename Args>
__device__ inline void find_grad(const Args& args, const ChunkRecord& chunk, const TensorRecord& tensor,
                                 BlockWork& work) {
  const void* address = args.more_grads != nullptr ? load(&args.more_grads[chunk.tensor]) : args.grads[chunk.tensor];
  const int64_t rest = tensor.count - chunk.begin;
  work.type = tensor.type;
  work.grad_type = tensor.grad_type;
  work.count = static_cast<int>(rest < kCudaChunk ? rest : kCudaChunk);
  work.grad =
      address == nullptr ? nullptr : static_cast<const char*>(address) + chunk.begin * size_of(tensor.grad_type);
}

// True in the last block of the launch that calls this function. All earlier writes by thread 0 of the other blocks are
// then visible in the last block. The counter wraps to zero, so that the count is right again after two
// launches of one size have overlapped by mistake. A new plan sets the counter to zero.
__device__ inline bool arrives_last(StepState* state) {
  bool is_last = false;
  if (threadIdx.x == 0) is_last = arrive(&state->arrivals, gridDim.x - 1) == gridDim.x - 1;
  return __syncthreads_or(is_last) != 0;
}

// Stores a decision, except `arrivals`, which other blocks may be counting.
__device__ inline void store_decision(StepState* to, const StepState& state) {
  constexpr int kArrivals = offsetof(StepState, arrivals) / sizeof(uint32_t);
  uint32_t words[sizeof state / sizeof(uint32_t)];
  memcpy(words, &state, sizeof state);
  auto* stored = reinterpret_cast<uint32_t*>(to);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof state / sizeof(uint32_t)); ++i) {
    if (i != kArrivals) store(stored + i, words[i]);
  }
}

template <typename Args>
__device__ inline StepState decided(const Args& args, StepState state, bool found, bool in_double, double squares) {
  StepRequest request = args.request;
  request.in_double = in_double;
  if (args.external_scale != nullptr) request.grad_scale = load(args.external_scale);
  if (args.external_found_inf != nullptr) request.found_inf = load(args.external_found_inf) != 0.0f;
  decide_step(state, found, squares, request);
  state.found_inf = 0;
  return state;
}

}  // namespace fused_tricks::cuda
