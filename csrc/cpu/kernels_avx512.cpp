// Sixteen elements at a time: AVX-512 F, BW, DQ and VL.
// GCC 12 warns about the undefined registers inside its own intrinsics (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include "kernels_impl.h"

namespace fused_tricks::cpu {
namespace {

struct FloatVector {
  __m512 lanes;
  explicit FloatVector(__m512 value) : lanes(value) {}
  explicit FloatVector(float value) : lanes(_mm512_set1_ps(value)) {}
};

inline FloatVector fma(FloatVector a, FloatVector b, FloatVector c) {
  return FloatVector(_mm512_fmadd_ps(a.lanes, b.lanes, c.lanes));
}
inline FloatVector mul(FloatVector a, FloatVector b) { return FloatVector(_mm512_mul_ps(a.lanes, b.lanes)); }
inline FloatVector negate(FloatVector a) { return FloatVector(_mm512_xor_ps(a.lanes, _mm512_set1_ps(-0.0f))); }

struct Avx512 {
  using Float = FloatVector;
  static constexpr int64_t kWidth = 16;

  static __m256i load_16_bits(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

  static Float load(const float* from) { return Float(_mm512_loadu_ps(from)); }
  static Float load(const Half* from) { return Float(_mm512_cvtph_ps(load_16_bits(from))); }
  static Float load(const BFloat16* from) {
    return Float(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_16_bits(from)), 16)));
  }

  static void store(float* to, Float value) { _mm512_storeu_ps(to, value.lanes); }
  static __m256i rounded(Half, Float value) {
    return _mm512_cvtps_ph(value.lanes, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // Integer operations, because the AVX-512 conversion to bfloat16 flushes subnormal numbers to zero.
  static __m256i rounded(BFloat16, Float value) {
    const __m512i bits = _mm512_castps_si512(value.lanes);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(value.lanes, value.lanes, _CMP_UNORD_Q);
    const __m512i chosen = _mm512_mask_mov_epi32(sum, is_nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16));
  }

  template <typename Param>
  static void store(Param* to, Float value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded(Param{}, value));
  }
  template <typename Param>
  static void stream(Param* to, Float value) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), rounded(Param{}, value));
  }
  static void finish_streams() { _mm_sfence(); }
};

}  // namespace

const Kernels kAvx512 = kernels_of<Avx512>();

}  // namespace fused_tricks::cpu
