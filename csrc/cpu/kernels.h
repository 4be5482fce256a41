// The CPU kernels, compiled once for each instruction set, and the choice between them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../core/dtype.h"
#include "../core/sgd_update.h"
#include "../core/state_tensors.h"

namespace fused_tricks::cpu {

// A run of elements of one parameter. `weight` is the FP32 master, or the parameter if the parameter has no master.
struct Span {
  const void* grad;
  void* weight;
  void* state[kStateTensors];
  void* param;
  DType grad_type;
  DType param_type;
  int64_t count;
  bool streams;  // write the parameter around the caches, which saves the read of the overwritten cache lines
};

struct Kernels {
  bool (*has_non_finite)(const void* grad, DType type, int64_t count);
  // Returns the sum over this run, in an order that depends on `count` alone.
  double (*sum_of_squares)(const void* grad, DType type, int64_t count);
  void (*update)(const Span& span, const Rule<float>& rule);
  void (*update_double)(const Span& span, const Rule<double>& rule);
};

extern const Kernels kPortable;
#if defined(FUSED_TRICKS_X86)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

// Returns the names of the instruction sets that this processor supports, best first.
std::vector<std::string> instruction_sets();
// The selected kernels are the best ones until `select_instruction_set` is called.
const Kernels& selected_kernels();
std::string selected_instruction_set();
void select_instruction_set(const std::string& name);

}  // namespace fused_tricks::cpu
