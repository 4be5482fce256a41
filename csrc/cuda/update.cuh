// The update of every tensor that has a gradient.
#pragma once

#include "block.cuh"

namespace fused_tricks::cuda {

// Returns the learning rate of the update after `applied` updates.
__device__ inline double learning_rate(const Group& group, int64_t applied) {
  if (group.lr_pointer == nullptr) return group.lr;
  const int64_t due = factor_due(applied, group.lr_origin, group.lr_last);
  if (group.lr_is_double) return mul(group.lr, load(static_cast<const double*>(group.lr_pointer) + due));
  return mul(group.lr, static_cast<double>(load(static_cast<const float*>(group.lr_pointer) + due)));
}

// True if update `number` is the first to write a state tensor, whose note is `noted`. In that update, the block of the
// first chunk stores `number`, and the blocks of the other chunks read -1 or `number`. Both mean "first".
__device__ inline bool is_first_update(int64_t* noted, const ChunkRecord& chunk, int64_t number) {
  const int64_t first_update = load_fresh(noted);
  if (first_update < 0 && chunk.begin == 0) store_fresh(noted, number);
  return first_update < 0 || first_update == number;
}

template <typename Args>
__device__ inline void prepare_update(const Args& args, const StepState& state, int64_t index, BlockWork& work) {
  const ChunkRecord chunk = load(&args.tables.chunks[index]);
  const TensorRecord tensor = load(&args.tables.tensors[chunk.tensor]);
  find_grad(args, chunk, tensor, work);
  if (state.skip != 0) work.grad = nullptr;
  if (work.grad == nullptr) return;
  const Group group = args.more_groups != nullptr ? load(&args.more_groups[tensor.group]) : args.groups[tensor.group];
  bool is_first[kStateTensors];
#pragma unroll
  for (size_t i = 0; i < kStateTensors; ++i)
    is_first[i] = tensor.first_update[i] != nullptr && uses(group, i) &&
                  is_first_update(tensor.first_update[i], chunk, state.applied_steps);
  const double lr = learning_rate(group, state.applied_steps - 1);
  const int64_t state_size = tensor.type == DType::kFloat64 ? 8 : 4;
  work.param = static_cast<char*>(tensor.param) + chunk.begin * size_of(tensor.type);
#pragma unroll
  for (size_t i = 0; i < kStateTensors; ++i)
    work.state[i] = static_cast<char*>(tensor.state[i]) + chunk.begin * state_size;
  work.weight = tensor.state[kMaster] == nullptr ? work.param : work.state[kMaster];
  if (tensor.type == DType::kFloat32 && tensor.grad_type != DType::kFloat32) {
    work.type = tensor.grad_type;
    work.param = nullptr;
  }
  if (tensor.type == DType::kFloat64) {
    work.double_rule = make_rule<double>(group, lr, tensor.is_matrix, is_first, state, args.request);
  } else {
    work.rule = make_rule<float>(group, lr, tensor.is_matrix, is_first, state, args.request);
  }
}

// Elements that one thread updates together, so that the thread evaluates the rule's branches once for all elements.
template <int kCount>
struct Elements {
  Elements() = default;
  __device__ explicit Elements(float value) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) at[i] = value;
  }
  float at[kCount];
};

template <int kCount>
__device__ inline Elements<kCount> fma(const Elements<kCount>& a, const Elements<kCount>& b,
                                       const Elements<kCount>& c) {
  Elements<kCount> result;
#pragma unroll
  for (int i = 0; i < kCount; ++i) result.at[i] = fused_tricks::fma(a.at[i], b.at[i], c.at[i]);
  return result;
}

template <int kCount>
__device__ inline Elements<kCount> mul(const Elements<kCount>& a, const Elements<kCount>& b) {
  Elements<kCount> result;
#pragma unroll
  for (int i = 0; i < kCount; ++i) result.at[i] = fused_tricks::mul(a.at[i], b.at[i]);
  return result;
}

template <int kCount>
__device__ inline Elements<kCount> negate(const Elements<kCount>& a) {
  Elements<kCount> result;
#pragma unroll
  for (int i = 0; i < kCount; ++i) result.at[i] = fused_tricks::negate(a.at[i]);
  return result;
}

// Returns elements from memory: element 4q + i is at address[kStride * q + i].
template <int kCount, int kStride = 4>
__device__ inline Elements<kCount> load_quads(const float* address) {
  Elements<kCount> elements;
#pragma unroll
  for (int q = 0; q < kCount / 4; ++q) {
    const Float4 quad = load_once(address + kStride * q);
    float* at = elements.at + 4 * q;
    at[0] = quad.x, at[1] = quad.y, at[2] = quad.z, at[3] = quad.w;
  }
  return elements;
}

template <int kStride = 4, int kCount>
__device__ inline void store_quads(float* address, const Elements<kCount>& elements) {
#pragma unroll
  for (int q = 0; q < kCount / 4; ++q) {
    const float* at = elements.at + 4 * q;
    store_once(address + kStride * q, {at[0], at[1], at[2], at[3]});
  }
}

