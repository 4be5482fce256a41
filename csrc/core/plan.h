// The plan of a step in the form that kernels read: tensors, groups and the reduction over processes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "dtype.h"
#include "group.h"
#include "partials.h"
#include "state_tensors.h"
#include "step_state.h"

namespace fused_tricks {

// One parameter.
struct Entry {
  size_t group = 0;
  bool live = false;  // true if the plan can update the parameter; if false, the fields below are unset
  int64_t count = 0;
  DType type = DType::kFloat32;
  DType grad_type = DType::kFloat32;
  bool is_matrix = false;  // more than one dimension: decays even without `bias_decay`
  void* param = nullptr;
  void* state[kStateTensors] = {};  // null: the parameter has no such tensor
  // Numbers of the updates that first wrote the state tensors; -1 before. Null: the parameter has no such tensor.
  int64_t* first_update[kStateTensors] = {};
  int32_t shard_class = 0;     // index of the gradient's sum of squares in the reduction
  const void* grad = nullptr;  // of this step; null: no update
};

// The reduction over the processes that hold parts of one model.
struct Reduction {
  // On the parameters' device, with the indices of partials.h. Null: this process decides alone.
  double* partials = nullptr;
  int32_t shard_classes = 1;
  // Reduces `partials` over these processes, in place. On a GPU the call may return before the reduction is done.
  std::function<void()> all_reduce;
};

struct Plan {
  std::vector<Entry> entries;
  std::vector<Group> groups;  // of this step
  StepState* state = nullptr;
  Reduction reduction;
  bool in_double = false;  // a gradient of this step is FP64
};

}  // namespace fused_tricks
