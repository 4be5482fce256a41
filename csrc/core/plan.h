// The plan of a step: tensors, groups and the reduction over processes, as kernels take them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "dtype.h"
#include "group.h"
#include "state_tensors.h"
#include "step_state.h"

namespace fused_tricks {

// One parameter.
struct Entry {
  size_t group = 0;
  bool live = false;  // false: it had no gradient when the plan was made, and the fields below are empty
  int64_t count = 0;
  DType type = DType::kFloat32;
  DType grad_type = DType::kFloat32;
  bool is_matrix = false;  // more than one dimension: decays whatever bias_decay says
  void* param = nullptr;
  void* state[kStateTensors] = {};  // null: the parameter has no such tensor
  int64_t* first_update = nullptr;  // number of the update that first wrote the buffer; -1: none yet
  int32_t shard_class = 0;          // which of the reduction's sums of squares the gradient belongs to
  const void* grad = nullptr;       // of this step; null: no gradient, no update
};

// The reduction over processes that hold parts of one model.
struct Reduction {
  // On the parameters' device: found_inf, whether a gradient is FP64, then one sum of squares for each shard class.
  // Null: this process decides alone.
  double* partials = nullptr;
  int32_t shard_classes = 1;
  // Makes the partials those of all processes together. On a GPU that is only launched.
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