// The addresses of a parameter's FP32 tensors. Without momentum or an average, the tensor's address is undefined.
struct Tensors {
  float* weight;
  float* buffer;
  float* ema;
};

__device__ inline Tensors operator+(const Tensors& tensors, int index) {
  return {tensors.weight + index, tensors.buffer + index, tensors.ema + index};
}

// Elements of a parameter's FP32 tensors.
template <int kCount>
struct TensorElements {
  Elements<kCount> weights;
  Elements<kCount> buffers;
  Elements<kCount> averages;
};

template <int kCount, int kStride = 4>
__device__ inline TensorElements<kCount> load_tensors(const Rule<float>& rule, const Tensors& from) {
  TensorElements<kCount> elements;
  elements.weights = load_quads<kCount, kStride>(from.weight);
  elements.buffers = Elements<kCount>(0.0f);
  if (rule.has_momentum && !rule.is_first_update) elements.buffers = load_quads<kCount, kStride>(from.buffer);
  elements.averages = Elements<kCount>(0.0f);
  if (rule.averages && !rule.is_first_average) elements.averages = load_quads<kCount, kStride>(from.ema);
  return elements;
}

template <int kStride = 4, int kCount>
__device__ inline void update_and_store(const Rule<float>& rule, const Elements<kCount>& grads,
                                        TensorElements<kCount>& elements, const Tensors& to) {
  sgd_update(rule, grads, elements.weights, elements.buffers);
  store_quads<kStride>(to.weight, elements.weights);
  if (rule.has_momentum) store_quads<kStride>(to.buffer, elements.buffers);
  if (rule.averages) {
    average(rule, elements.weights, elements.averages);
    store_quads<kStride>(to.ema, elements.averages);
  }
}

template <typename T>
__device__ inline Elements<8> unpacked_words(const Words4& words) {
  const Pair a = unpacked<T>(words.x), b = unpacked<T>(words.y), c = unpacked<T>(words.z), d = unpacked<T>(words.w);
  Elements<8> elements;
  float* at = elements.at;
  at[0] = a.low, at[1] = a.high, at[2] = b.low, at[3] = b.high;
  at[4] = c.low, at[5] = c.high, at[6] = d.low, at[7] = d.high;
  return elements;
}

template <typename T>
__device__ inline Words4 packed_words(const Elements<8>& elements) {
  const float* at = elements.at;
  return {packed<T>(at[0], at[1]), packed<T>(at[2], at[3]), packed<T>(at[4], at[5]), packed<T>(at[6], at[7])};
}

// Two neighbouring lanes share 16 elements, in four quads. Of 16-bit elements, the even lane loads quads 0 and 1, and
// the odd lane quads 2 and 3: 16 bytes each. Of FP32 elements, the two lanes load quads 0 and 1 with one instruction,
// then quads 2 and 3, so that each instruction reads whole 32-byte sectors. The lanes therefore swap one quad.
__device__ inline void swap_quads(bool odd, Words4& words) {
  const uint32_t got_low = __shfl_xor_sync(kAllLanes, odd ? words.x : words.z, 1);
  const uint32_t got_high = __shfl_xor_sync(kAllLanes, odd ? words.y : words.w, 1);
  (odd ? words.x : words.z) = got_low;
  (odd ? words.y : words.w) = got_high;
}

template <typename Param, typename Grad>
__device__ inline int update_pairs(const Rule<float>& rule, const Grad* grad, const Tensors& tensors, Param* param,
                                   int count) {
  const int pairs = count / 16;
  const bool odd = threadIdx.x % 2 != 0;
  for (int first = 0; first < pairs; first += kThreads / 2) {  // the same count in every lane, because of the shuffles
    const int pair = first + static_cast<int>(threadIdx.x) / 2;
    const bool inside = pair < pairs;
    const int own = 16 * pair + (odd ? 8 : 0);
    const int quad = 16 * pair + (odd ? 4 : 0);
    Words4 words = {0, 0, 0, 0};
    Elements<8> grads;
    TensorElements<8> elements;
    // All loads come first, because the shuffle waits for the gradient.
    if (inside) {
      if constexpr (sizeof(Grad) == 2)
        words = load_words_once(grad + own);
      else
        grads = load_quads<8, 8>(grad + quad);
      elements = load_tensors<8, 8>(rule, tensors + quad);
    }
    if constexpr (sizeof(Grad) == 2) {
      swap_quads(odd, words);
      grads = unpacked_words<Grad>(words);
    }
    if (inside) {
      update_and_store<8>(rule, grads, elements, tensors + quad);
      words = packed_words<Param>(elements.weights);
    }
    swap_quads(odd, words);
    if (inside && param != nullptr) store_words(param + own, words);
  }
  return 16 * pairs;
}

