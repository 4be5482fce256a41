// The CPU kernels, compiled once for each instruction set, and the choice between them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../core/dtype.h"
#include "../core/sgd_update.h"
#include "../core/state_tensors.h"

namespace fused_tricks::cpu {

// A run of elements of one tensor. `weight` is the FP32 master where there is one, else the parameter.
struct Span {
  const void* grad;
  void* weight;
  void* state[kStateTensors];
  void* param;
  DType grad_type;
  DType param_type;
  int64_t count;
  bool streams;  // the parameter is written past the caches, which would first read what it overwrites
};

struct Kernels {
  bool (*has_non_finite)(const void* grad, DType type, int64_t count);
  // Adds nothing up across calls: the sum over this run alone, in a fixed order.
  double (*sum_of_squares)(const void* grad, DType type, int64_t count);
  void (*update)(const Span& span, const Rule<float>& rule);
  void (*update_double)(const Span& span, const Rule<double>& rule);
};

extern const Kernels kPortable;
#if defined(FUSED_TRICKS_X86)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

// What this processor can run, best first.
std::vector<std::string> instruction_sets();
// The one in use; the best until another is selected.
const Kernels& selected_kernels();
std::string selected_instruction_set();
void select_instruction_set(const std::string& name);

}  // namespace fused_tricks::cpu
