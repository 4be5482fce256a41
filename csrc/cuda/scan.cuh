// The scan of the gradients, and the decision of the step after a reduction over processes.
#pragma once

#include "block.cuh"

namespace fused_tricks::cuda {

// An element is not finite if all exponent bits are ones. The addition of one to the exponent, with the sign bit
// cleared, then carries into the sign bit. The carry stays inside each of the two 16-bit elements of a word. Only the
// sign bits of the sums matter, so that the sums of many words are joined by OR before the sign bits are read.
template <typename T>
struct Exponent;
template <>
struct Exponent<Half> {
  static constexpr uint32_t kMagnitude = 0x7fff7fffu, kOne = 0x04000400u, kSign = 0x80008000u;
};
template <>
struct Exponent<BFloat16> {
  static constexpr uint32_t kMagnitude = 0x7fff7fffu, kOne = 0x00800080u, kSign = 0x80008000u;
};
template <>
struct Exponent<float> {
  static constexpr uint32_t kMagnitude = 0x7fffffffu, kOne = 0x00800000u, kSign = 0x80000000u;
};

template <typename T>
__device__ inline uint32_t carries(uint32_t word) {
  return (word & Exponent<T>::kMagnitude) + Exponent<T>::kOne;
}
__device__ inline bool is_finite(Half value) { return (carries<Half>(value.bits) & 0x8000u) == 0; }
__device__ inline bool is_finite(BFloat16 value) { return (carries<BFloat16>(value.bits) & 0x8000u) == 0; }
__device__ inline bool is_finite(float value) { return (carries<float>(bits_of(value)) & 0x80000000u) == 0; }
__device__ inline bool is_finite(double value) { return ((bits_of(value) >> 52) & 0x7ffu) != 0x7ffu; }

// A sum of squares as two FP32 numbers, precise to more than 40 bits. Most GPUs have few FP64 units.
struct SquareSum {
  float high = 0, low = 0;

  // The square of a 16-bit element is exact in FP32. The square of an FP32 element is rounded, and fma returns the
  // error.
  template <bool kIsExact>
  __device__ void add(float value) {
    const float square = mul(value, value);
    const float total = high + square;
    const float added = total - high;
    float error = (high - (total - added)) + (square - added);
    if (!kIsExact) error += fused_tricks::fma(value, value, -square);
    high = total;
    low += error;
  }

  template <typename T>
  __device__ void add_word(uint32_t word) {
    if constexpr (sizeof(T) == 2) {
      const Pair pair = unpacked<T>(word);
      add<true>(pair.low);
      add<true>(pair.high);
    } else {
      add<false>(float_of(word));
    }
  }

  // False if squares may have overflowed FP32, or if the sum is so small that squares that underflowed may matter.
  __device__ bool is_reliable() const { return high >= 0x1p-100f && high <= 0x1p126f; }
};

template <typename T>
__device__ inline double squares_in(uint32_t word) {
  if constexpr (sizeof(T) == 2) {
    const Pair pair = unpacked<T>(word);
    const double low = to_double(pair.low), high = to_double(pair.high);
    return low * low + high * high;
  } else {
    const double value = to_double(float_of(word));
    return value * value;
  }
}

// Returns the sum of squares of this thread's 16-byte vectors in FP64. Not unrolled, because the function rarely runs.
template <typename T>
__device__ inline double squares_in_double(const T* grad, int vectors) {
  constexpr int kPerVector = 16 / sizeof(T);
  double squares = 0;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < vectors; i += kThreads) {
    const Words4 words = load_words(grad + i * kPerVector);
    squares += squares_in<T>(words.x) + squares_in<T>(words.y) + squares_in<T>(words.z) + squares_in<T>(words.w);
  }
  return squares;
}

// Returns true if an element of this thread's share is not finite. Adds the share's squares to `squares`.
template <typename T>
__device__ inline bool scan_span(const T* grad, int count, bool wants_norm, double& squares) {
  bool found = false;
  int done = 0;
  if constexpr (sizeof(T) <= 4) {
    if (is_aligned(grad)) {
      constexpr int kPerVector = 16 / sizeof(T);
      const int vectors = count / kPerVector;
      uint32_t joined = 0, magnitudes = 0;
      SquareSum sum;
      // Number of 16-byte loads that a thread issues before the first use.
      constexpr int kRound = 4;
      for (int first = static_cast<int>(threadIdx.x); first < vectors; first += kRound * kThreads) {
        Words4 words[kRound];
#pragma unroll
        for (int k = 0; k < kRound; ++k) {
          const int i = first + k * kThreads;
          words[k] = {0, 0, 0, 0};
          if (i < vectors) words[k] = load_words(grad + i * kPerVector);
        }
#pragma unroll
        for (int k = 0; k < kRound; ++k) {
          joined |= carries<T>(words[k].x) | carries<T>(words[k].y) | carries<T>(words[k].z) | carries<T>(words[k].w);
          if (wants_norm) {
            magnitudes |= words[k].x | words[k].y | words[k].z | words[k].w;
            sum.add_word<T>(words[k].x);
            sum.add_word<T>(words[k].y);
            sum.add_word<T>(words[k].z);
            sum.add_word<T>(words[k].w);
          }
        }
      }
      if (sum.is_reliable()) {
        squares += to_double(sum.high) + to_double(sum.low);
      } else if ((magnitudes & Exponent<T>::kMagnitude) != 0) {
        squares += squares_in_double(grad, vectors);
      }
      found = (joined & Exponent<T>::kSign) != 0;
      done = vectors * kPerVector;
    }
  }
  for (int i = done + static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    const T element = load_element(grad + i);
    found = found || !is_finite(element);
    const double value = to_double(element);
    if (wants_norm) squares += value * value;
  }
  return found;
}

