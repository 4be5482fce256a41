// One step over a plan on a GPU: the tables, the kernels' arguments, and at most two launches; a third where processes
// decide together.
#pragma once

#include <vector>

#include "../core/plan.h"
#include "launch.h"
#include "tables.h"

namespace fused_tricks::cuda {

// Scalars of a GradScaler, read by the kernels; null where there are none.
struct External {
  const float* scale;
  const float* found_inf;
};

class Step {
 public:
  explicit Step(const Plan& plan);

  // Bytes of device memory that the caller lends: for what stays as it is for as long as the plan lives, which is
  // written at once, ...
  size_t table_size() const;
  void set_tables(void* memory, const Target& target);
  // ... and for what steps write. It may be exchanged between steps.
  size_t scratch_size() const;
  void set_scratch(void* memory);

  void run(const Plan& plan, const StepRequest& request, const External& external, const Target& target);

 private:
  template <typename Args>
  void launch(const Reduction& reduction, const StepRequest& request, const External& external, const Target& target);

  std::vector<TensorRecord> tensor_records_;
  std::vector<ChunkRecord> chunk_records_;
  std::vector<const void*> grads_;  // of this step
  std::vector<Group> groups_;
  std::vector<const void*> written_grads_;  // what the scratch memory has, where the argument has no room
  std::vector<Group> written_groups_;
  Tables tables_{};
  const void** grad_memory_ = nullptr;
  Group* group_memory_ = nullptr;
};

}  // namespace fused_tricks::cuda
