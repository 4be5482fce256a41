// The CPU kernels, templates over `Simd`: a vector type `Float` of `kWidth` floats, with load and store for each
// element type and the operations of sgd_update.h. Each kernels_*.cpp includes this file once. The anonymous namespace
// stops the linker from sharing a function that is compiled for another instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "../core/low_precision.h"
#include "kernels.h"

namespace fused_tricks::cpu {
namespace {

// A vector of one element.
struct Scalar {
  using Float = float;
  static constexpr int64_t kWidth = 1;
  static float load(const float* from) { return *from; }
#if defined(__F16C__)
  static float load(const Half* from) { return _cvtsh_ss(from->bits); }
  static void store(Half* to, float value) { to->bits = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
#else
  static float load(const Half* from) { return half_to_float(*from); }
  static void store(Half* to, float value) { *to = float_to_half(value); }
#endif
  static float load(const BFloat16* from) { return bfloat16_to_float(*from); }
  static void store(float* to, float value) { *to = value; }
  static void store(BFloat16* to, float value) { *to = float_to_bfloat16(value); }
  template <typename Param>
  static void stream(Param* to, float value) {
    store(to, value);
  }
  static void finish_streams() {}
};

// An element is not finite if all exponent bits are ones. The addition of one to the exponent, with the sign bit
// cleared, then carries into the sign bit.
template <typename Bits>
bool any_exponent_full(const Bits* bits, int64_t count, Bits exponent_one) {
  constexpr Bits kSign = static_cast<Bits>(Bits(1) << (8 * sizeof(Bits) - 1));
  Bits carry = 0;
  for (int64_t i = 0; i < count; ++i) {
    carry = static_cast<Bits>(carry | static_cast<Bits>((bits[i] & static_cast<Bits>(~kSign)) + exponent_one));
  }
  return (carry & kSign) != 0;
}

bool has_non_finite(const void* grad, DType type, int64_t count) {
  switch (type) {
    case DType::kFloat16:
      return any_exponent_full(static_cast<const uint16_t*>(grad), count, uint16_t(1u << 10));
    case DType::kBFloat16:
      return any_exponent_full(static_cast<const uint16_t*>(grad), count, uint16_t(1u << 7));
    case DType::kFloat32:
      return any_exponent_full(static_cast<const uint32_t*>(grad), count, uint32_t(1u << 23));
    case DType::kFloat64:
      return any_exponent_full(static_cast<const uint64_t*>(grad), count, uint64_t(1) << 52);
  }
  return false;
}

// Element i is added to lane i % 16 for every vector width, so that all instruction sets return the same bits. The
// square of an FP32 number is exact in FP64 and does not overflow.
constexpr int64_t kLanes = 16;

double sum_of_lanes(const double* lanes) {
  double sum = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

template <typename Simd, typename T>
double sum_of_squares_of(const T* grad, int64_t count) {
  double lanes[kLanes] = {};
  float values[kLanes];
  const auto add = [&](const T* block) {
    for (int64_t i = 0; i < kLanes; i += Simd::kWidth) Simd::store(values + i, Simd::load(block + i));
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] += static_cast<double>(values[i]) * static_cast<double>(values[i]);
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) add(grad + i);
  if (i < count) {
    T padded[kLanes] = {};
    std::memcpy(padded, grad + i, static_cast<size_t>(count - i) * sizeof(T));
    add(padded);
  }
  return sum_of_lanes(lanes);
}

template <>
double sum_of_squares_of<void, double>(const double* grad, int64_t count) {
  double lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i % kLanes] += grad[i] * grad[i];
  return sum_of_lanes(lanes);
}

template <typename Simd>
double sum_of_squares(const void* grad, DType type, int64_t count) {
  switch (type) {
    case DType::kFloat16:
      return sum_of_squares_of<Simd>(static_cast<const Half*>(grad), count);
    case DType::kBFloat16:
      return sum_of_squares_of<Simd>(static_cast<const BFloat16*>(grad), count);
    case DType::kFloat32:
      return sum_of_squares_of<Simd>(static_cast<const float*>(grad), count);
    case DType::kFloat64:
      return sum_of_squares_of<void, double>(static_cast<const double*>(grad), count);
  }
  return 0;
}

// `Param` is float if the weight is the parameter itself. `kAverages` is `rule.averages`.
template <typename Simd, bool kStreams, bool kAverages, typename Param, typename Grad>
void update_vector(const Grad* grad, float* weight, float* buffer, float* ema, Param* param, const Rule<float>& rule) {
  using V = typename Simd::Float;
  V w = Simd::load(weight);
  V b = rule.has_momentum && !rule.is_first_update ? Simd::load(buffer) : V(0.0f);
  sgd_update(rule, Simd::load(grad), w, b);
  Simd::store(weight, w);
  if (rule.has_momentum) Simd::store(buffer, b);
  if constexpr (kAverages) {
    V e = rule.is_first_average ? w : Simd::load(ema);
    average(rule, w, e);
    Simd::store(ema, e);
  }
  if constexpr (kStreams) {
    Simd::stream(param, w);
  } else if constexpr (!std::is_same_v<Param, float>) {
    Simd::store(param, w);
  }
}

template <typename Simd, bool kAverages, typename Param, typename Grad>
void update_span(const Span& span, const Rule<float>& shared_rule) {
  const Rule<float> rule = shared_rule;  // a local copy stays in registers, because no store can alias the copy
  const auto* grad = static_cast<const Grad*>(span.grad);
  auto* weight = static_cast<float*>(span.weight);
  // The pointer to a missing tensor is never dereferenced, but arithmetic on a null pointer is undefined.
  auto* buffer = static_cast<float*>(span.state[kBuffer] != nullptr ? span.state[kBuffer] : span.weight);
  auto* ema = static_cast<float*>(span.state[kEma] != nullptr ? span.state[kEma] : span.weight);
  auto* param = static_cast<Param*>(span.param);
  int64_t i = 0;
  if constexpr (!std::is_same_v<Param, float>) {
    if (span.streams && reinterpret_cast<uintptr_t>(param) % (sizeof(Param) * Simd::kWidth) == 0) {
      for (; i + Simd::kWidth <= span.count; i += Simd::kWidth) {
        update_vector<Simd, true, kAverages, Param, Grad>(grad + i, weight + i, buffer + i, ema + i, param + i, rule);
      }
      Simd::finish_streams();
    }
  }
  for (; i + Simd::kWidth <= span.count; i += Simd::kWidth) {
    update_vector<Simd, false, kAverages, Param, Grad>(grad + i, weight + i, buffer + i, ema + i, param + i, rule);
  }
  for (; i < span.count; ++i) {
    update_vector<Scalar, false, kAverages, Param, Grad>(grad + i, weight + i, buffer + i, ema + i, param + i, rule);
  }
}

template <typename Simd, bool kAverages>
void update_types(const Span& span, const Rule<float>& rule) {
  const DType grad_type = span.grad_type;
  switch (span.param_type) {
    case DType::kFloat16:
      if (grad_type == DType::kFloat16) return update_span<Simd, kAverages, Half, Half>(span, rule);
      return update_span<Simd, kAverages, Half, float>(span, rule);
    case DType::kBFloat16:
      if (grad_type == DType::kBFloat16) return update_span<Simd, kAverages, BFloat16, BFloat16>(span, rule);
      return update_span<Simd, kAverages, BFloat16, float>(span, rule);
    case DType::kFloat32:
      if (grad_type == DType::kFloat16) return update_span<Simd, kAverages, float, Half>(span, rule);
      if (grad_type == DType::kBFloat16) return update_span<Simd, kAverages, float, BFloat16>(span, rule);
      return update_span<Simd, kAverages, float, float>(span, rule);
    case DType::kFloat64:
      return;
  }
}

template <typename Simd>
void update(const Span& span, const Rule<float>& rule) {
  // A branch in the loops would slow down the updates without an average.
  rule.averages ? update_types<Simd, true>(span, rule) : update_types<Simd, false>(span, rule);
}

void update_double(const Span& span, const Rule<double>& shared_rule) {
  const Rule<double> rule = shared_rule;
  const auto* grad = static_cast<const double*>(span.grad);
  auto* weight = static_cast<double*>(span.weight);
  auto* buffer = static_cast<double*>(span.state[kBuffer]);
  auto* ema = static_cast<double*>(span.state[kEma]);
  for (int64_t i = 0; i < span.count; ++i) {
    double w = weight[i];
    double b = rule.has_momentum && !rule.is_first_update ? buffer[i] : 0.0;
    sgd_update(rule, grad[i], w, b);
    weight[i] = w;
    if (rule.has_momentum) buffer[i] = b;
    if (rule.averages) {
      double e = rule.is_first_average ? w : ema[i];
      average(rule, w, e);
      ema[i] = e;
    }
  }
}

template <typename Simd>
constexpr Kernels kernels_of() {
  return {has_non_finite, sum_of_squares<Simd>, update<Simd>, update_double};
}

}  // namespace
}  // namespace fused_tricks::cpu
