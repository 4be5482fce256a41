// The data of a launch: device tables, which are constant for a plan, and one by-value argument with the data of the
// step. All pointers are device pointers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../core/dtype.h"
#include "../core/group.h"
#include "../core/state_tensors.h"
#include "../core/step_state.h"

namespace fused_tricks::cuda {

constexpr int kThreads = 256;
// Elements of a chunk, the work of one block.
constexpr int kChunk = 8192;

struct TensorRecord {
  void* param;
  void* state[kStateTensors];  // null: the parameter has no such tensor
  int64_t* first_update;       // number of the update that first wrote the buffer; -1: none yet
  int64_t count;
  int32_t group;
  DType type;
  DType grad_type;
  bool is_matrix;  // more than one dimension: decays whatever bias_decay says
};

struct ChunkRecord {
  int64_t begin;
  int32_t tensor;
  int32_t shard_class;  // which of the partials' sums of squares its gradient belongs to
};

struct Tables {
  const TensorRecord* tensors;
  const ChunkRecord* chunks;
  int64_t chunk_count;
  StepState* state;
  double* partial_squares;  // one for each chunk
  double* partials;         // StepReduction's; null: this process decides alone
  int32_t shard_classes;
};

// The argument contains up to kGrads addresses and kGroups groups. Larger models use the arrays behind the pointers.
template <int kGrads, int kGroups>
struct Arguments {
  Tables tables;
  StepRequest request;
  const float* external_scale;      // GradScaler's grad_scale; null: request.grad_scale
  const float* external_found_inf;  // GradScaler's found_inf; null: request.found_inf
  bool scanned;                     // a scan of this step has run and has decided
  const void** more_grads;          // null: `grads`
  const Group* more_groups;         // null: `groups`
  const void* grads[kGrads];
  Group groups[kGroups];
};

// Three sizes, because every launch copies the whole argument.
using SmallArguments = Arguments<256, 4>;
using MediumArguments = Arguments<1024, 16>;
using LargeArguments = Arguments<3584, 48>;

// The argument of the decide kernel, which runs after a reduction over processes.
struct DecideArguments {
  Tables tables;
  StepRequest request;
  const float* external_scale;
  const float* external_found_inf;
};

// Words that a kernel writes from its argument to device memory. A step therefore copies nothing from the host, no host
// memory has to outlive a launch, and a captured graph writes what its kernels read.
struct WriteArguments {
  static constexpr size_t kCapacity = 4080;
  uint64_t* to;
  int64_t count;
  uint64_t words[kCapacity];
};

constexpr size_t kArgumentLimit = 32764;  // bytes, since CUDA 12.1
static_assert(sizeof(LargeArguments) <= kArgumentLimit && sizeof(WriteArguments) <= kArgumentLimit);

}  // namespace fused_tricks::cuda
