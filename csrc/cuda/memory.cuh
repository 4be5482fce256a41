// All loads and stores of device memory, and the conversions of element types. The emulation replaces this file's
// functions and counts the bytes of elements (parameters, masters, buffers, gradients) apart from tables and scalars.
#pragma once

#include "../core/dtype.h"
#include "tables.h"

namespace fused_tricks::cuda {

struct alignas(16) Words4 {
  uint32_t x, y, z, w;
};

struct alignas(16) Float4 {
  float x, y, z, w;
};

// The two 16-bit elements of a word.
struct Pair {
  float low, high;
};

}  // namespace fused_tricks::cuda

#if defined(FUSED_TRICKS_EMULATION)
#include "cuda_shim.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fused_tricks::cuda {

#if !defined(FUSED_TRICKS_EMULATION)

template <typename T>
__device__ inline T load(const T* address) {
  return *address;
}

template <typename T>
__device__ inline void store(T* address, T value) {
  *address = value;
}

// Access to a single element that is not part of a vector.
template <typename T>
__device__ inline T load_element(const T* address) {
  return load(address);
}

template <typename T>
__device__ inline void store_element(T* address, T value) {
  store(address, value);
}

// Access to memory that several blocks of one launch read and write.
template <typename T>
__device__ inline T load_fresh(const T* address) {
  return *static_cast<const volatile T*>(address);
}

template <typename T>
__device__ inline void store_fresh(T* address, T value) {
  *static_cast<volatile T*>(address) = value;
}

// Increments the counter, from `last` to 0, and returns the old count. Releases the writes of this thread, and acquires
// the writes of all earlier arrivals.
__device__ inline uint32_t arrive(uint32_t* counter, uint32_t last) {
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(__cvta_generic_to_global(counter)), "r"(last)
               : "memory");
  return old;
}

// Intrinsics, because the compiler treats an address from a table as generic, and global accesses are cheaper.
template <typename T>
__device__ inline Words4 load_words(const T* address) {
  const uint4 words = __ldca(reinterpret_cast<const uint4*>(address));
  return {words.x, words.y, words.z, words.w};
}

// For memory that the step does not read again: weights, buffers and, in the update, gradients. Evict-first accesses
// keep the gradients of the scan in the cache.
template <typename T>
__device__ inline Words4 load_words_once(const T* address) {
  const uint4 words = __ldcs(reinterpret_cast<const uint4*>(address));
  return {words.x, words.y, words.z, words.w};
}

__device__ inline Float4 load_once(const float* address) {
  const float4 value = __ldcs(reinterpret_cast<const float4*>(address));
  return {value.x, value.y, value.z, value.w};
}

__device__ inline void store_once(float* address, const Float4& value) {
  __stcs(reinterpret_cast<float4*>(address), make_float4(value.x, value.y, value.z, value.w));
}

template <typename T>
__device__ inline void store_words(T* address, const Words4& words) {
  __stwb(reinterpret_cast<uint4*>(address), make_uint4(words.x, words.y, words.z, words.w));
}

__device__ inline uint32_t bits_of(float value) { return __float_as_uint(value); }
__device__ inline uint64_t bits_of(double value) { return static_cast<uint64_t>(__double_as_longlong(value)); }
__device__ inline float float_of(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline float to_float(Half value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ inline float to_float(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
__device__ inline void round_to(Half& to, float value) { to.bits = __half_as_ushort(__float2half_rn(value)); }
__device__ inline void round_to(BFloat16& to, float value) {
  to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

template <typename T>
__device__ inline Pair unpacked(uint32_t word);
template <>
__device__ inline Pair unpacked<Half>(uint32_t word) {
  __half2 pair;
  memcpy(&pair, &word, sizeof pair);
  return {__low2float(pair), __high2float(pair)};
}
template <>
__device__ inline Pair unpacked<BFloat16>(uint32_t word) {
  return {float_of(word << 16), float_of(word & 0xffff0000u)};
}

// Rounds both elements, in one instruction if the architecture has such an instruction. Must round like `round_to`.
template <typename T>
__device__ inline uint32_t packed(float low, float high);
template <>
__device__ inline uint32_t packed<Half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}
template <>
__device__ inline uint32_t packed<BFloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

#endif

__device__ inline float to_float(float value) { return value; }

template <typename T>
__device__ inline double to_double(T value) {
  return static_cast<double>(to_float(value));
}
__device__ inline double to_double(double value) { return value; }

__device__ inline bool is_aligned(const void* address) { return (reinterpret_cast<uint64_t>(address) & 15u) == 0; }

}  // namespace fused_tricks::cuda
