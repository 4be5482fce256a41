// The element types of parameters and gradients.
#pragma once

#include <cstddef>
#include <cstdint>

#include "inline.h"

namespace fused_tricks {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

enum class DType : uint8_t { kFloat16, kBFloat16, kFloat32, kFloat64 };
constexpr size_t kDTypes = 4;
constexpr const char* kDTypeNames[kDTypes] = {"float16", "bfloat16", "float32", "float64"};

FUSED_TRICKS_INLINE int64_t size_of(DType type) {
  switch (type) {
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kFloat32:
      return 4;
    case DType::kFloat64:
      return 8;
  }
  return 0;
}

}  // namespace fused_tricks
