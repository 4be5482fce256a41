// One step over a plan on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../core/plan.h"

namespace fused_tricks::cpu {

// A run of elements of one entry, the work unit of a thread.
struct Chunk {
  size_t entry;
  int64_t begin;
  int64_t count;
};

class Step {
 public:
  explicit Step(const Plan& plan);

  // Scans (if the request requires a scan), decides and updates. Returns true if the update was applied.
  bool run(const Plan& plan, StepRequest request);

 private:
  std::vector<double> scan(const Plan& plan, const StepRequest& request) const;
  void update(const Plan& plan, const StepRequest& request) const;

  std::vector<Chunk> chunks_;
  int64_t total_count_ = 0;
  bool may_be_new_ = true;  // false once updates have written every state tensor of the plan
};

}  // namespace fused_tricks::cpu
