// The declaration of functions that are compiled for every processor.
#pragma once

// Inlining is forced because each function is compiled for several instruction sets. Of a function that is not inlined,
// the linker keeps one copy, which may use instructions that this processor lacks.
#if defined(__CUDACC__)
#define FUSED_TRICKS_INLINE __host__ __device__ __forceinline__
#else
#define FUSED_TRICKS_INLINE inline __attribute__((always_inline))
#endif
