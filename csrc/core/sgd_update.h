// The update of one parameter, shared by the CPU and CUDA kernels. fused_tricks/backends/triton/sgd_update.py and
// fused_tricks/backends/reference.py have the same formula. Each operation rounds as in torch.optim.SGD, where
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
  T weight_decay;  // the coefficient; if decoupled, the factor 1 - lr * weight_decay
  T momentum;
  T gradient_weight;  // 1 - dampening
  T minus_lr;
  T ema_weight;  // 1 - decay; -decay if `from_weight`
  bool unscales;
  bool clips;
  bool maximizes;
  bool decays;        // weight decay is added to the gradient
  bool is_decoupled;  // weight decay multiplies the weight
  bool has_momentum;
  bool is_first_update;  // the momentum buffer is uninitialised
  bool nesterov;
  bool averages;
  bool is_first_average;  // the average is uninitialised
  bool from_weight;       // torch.lerp starts at the nearer end: at the weight if 1 - decay >= 0.5
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

// Reads the gradient `g`, updates the weight `w` and, with momentum, the buffer `b`.
// V is a number or a vector of numbers, with fma, mul and negate. V(T) fills a vector with one number.
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
  // The caller rounds `w` to a 16-bit parameter, to nearest even:
  //   CPU        csrc/core/low_precision.h; with F16C `Scalar::store` in csrc/cpu/kernels_impl.h; `rounded` in
  //              csrc/cpu/kernels_avx2.cpp and csrc/cpu/kernels_avx512.cpp
  //   CUDA       `round_to` and `packed` in csrc/cuda/memory.cuh
  //   Triton     `rounded_bits` in fused_tricks/backends/triton/elements.py, `to_bfloat16` in arithmetic.py beside it
  //   reference  the copy of the master at the end of `_update` in fused_tricks/backends/reference.py
  //   import     `load_fp32_state_dict` in fused_tricks/fp32_weights.py
  // `adopt_foreign_values` in fused_tricks/step/plan.py recognises user writes: it compares the parameter with the same
  // rounding of the master. Change both together, or masters are overwritten with rounded values.
}

// Moves the average `e` towards the new weight `w`, rounded as in torch.lerp. Only if `rule.averages`.
template <typename V, typename T>
FUSED_TRICKS_INLINE void average(const Rule<T>& rule, V w, V& e) {
  V start = e;
  if (rule.from_weight) start = w;
  e = fma(V(rule.ema_weight), fma(V(T(-1)), e, w), start);
  if (rule.is_first_average) e = w;
}

}  // namespace fused_tricks
