// One element at a time in standard C++: for processors without a vector version, and to test those against.
#include "../low_precision.h"
#include "kernels_impl.h"

namespace fused_tricks::cpu {
namespace {

struct Scalar {
  using Float = float;
  static constexpr int64_t kWidth = 1;
  static float load(const float* from) { return *from; }
  static float load(const Half* from) { return half_to_float(*from); }
  static float load(const BFloat16* from) { return bfloat16_to_float(*from); }
  static void store(float* to, float value) { *to = value; }
  static void store(Half* to, float value) { *to = float_to_half(value); }
  static void store(BFloat16* to, float value) { *to = float_to_bfloat16(value); }

  // A vector of one element has no part.
  template <typename T>
  static float load_first(const T* from, int64_t) {
    return load(from);
  }
  template <typename T>
  static void store_first(T* to, float value, int64_t) {
    store(to, value);
  }
};

}  // namespace

const Kernels kPortable = kernels_of<Scalar>();

}  // namespace fused_tricks::cpu
