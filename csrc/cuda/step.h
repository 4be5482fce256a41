// One step over a plan on a GPU: device tables, kernel arguments, and the launches. A step launches the scan (if the
// request requires a scan) and the update. A reduction over processes adds `decide_kernel`. Gradient addresses or
// groups that exceed the kernel's argument add launches of `write_kernel`, after a change.
#pragma once

#include <vector>

#include "../core/plan.h"
#include "launch.h"
#include "tables.h"

namespace fused_tricks::cuda {

// Device scalars of a GradScaler, which the kernels read; null without a GradScaler.
struct External {
  const float* scale;
  const float* found_inf;
};

class Step {
 public:
  explicit Step(const Plan& plan);

  // Size in bytes of the device tables, which stay the same while the plan lives. The caller allocates the memory, and
  // `set_tables` writes the tables.
  size_t table_size() const;
  void set_tables(void* memory, const Target& target);
  // Size in bytes of the memory that steps write. The caller allocates the memory, and may replace it between steps.
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
  std::vector<const void*> written_grads_;  // addresses in the scratch memory, if they exceed the argument
  std::vector<Group> written_groups_;
  Tables tables_{};
  const void** grad_memory_ = nullptr;
  Group* group_memory_ = nullptr;
};

}  // namespace fused_tricks::cuda
