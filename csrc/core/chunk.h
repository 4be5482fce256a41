// The sizes of a chunk in elements: the work of one CPU thread at a time, and of one CUDA block.
//
// Triton's is CHUNK in fused_tricks/backends/triton/records.py. The chunk is part of the order of the norm's sum, so
// another size may change the last bit of the norm.
#pragma once

#include <cstdint>

namespace fused_tricks {

constexpr int64_t kCpuChunk = 1 << 15;
constexpr int kCudaChunk = 8192;
static_assert(kCpuChunk % 16 == 0 && kCudaChunk % 16 == 0, "a chunk must begin where 16-byte accesses may begin");

}  // namespace fused_tricks
