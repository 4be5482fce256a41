// The options of a parameter group in one step, and the conversion of the options to a tensor's rule.
#pragma once

#include <cstdint>

#include "sgd_update.h"
#include "state_tensors.h"
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
  double ema_decay;  // kNone: no average
  bool lr_is_double;
  bool nesterov;
  bool maximize;
  bool bias_decay;
  bool decoupled_weight_decay;
  bool ema_warmup;
  bool fits_float;  // no finite option overflows FP32
};

// The value of an option that is None.
constexpr double kNone = -1.0;

// An option and its key in a group's dict. `lr` is not an Option, because `lr` may be a tensor.
template <typename T>
struct Option {
  using Field = T Group::*;
  const char* key;
  Field field;
  bool takes_none = false;
};

constexpr Option<double> kNumbers[] = {
    {"momentum", &Group::momentum},
    {"dampening", &Group::dampening},
    {"weight_decay", &Group::weight_decay},
    {"ema_decay", &Group::ema_decay, true},
};

constexpr Option<bool> kFlags[] = {
    {"nesterov", &Group::nesterov},     {"maximize", &Group::maximize},
    {"bias_decay", &Group::bias_decay}, {"decoupled_weight_decay", &Group::decoupled_weight_decay},
    {"ema_warmup", &Group::ema_warmup},
};

// True if the options switch a state tensor on. is_in_use in fused_tricks/step/parameters.py has the same conditions.
// The type of a parameter, not an option, determines whether the parameter has a master.
FUSED_TRICKS_INLINE bool uses(const Group& group, size_t tensor) {
  if (tensor == kBuffer) return group.momentum != 0;
  return tensor == kMaster || group.ema_decay >= 0;  // false for NaN
}

// Returns the decay of the average in update number `applied`, which is 1 for the first applied update.
FUSED_TRICKS_INLINE double ema_decay_of(const Group& group, int64_t applied) {
  if (!group.ema_warmup) return group.ema_decay;
  const double updates = static_cast<double>(applied);
  const double ramp = (1.0 + updates) / (10.0 + updates);
  return ramp < group.ema_decay ? ramp : group.ema_decay;
}

// Returns the rule of one tensor. `lr`: the rate of this update. `is_matrix`: the parameter has more than one
// dimension. `is_first`: for each state tensor, true if this update is the first that writes it.
template <typename T>
FUSED_TRICKS_INLINE Rule<T> make_rule(const Group& group, double lr, bool is_matrix, const bool* is_first,
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
  rule.is_first_update = is_first[kBuffer];
  rule.nesterov = group.nesterov;
  rule.averages = uses(group, kEma);
  rule.is_first_average = is_first[kEma];
  if (rule.averages) {
    rule.ema_weight = static_cast<T>(1.0 - ema_decay_of(group, state.applied_steps));
    rule.from_weight = rule.ema_weight >= T(0.5);
    if (rule.from_weight) rule.ema_weight -= T(1);
  }
  return rule;
}

}  // namespace fused_tricks
