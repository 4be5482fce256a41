// The declaration of functions that run on every processor.
#pragma once

// Always inlined: a function is compiled once for each instruction set, and the linker would keep only one of the
// copies.
#if defined(__CUDACC__)
#define FUSED_TRICKS_INLINE __host__ __device__ __forceinline__
#else
#define FUSED_TRICKS_INLINE inline __attribute__((always_inline))
#endif