__device__ inline int update_quads(const Rule<float>& rule, const float* grad, const Tensors& tensors, int count) {
  const int quads = count / 4;
#pragma unroll 2
  for (int i = static_cast<int>(threadIdx.x); i < quads; i += kThreads) {
    TensorElements<4> elements = load_tensors<4>(rule, tensors + 4 * i);
    update_and_store(rule, load_quads<4>(grad + 4 * i), elements, tensors + 4 * i);
  }
  return 4 * quads;
}

// Updates one element, and returns the new weight.
template <typename T>
__device__ inline T update_element(const Rule<T>& rule, T grad, T* weight, T* buffer, T* ema) {
  T w = load_element(weight);
  T b = rule.has_momentum && !rule.is_first_update ? load_element(buffer) : T(0);
  T e = rule.averages && !rule.is_first_average ? load_element(ema) : T(0);
  sgd_update(rule, grad, w, b);
  store_element(weight, w);
  if (rule.has_momentum) store_element(buffer, b);
  if (rule.averages) {
    average(rule, w, e);
    store_element(ema, e);
  }
  return w;
}

// `Param` is the element type of a 16-bit parameter; float for an FP32 parameter with an FP32 gradient. An FP32
// parameter with a 16-bit gradient takes the gradient's type and a null `work.param`, because more instances of this
// function would not fit in 64 registers.
template <typename Param, typename Grad>
__device__ inline void update_span(const BlockWork& work) {
  const Rule<float> rule = work.rule;
  const auto* grad = reinterpret_cast<const Grad*>(work.grad);
  const Tensors tensors = {reinterpret_cast<float*>(work.weight), reinterpret_cast<float*>(work.state[kBuffer]),
                           reinterpret_cast<float*>(work.state[kEma])};
  auto* param = reinterpret_cast<Param*>(work.param);
  int done = 0;
  if (is_aligned(grad) && is_aligned(tensors.weight) && is_aligned(param) &&
      (!rule.has_momentum || is_aligned(tensors.buffer)) && (!rule.averages || is_aligned(tensors.ema))) {
    if constexpr (sizeof(Param) == 2) {
      done = update_pairs(rule, grad, tensors, param, work.count);
    } else {
      done = update_quads(rule, grad, tensors, work.count);
    }
  }
  for (int i = done + static_cast<int>(threadIdx.x); i < work.count; i += kThreads) {
    const Tensors at = tensors + i;
    const float w = update_element(rule, to_float(load_element(grad + i)), at.weight, at.buffer, at.ema);
    if constexpr (sizeof(Param) == 2) {
      if (param == nullptr) continue;
      Param rounded;
      round_to(rounded, w);
      store_element(param + i, rounded);
    }
  }
}

__device__ inline void update_double_span(const BlockWork& work) {
  const Rule<double> rule = work.double_rule;
  const auto* grad = reinterpret_cast<const double*>(work.grad);
  auto* weight = reinterpret_cast<double*>(work.weight);
  auto* buffer = reinterpret_cast<double*>(work.state[kBuffer]);
  auto* ema = reinterpret_cast<double*>(work.state[kEma]);
  for (int i = static_cast<int>(threadIdx.x); i < work.count; i += kThreads) {
    update_element(rule, load_element(grad + i), weight + i, buffer + i, ema + i);
  }
}

// Four blocks on each multiprocessor limit a thread to 64 registers.
template <typename Args>
__global__ void __launch_bounds__(kThreads, 4) update_kernel(const __grid_constant__ Args args) {
  __shared__ BlockWork work;
  const Tables& tables = args.tables;
  if (threadIdx.x == 0) {
    work.grad = nullptr;
    StepState state = load(tables.state);
    // Without a scan, every block computes the same decision.
    if (!args.scanned) state = decided(args, state, false, false, 0.0);
    // Backwards, because the gradients that the scan read last are still in the cache.
    if (blockIdx.x < tables.chunk_count) prepare_update(args, state, tables.chunk_count - 1 - blockIdx.x, work);
  }
  __syncthreads();
  if (work.grad != nullptr) {
    switch (work.type) {
      case DType::kFloat16:
        if (work.grad_type == DType::kFloat32) {
          update_span<Half, float>(work);
        } else {
          update_span<Half, Half>(work);
        }
        break;
      case DType::kBFloat16:
        if (work.grad_type == DType::kFloat32) {
          update_span<BFloat16, float>(work);
        } else {
          update_span<BFloat16, BFloat16>(work);
        }
        break;
      case DType::kFloat32:
        update_span<float, float>(work);
        break;
      case DType::kFloat64:
        update_double_span(work);
        break;
    }
  }
  if (args.scanned) {
    // Two scans of different sizes that overlapped by mistake leave a wrong count.
    if (blockIdx.x == 0 && threadIdx.x == 0) store(&tables.state->arrivals, 0u);
    return;
  }
  if (!arrives_last(tables.state)) return;
  if (threadIdx.x == 0) store_decision(tables.state, decided(args, load(tables.state), false, false, 0.0));
}

}  // namespace fused_tricks::cuda
