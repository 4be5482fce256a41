// Stands in for the CUDA language, so that csrc/cuda/kernels.cuh compiles as C++ and runs on the CPU: the threads of a
// block are fibers that take turns at barriers and shuffles, and blocks run one after the other. Every access to
// global memory is checked for alignment and counted.
#pragma once

#include <cstdint>
#include <cstring>

#include "low_precision.h"
#include "tables.h"

#define __device__
#define __global__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(threads)

namespace fused_tricks::cuda {

struct Index {
  unsigned x;
};
extern Index threadIdx, blockIdx, gridDim;

// Bytes by what they are: elements of parameters, masters, buffers and gradients, or tables and scalars.
struct Traffic {
  int64_t element_bytes_read;
  int64_t element_bytes_written;
  int64_t table_bytes_read;
  int64_t table_bytes_written;
  int64_t launches;
};
extern Traffic traffic;

// Lets every other thread of the block come to the same place.
void synchronize(const char* what);
void check_alignment(const void* address, size_t alignment);

inline void __syncthreads() { synchronize("__syncthreads"); }
inline void __threadfence() {}
int __syncthreads_or(int predicate);

uint64_t exchange(uint64_t bits, int lane_mask);

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lane_mask) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(bits, lane_mask);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline int atomicAdd(int* address, int value) {
  const int old = *address;
  *address += value;
  return old;
}
inline int atomicOr(int* address, int value) {
  const int old = *address;
  *address |= value;
  return old;
}

template <typename T>
constexpr bool kIsElement = false;
template <>
inline constexpr bool kIsElement<Half> = true;
template <>
inline constexpr bool kIsElement<BFloat16> = true;
template <>
inline constexpr bool kIsElement<float> = true;

template <typename T>
T load(const T* address) {
  check_alignment(address, alignof(T));
  (kIsElement<T> ? traffic.element_bytes_read : traffic.table_bytes_read) += sizeof(T);
  return *address;
}

template <typename T>
void store(T* address, T value) {
  check_alignment(address, alignof(T));
  (kIsElement<T> ? traffic.element_bytes_written : traffic.table_bytes_written) += sizeof(T);
  *address = value;
}

template <typename T>
T load_fresh(const T* address) {
  return load(address);
}

template <typename Vector>
Vector load_vector(const void* address) {
  check_alignment(address, 16);
  traffic.element_bytes_read += sizeof(Vector);
  Vector value;
  std::memcpy(&value, address, sizeof value);
  return value;
}

template <typename Vector>
void store_vector(void* address, const Vector& value) {
  check_alignment(address, 16);
  traffic.element_bytes_written += sizeof value;
  std::memcpy(address, &value, sizeof value);
}

template <typename T>
Words4 load_words(const T* address) {
  return load_vector<Words4>(address);
}
template <typename T>
Words4 load_words_once(const T* address) {
  return load_vector<Words4>(address);
}
inline Float4 load_once(const float* address) { return load_vector<Float4>(address); }
inline void store_once(float* address, const Float4& value) { store_vector(address, value); }
template <typename T>
void store_words(T* address, const Words4& value) {
  store_vector(address, value);
}

inline uint32_t bits_of(float value) { return float_to_bits(value); }
inline uint64_t bits_of(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) { return bits_to_float(bits); }
inline float to_float(Half value) { return half_to_float(value); }
inline float to_float(BFloat16 value) { return bfloat16_to_float(value); }
inline void round_to(Half& to, float value) { to = float_to_half(value); }
inline void round_to(BFloat16& to, float value) { to = float_to_bfloat16(value); }

template <typename T>
Pair unpacked(uint32_t word) {
  return {to_float(T{static_cast<uint16_t>(word)}), to_float(T{static_cast<uint16_t>(word >> 16)})};
}
template <typename T>
uint32_t packed(float low, float high) {
  T first, second;
  round_to(first, low);
  round_to(second, high);
  return static_cast<uint32_t>(first.bits) | static_cast<uint32_t>(second.bits) << 16;
}

}  // namespace fused_tricks::cuda
