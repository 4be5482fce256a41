// The input of a launch: device tables, which stay the same while a plan lives, and one by-value argument with the
// values that may change in every step. All pointers are device pointers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../core/chunk.h"
#include "../core/dtype.h"
#include "../core/group.h"
#include "../core/partials.h"
#include "../core/state_tensors.h"
#include "../core/step_state.h"

namespace fused_tricks::cuda {

constexpr int kThreads = 256;

struct TensorRecord {
  void* param;
  void* state[kStateTensors];            // null: the parameter has no such tensor
  int64_t* first_update[kStateTensors];  // numbers of the updates that first wrote the state tensors; -1 before
  int64_t count;
  int32_t group;
  DType type;
  DType grad_type;
  bool is_matrix;  // more than one dimension: decays even without `bias_decay`
};

struct ChunkRecord {
  int64_t begin;
  int32_t tensor;
  int32_t shard_class;  // index of the gradient's sum of squares in the partials
};

struct Tables {
  const TensorRecord* tensors;
  const ChunkRecord* chunks;
  int64_t chunk_count;
  StepState* state;
  double* partial_squares;  // one for each chunk
  double* partials;         // of StepReduction; null: this process decides alone
  int32_t shard_classes;
};

// The argument itself has room for kGrads gradient addresses and kGroups groups. Larger models use the arrays at
// `more_grads` and `more_groups`.
template <int kGrads, int kGroups>
struct Arguments {
  Tables tables;
  StepRequest request;
  const float* external_scale;      // GradScaler's grad_scale; null: request.grad_scale
  const float* external_found_inf;  // GradScaler's found_inf; null: request.found_inf
  bool scanned;                     // true: the step is decided before the update; false: the update decides
  const void** more_grads;          // null: `grads`
  const Group* more_groups;         // null: `groups`
  const void* grads[kGrads];
  Group groups[kGroups];
};

// Three sizes, because every launch copies the whole argument.
using SmallArguments = Arguments<256, 4>;
using MediumArguments = Arguments<1024, 16>;
using LargeArguments = Arguments<3584, 48>;

// The argument of `decide_kernel`, which runs after a reduction over processes.
struct DecideArguments {
  Tables tables;
  StepRequest request;
  const float* external_scale;
  const float* external_found_inf;
};

// Words that a kernel writes from its argument to device memory. Unlike a copy from host memory, the launch requires no
// host memory that stays alive, and a captured CUDA graph contains the words.
struct WriteArguments {
  static constexpr size_t kCapacity = 4080;
  uint64_t* to;
  int64_t count;
  uint64_t words[kCapacity];
};

constexpr size_t kArgumentLimit = 32764;  // bytes, since CUDA 12.1
static_assert(sizeof(LargeArguments) <= kArgumentLimit && sizeof(WriteArguments) <= kArgumentLimit);

}  // namespace fused_tricks::cuda
