// Replaces the CUDA language, so that csrc/cuda/kernels.cuh compiles as C++ and runs on the CPU: the threads of a block
// are fibers, and blocks run one after the other. The order that a GPU leaves open is unfavourable here: a warp runs to
// its next barrier before another warp starts, forwards in one block and backwards in another, and blocks are shuffled.
// Shared memory is filled with garbage at first. Every access to global memory is checked for alignment and counted.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/low_precision.h"
#include "tables.h"

#define __device__
#define __global__
#define __shared__ extern  // launch.cpp defines all of them
#define __grid_constant__
#define __launch_bounds__(...)

namespace fused_tricks::cuda {

struct Index {
  unsigned x;
};
extern Index threadIdx, blockIdx, gridDim;

// Bytes by kind, and the 32-byte sectors that each warp's instructions request for elements.
struct Traffic {
  int64_t element_bytes_read;
  int64_t element_bytes_written;
  int64_t element_sectors_read;
  int64_t element_sectors_written;
  int64_t table_bytes_read;
  int64_t table_bytes_written;
  int64_t launches;
};
extern Traffic traffic;

void check_alignment(const void* address, size_t alignment);

struct Instruction {
  int line;
  bool is_store;
};
void count_element_access(const void* address, size_t size, size_t alignment, Instruction instruction);

void __syncthreads();
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
inline uint32_t arrive(uint32_t* counter, uint32_t last) {
  const uint32_t old = *counter;
  *counter = old >= last ? 0 : old + 1;
  return old;
}
inline int atomicOr(int* address, int value) {
  const int old = *address;
  *address |= value;
  return old;
}

template <typename T>
T load(const T* address) {
  check_alignment(address, alignof(T));
  traffic.table_bytes_read += sizeof(T);
  return *address;
}

template <typename T>
void store(T* address, T value) {
  check_alignment(address, alignof(T));
  traffic.table_bytes_written += sizeof(T);
  *address = value;
}

template <typename T>
T load_fresh(const T* address) {
  return load(address);
}
template <typename T>
void store_fresh(T* address, T value) {
  store(address, value);
}

// `line` identifies an instruction of a kernel.
template <typename T>
T load_element(const void* address, int line = __builtin_LINE()) {
  count_element_access(address, sizeof(T), alignof(T), {line, false});
  T value;
  std::memcpy(&value, address, sizeof value);
  return value;
}
template <typename T>
T load_element(const T* address, int line = __builtin_LINE()) {
  return load_element<T>(static_cast<const void*>(address), line);
}

template <typename T>
void store_element(T* address, const T& value, int line = __builtin_LINE()) {
  count_element_access(address, sizeof(T), alignof(T), {line, true});
  std::memcpy(static_cast<void*>(address), &value, sizeof value);
}

template <typename T>
Words4 load_words(const T* address, int line = __builtin_LINE()) {
  return load_element<Words4>(static_cast<const void*>(address), line);
}
template <typename T>
Words4 load_words_once(const T* address, int line = __builtin_LINE()) {
  return load_element<Words4>(static_cast<const void*>(address), line);
}
inline Float4 load_once(const float* address, int line = __builtin_LINE()) {
  return load_element<Float4>(static_cast<const void*>(address), line);
}
inline void store_once(float* address, const Float4& value, int line = __builtin_LINE()) {
  store_element(reinterpret_cast<Float4*>(address), value, line);
}
template <typename T>
void store_words(T* address, const Words4& value, int line = __builtin_LINE()) {
  store_element(reinterpret_cast<Words4*>(address), value, line);
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
