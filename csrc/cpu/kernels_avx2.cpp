// Eight elements at a time: AVX2, FMA and F16C.
#include <immintrin.h>

#include "kernels_impl.h"

namespace fused_tricks::cpu {
namespace {

struct FloatVector {
  __m256 lanes;
  explicit FloatVector(__m256 value) : lanes(value) {}
  explicit FloatVector(float value) : lanes(_mm256_set1_ps(value)) {}
};

inline FloatVector fma(FloatVector a, FloatVector b, FloatVector c) {
  return FloatVector(_mm256_fmadd_ps(a.lanes, b.lanes, c.lanes));
}
inline FloatVector mul(FloatVector a, FloatVector b) { return FloatVector(_mm256_mul_ps(a.lanes, b.lanes)); }
inline FloatVector negate(FloatVector a) { return FloatVector(_mm256_xor_ps(a.lanes, _mm256_set1_ps(-0.0f))); }

struct Avx2 {
  using Float = FloatVector;
  static constexpr int64_t kWidth = 8;

  static __m128i load_16_bits(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }

  static FloatVector load(const float* from) { return FloatVector(_mm256_loadu_ps(from)); }
  static FloatVector load(const Half* from) { return FloatVector(_mm256_cvtph_ps(load_16_bits(from))); }
  static FloatVector load(const BFloat16* from) {
    return FloatVector(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_16_bits(from)), 16)));
  }

  static void store(float* to, FloatVector value) { _mm256_storeu_ps(to, value.lanes); }
  static __m128i rounded(Half, FloatVector value) { return _mm256_cvtps_ph(value.lanes, _MM_FROUND_TO_NEAREST_INT); }
  static __m128i rounded(BFloat16, FloatVector value) {
    const __m256i bits = _mm256_castps_si256(value.lanes);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256 is_nan = _mm256_cmp_ps(value.lanes, value.lanes, _CMP_UNORD_Q);
    const __m256i chosen = _mm256_blendv_epi8(sum, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(is_nan));
    const __m256i high = _mm256_srli_epi32(chosen, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }

  template <typename Param>
  static void store(Param* to, FloatVector value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), rounded(Param{}, value));
  }
  template <typename Param>
  static void stream(Param* to, FloatVector value) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), rounded(Param{}, value));
  }
  static void finish_streams() { _mm_sfence(); }
};

}  // namespace

const Kernels kAvx2 = kernels_of<Avx2>();

}  // namespace fused_tricks::cpu
