// The update of one parameter, written once for every processor. These are the roundings of torch.optim.SGD, whose
// add(alpha=) is a fused multiply-add.
#pragma once

#include <cmath>

#include "inline.h"

namespace fused_tricks {

// Hyper-parameters of one tensor in one step, rounded once to the type that the arithmetic runs in.
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

// V is one number or a vector of them, with fma, mul and negate; it converts from T by repeating it.
// Reads the gradient g, updates the weight w and, where there is momentum, the buffer b.
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