// Returns the sum over the block, in a fixed order: the lanes of each warp by halves, then the warps in turn.
__device__ inline double block_sum(double value, double* per_warp) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  if (threadIdx.x % kWarpSize == 0) per_warp[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += per_warp[warp];
  return sum;
}

// Writes this process's partials, for the reduction over processes.
__device__ inline void report(const Tables& tables, bool wants_norm, bool in_double, double* per_warp) {
  for (int shard_class = 0; shard_class < tables.shard_classes; ++shard_class) {
    double total = 0;
    for (int64_t i = threadIdx.x; wants_norm && i < tables.chunk_count; i += kThreads) {
      if (load(&tables.chunks[i].shard_class) == shard_class) total += load_fresh(&tables.partial_squares[i]);
    }
    total = block_sum(total, per_warp);
    if (threadIdx.x == 0) store(&tables.partials[kSquares + shard_class], total);
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    store(tables.partials + kFoundInf, load_fresh(&tables.state->found_inf) != 0 ? 1.0 : 0.0);
    store(tables.partials + kInDouble, in_double ? 1.0 : 0.0);
    store(&tables.state->found_inf, 0);
  }
}

template <typename Args>
__global__ void __launch_bounds__(kThreads) scan_kernel(const __grid_constant__ Args args) {
  __shared__ BlockWork work;
  __shared__ double per_warp[kWarps];
  const Tables& tables = args.tables;
  const bool wants_norm = args.request.wants_norm;
  if (threadIdx.x == 0) {
    work.grad = nullptr;
    if (blockIdx.x < tables.chunk_count) {
      const ChunkRecord chunk = load(&tables.chunks[blockIdx.x]);
      find_grad(args, chunk, load(&tables.tensors[chunk.tensor]), work);
    }
  }
  __syncthreads();
  double squares = 0;
  bool found = false;
  if (work.grad != nullptr) {
    switch (work.grad_type) {
      case DType::kFloat16:
        found = scan_span(reinterpret_cast<const Half*>(work.grad), work.count, wants_norm, squares);
        break;
      case DType::kBFloat16:
        found = scan_span(reinterpret_cast<const BFloat16*>(work.grad), work.count, wants_norm, squares);
        break;
      case DType::kFloat32:
        found = scan_span(reinterpret_cast<const float*>(work.grad), work.count, wants_norm, squares);
        break;
      case DType::kFloat64:
        found = scan_span(reinterpret_cast<const double*>(work.grad), work.count, wants_norm, squares);
        break;
    }
  }
  const bool any_found = __syncthreads_or(found) != 0;
  if (any_found && threadIdx.x == 0) atomicOr(&tables.state->found_inf, 1);
  if (wants_norm && blockIdx.x < tables.chunk_count) {
    const double sum = block_sum(squares, per_warp);
    if (threadIdx.x == 0) store(&tables.partial_squares[blockIdx.x], sum);
  }
  if (!arrives_last(tables.state)) return;
  if (tables.partials != nullptr) {
    report(tables, wants_norm, args.request.in_double, per_warp);
    return;
  }
  double total = 0;
  if (wants_norm) {
    for (int64_t i = threadIdx.x; i < tables.chunk_count; i += kThreads)
      total += load_fresh(&tables.partial_squares[i]);
    total = block_sum(total, per_warp);
  }
  if (threadIdx.x == 0) {
    const bool found = load_fresh(&tables.state->found_inf) != 0;
    store_decision(tables.state, decided(args, load(tables.state), found, args.request.in_double, total));
  }
}

// Decides the step from the reduced partials.
__global__ void __launch_bounds__(kThreads) decide_kernel(const __grid_constant__ DecideArguments args) {
  if (threadIdx.x != 0) return;
  const Tables& tables = args.tables;
  double squares = 0;
  for (int shard_class = 0; shard_class < tables.shard_classes; ++shard_class)
    squares += load(&tables.partials[kSquares + shard_class]);
  const bool found = load(tables.partials + kFoundInf) != 0, in_double = load(tables.partials + kInDouble) != 0;
  store_decision(tables.state, decided(args, load(tables.state), found, in_double, squares));
}

}  // namespace fused_tricks::cuda
