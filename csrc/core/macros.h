// Qualifiers that let one definition serve host and device code.
#pragma once

#if defined(__CUDACC__)
#define ART_HD __host__ __device__ __forceinline__
#else
#define ART_HD inline __attribute__((always_inline))
#endif
