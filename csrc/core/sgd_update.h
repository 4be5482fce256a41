// The update of one parameter, written once for every processor. The roundings are those of torch.optim.SGD, whose
// add(alpha=) is a fused multiply-add.
#pragma once

#include <cmath>

#include "inline.h"

namespace fused_tricks {

// Hyper-parameters of one tensor in one step, rounded once to the type of the arithmetic.
template <typename T>
struct Rule {
  T inverse_scale;
  T clip;
  T weight_decay;  // the coefficient, or the factor 1 - lr * weight_decay of a decoupled decay
  T momentum;
  T gradient_weight;  // 1 - dampening
  T minus_lr;
  bool unscales;
  bool clips;
  bool maximizes;
  bool decays;        // the decay adds to the gradient
  bool is_decoupled;  // the decay multiplies the weight
  bool has_momentum;
  bool is_first_update;  // the momentum buffer is uninitialised
  bool nesterov;
};

FUSED_TRICKS_INLINE float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return std::fmaf(a, b, c);
#endif
}

FUSED_TRICKS_INLINE double fma(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

FUSED_TRICKS_INLINE float mul(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

FUSED_TRICKS_INLINE double mul(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

FUSED_TRICKS_INLINE float negate(float a) { return -a; }
FUSED_TRICKS_INLINE double negate(double a) { return -a; }

// V is a number or a vector of numbers with fma, mul and negate, and V(T) repeats one number. The function reads the
// gradient g, and updates the weight w and, with momentum, the buffer b.
//
// A 16-bit parameter is the rounding of w. Each processor rounds by itself: low_precision.h, cpu/kernels_impl.h,
// cpu/kernels_avx2.cpp, cpu/kernels_avx512.cpp, round_to and packed in cuda/memory.cuh, and in fused_tricks/backends
// triton/elements.py and reference.py. adopt_foreign_values in fused_tricks/step/plan.py compares a parameter with the
// rounding of its master to recognise writes of user code. Another rounding must change all of these places.
template <typename V, typename T>
FUSED_TRICKS_INLINE void sgd_update(const Rule<T>& rule, V g, V& w, V& b) {
  if (rule.unscales) g = mul(g, V(rule.inverse_scale));
  if (rule.clips) g = mul(g, V(rule.clip));
  if (rule.maximizes) g = negate(g);
  if (rule.is_decoupled) w = mul(w, V(rule.weight_decay));
  if (rule.decays) g = fma(V(rule.weight_decay), w, g);
  V d = g;
  if (rule.has_momentum) {
    b = rule.is_first_update ? g : fma(V(rule.gradient_weight), g, mul(V(rule.momentum), b));
    d = rule.nesterov ? fma(V(rule.momentum), b, g) : b;
  }
  w = fma(V(rule.minus_lr), d, w);
}

}  // namespace fused_tricks
