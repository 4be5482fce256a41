// The options of a parameter group in one step, and the conversion of the options to a tensor's rule.
#pragma once

#include <cstdint>

#include "sgd_update.h"
#include "step_state.h"

namespace fused_tricks {

struct Group {
  const void* lr_pointer;  // array of FP32 or FP64 factors of `lr`; null: `lr` is the rate
  int64_t lr_last;         // index of the last factor
  int64_t lr_origin;       // number of updates applied before the first factor is due
  double lr;
  double momentum;
  double dampening;
  double weight_decay;
  bool lr_is_double;
  bool nesterov;
  bool maximize;
  bool bias_decay;
  bool decoupled_weight_decay;
  bool fits_float;  // no finite option overflows FP32
};

// An option and its key in a group's dict. `lr` is not an Option, because `lr` may be a tensor.
template <typename T>
struct Option {
  const char* key;
  T Group::* field;
};

constexpr Option<double> kNumbers[] = {
    {"momentum", &Group::momentum},
    {"dampening", &Group::dampening},
    {"weight_decay", &Group::weight_decay},
};

constexpr Option<bool> kFlags[] = {
    {"nesterov", &Group::nesterov},
    {"maximize", &Group::maximize},
    {"bias_decay", &Group::bias_decay},
    {"decoupled_weight_decay", &Group::decoupled_weight_decay},
};

// Returns the rule of one tensor. `lr`: the rate of this update. `is_matrix`: the parameter has more than one
// dimension.
template <typename T>
FUSED_TRICKS_INLINE Rule<T> make_rule(const Group& group, double lr, bool is_matrix, bool is_first_update,
                                      const StepState& state, const StepRequest& request) {
  const bool decays = group.weight_decay != 0 && (group.bias_decay || is_matrix);
  Rule<T> rule{};
  rule.inverse_scale = static_cast<T>(state.inverse_scale);
  rule.clip = static_cast<T>(state.clip);
  // Python rounds the product before the subtraction.
  rule.weight_decay =
      static_cast<T>(group.decoupled_weight_decay ? 1.0 - mul(lr, group.weight_decay) : group.weight_decay);
  rule.momentum = static_cast<T>(group.momentum);
  rule.gradient_weight = static_cast<T>(1.0 - group.dampening);
  rule.minus_lr = static_cast<T>(-lr);
  rule.unscales = request.unscales;
  rule.clips = request.wants_norm;
  rule.maximizes = group.maximize;
  rule.decays = decays && !group.decoupled_weight_decay;
  rule.is_decoupled = decays && group.decoupled_weight_decay;
  rule.has_momentum = group.momentum != 0;
  rule.is_first_update = is_first_update;
  rule.nesterov = group.nesterov;
  return rule;
}

}  // namespace fused_tricks
