// One step over a plan on a GPU: the tables, the kernels' arguments, and at most two launches.
#pragma once

#include <vector>

#include "../plan.h"
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

  // What the caller copies to the device once, and how much more memory it lends for as long as the plan lives.
  const std::vector<TensorRecord>& tensor_records() const { return tensor_records_; }
  const std::vector<ChunkRecord>& chunk_records() const { return chunk_records_; }
  size_t scratch_size() const;
  void set_memory(void* tensors, void* chunks, void* scratch);

  void run(const Plan& plan, const StepRequest& request, const External& external, const Target& target);

 private:
  template <typename Args>
  void launch(const StepRequest& request, const External& external, const Target& target);

  std::vector<TensorRecord> tensor_records_;
  std::vector<ChunkRecord> chunk_records_;
  std::vector<GradAddress> grads_;  // of this step
  std::vector<GroupRecord> groups_;
  std::vector<GradAddress> copied_grads_;  // what the device has, where it needs a copy
  std::vector<GroupRecord> copied_groups_;
  Tables tables_{};
  GradAddress* grad_memory_ = nullptr;
  GroupRecord* group_memory_ = nullptr;
};

}  // namespace fused_tricks::cuda
