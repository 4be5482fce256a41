// One step over a plan on the CPU.
#pragma once

#include "../plan.h"

namespace fused_tricks::cpu {

// Scan (where the request needs one), decision, update. Returns whether the update was applied.
bool run_step(Plan& plan, StepRequest request);

}  // namespace fused_tricks::cpu
