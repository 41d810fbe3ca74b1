// Bits of numbers, on host and device: what <bit> has, nvcc only lets the host call.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/macros.h"

namespace art {

ART_HD uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

ART_HD float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// floor(log2(n)), for n > 0.
ART_HD int32_t highest_bit(uint64_t n) {
#if defined(__CUDA_ARCH__)
  return 63 - __clzll(static_cast<long long>(n));
#else
  return 63 - __builtin_clzll(n);
#endif
}

}  // namespace art
