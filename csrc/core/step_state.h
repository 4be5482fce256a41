// The decision of a step for all tensors together: skipped or applied, the clipping factor, the next loss scale.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "sgd_update.h"

namespace fused_tricks {

// step_state, on the parameters' device, so that a step on a GPU does not synchronise with the host.
// fused_tricks/step/device_state.py and fused_tricks/backends/triton/decision.py use the same offsets.
struct StepState {
  float scale;
  int32_t growth_tracker;
  int32_t hysteresis_tracker;
  int32_t found_inf;  // scratch of the GPU kernels
  int64_t applied_steps;
  int64_t skipped_steps;
  int32_t skip;  // 1 if the last step was skipped
  float inverse_scale;
  double clip;        // FP32 precision, or FP64 if a gradient is FP64
  uint32_t arrivals;  // scratch of the GPU kernels
  int32_t skipped_in_a_row;
  double grad_norm;  // FP32 precision, or FP64 if a gradient is FP64
};

static_assert(sizeof(StepState) == 64, "fused_tricks/step/device_state.py allocates it");

struct ScaleRule {
  double growth_factor;
  double backoff_factor;
  float min_scale;
  float max_scale;
  int32_t growth_interval;
  int32_t hysteresis;
};

struct StepRequest {
  bool unscales;     // gradients are scaled, by StepState::scale or `grad_scale`
  bool external;     // a GradScaler owns and adjusts the scale
  float grad_scale;  // the scale of the GradScaler
  bool found_inf;    // found_inf of the GradScaler
  bool wants_norm;   // measure the gradient norm and clip to `max_norm`
  bool in_double;    // a gradient is FP64; norm and clip stay in FP64
  double max_norm;
  bool dynamic;  // adjust the scale by `rule`
  ScaleRule rule;

  // True if the step scans the gradients before the update. A GradScaler passes its own found_inf instead.
  FUSED_TRICKS_INLINE bool scans() const { return (unscales && !external) || wants_norm; }
};

// Adjusts the loss scale by GradScaler's rule with Apex's hysteresis, then clamps to [min_scale, max_scale].
FUSED_TRICKS_INLINE void advance_scale(StepState& state, bool found, const ScaleRule& rule) {
  if (found) {
    state.growth_tracker = 0;
    if (state.hysteresis_tracker > 0) state.hysteresis_tracker -= 1;
    if (state.hysteresis_tracker > 0) return;
    state.scale = static_cast<float>(state.scale * rule.backoff_factor);
  } else {
    state.hysteresis_tracker = rule.hysteresis;
    if (state.growth_tracker < INT32_MAX) state.growth_tracker += 1;
    if (state.growth_tracker >= rule.growth_interval) {
      const float grown = static_cast<float>(state.scale * rule.growth_factor);
      if (std::isfinite(grown)) state.scale = grown;
      state.growth_tracker = 0;
    }
  }
  if (state.scale < rule.min_scale) state.scale = rule.min_scale;
  if (state.scale > rule.max_scale) state.scale = rule.max_scale;
}

// Returns the index of the learning-rate factor for the update after `applied` updates.
FUSED_TRICKS_INLINE int64_t factor_due(int64_t applied, int64_t origin, int64_t last) {
  const int64_t position = applied - origin;
  if (position < 0) return 0;
  return position < last ? position : last;
}

// Returns the factor that clips gradients of this norm to `max_norm`.
template <typename T>
FUSED_TRICKS_INLINE T clip_factor(T norm, T max_norm) {
  const T ratio = max_norm / (norm + static_cast<T>(1e-6));
  return ratio < T(1) ? ratio : T(1);
}

// Decides the step and records the decision in `state`. `found`: a gradient element is not finite. `squares`: the sum
// of the squares of all gradient elements, still scaled.
FUSED_TRICKS_INLINE void decide_step(StepState& state, bool found, double squares, const StepRequest& request) {
  found = found || request.found_inf;
  state.inverse_scale = request.unscales ? 1.0f / (request.external ? request.grad_scale : state.scale) : 1.0f;
  state.clip = 1.0;
  if (request.wants_norm) {
    const double norm = std::sqrt(squares) * static_cast<double>(state.inverse_scale);
    if (request.in_double) {
      state.grad_norm = norm;
      state.clip = clip_factor(norm, request.max_norm);
    } else {
      const float rounded = static_cast<float>(norm);
      state.grad_norm = static_cast<double>(rounded);
      state.clip = static_cast<double>(clip_factor(rounded, static_cast<float>(request.max_norm)));
    }
  }
  state.skip = found;
  if (found) {
    state.skipped_steps += 1;
    if (state.skipped_in_a_row < INT32_MAX) state.skipped_in_a_row += 1;
  } else {
    state.applied_steps += 1;
    state.skipped_in_a_row = 0;
  }
  if (request.dynamic) advance_scale(state, found, request.rule);
}

}  // namespace fused_tricks
