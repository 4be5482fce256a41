// How functions that run on every processor are declared.
#pragma once

// Always inlined: the same function is compiled for several instruction sets, and the linker keeps one copy of those
// that are not.
#if defined(__CUDACC__)
#define FUSED_TRICKS_INLINE __host__ __device__ __forceinline__
#else
#define FUSED_TRICKS_INLINE inline __attribute__((always_inline))
#endif
