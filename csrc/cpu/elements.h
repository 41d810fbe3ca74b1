// Elements of caches and of what is written to them, as float32.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/bits.h"
#include "core/key_codes.h"
#include "core/params.h"

namespace art::cpu {

template <DType dtype>
using DTypeConstant = std::integral_constant<DType, dtype>;

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : (dtype == DType::kInt8 ? 1 : 2);
}

inline float value_of(const char* element, DTypeConstant<DType::kFloat32>) {
  float x;
  std::memcpy(&x, element, sizeof(x));
  return x;
}

inline float value_of(const char* element, DTypeConstant<DType::kBFloat16>) {
  uint16_t bits;
  std::memcpy(&bits, element, sizeof(bits));
  return float_of_bits(uint32_t{bits} << 16);
}

inline float value_of(const char* element, DTypeConstant<DType::kFloat16>) {
  uint16_t bits;
  std::memcpy(&bits, element, sizeof(bits));
  const uint16_t magnitude = bits & 0x7fff;
  if (magnitude > 0x7c00) return NAN;
  if (magnitude == 0x7c00) return bits >> 15 ? -INFINITY : INFINITY;
  return float_of(bits);
}

// The code, without the scale of its row.
inline float value_of(const char* element, DTypeConstant<DType::kInt8>) {
  int8_t code;
  std::memcpy(&code, element, sizeof(code));
  return static_cast<float>(code);
}

// Calls run(DTypeConstant<dtype>()).
template <class Run>
void with_dtype(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(DTypeConstant<DType::kFloat32>());
    case DType::kFloat16:
      return run(DTypeConstant<DType::kFloat16>());
    case DType::kBFloat16:
      return run(DTypeConstant<DType::kBFloat16>());
    case DType::kInt8:
      return run(DTypeConstant<DType::kInt8>());
  }
}

}  // namespace art::cpu
