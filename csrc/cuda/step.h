// One step over a plan on a GPU: the device tables, the kernels' arguments, and at most two launches. A reduction over
// processes adds a third launch.
#pragma once

#include <vector>

#include "../core/plan.h"
#include "launch.h"
#include "tables.h"

namespace fused_tricks::cuda {

// Scalars of a GradScaler on the device; null without a GradScaler.
struct External {
  const float* scale;
  const float* found_inf;
};

class Step {
 public:
  explicit Step(const Plan& plan);

  // The size of the device tables, which the caller allocates and `set_tables` writes once.
  size_t table_size() const;
  void set_tables(void* memory, const Target& target);
  // The size of the scratch memory of a step. It may be replaced between steps.
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
  std::vector<const void*> written_grads_;  // the content of the scratch memory, if the argument is too small
  std::vector<Group> written_groups_;
  Tables tables_{};
  const void** grad_memory_ = nullptr;
  Group* group_memory_ = nullptr;
};

}  // namespace fused_tricks::cuda
