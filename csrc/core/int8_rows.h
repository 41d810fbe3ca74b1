// Keys and values in eight bits: a row, one token of one head, is codes from -127 to 127 times a
// scale of its own. Every operation is correctly rounded, so that all implementations write the
// same bytes; art_torch.reference.quantize is the specification.
#pragma once

#include <cstdint>

#include "core/bits.h"
#include "core/key_codes.h"
#include "core/macros.h"

namespace art {

constexpr int32_t kMaxInt8Dim = 256;
constexpr float kMaxRowCode = 127.0f;
constexpr int32_t kMagnitudeBits = 0x7fffffff, kInfinityBits = 0x7f800000, kNaNBits = 0x7fc00000;

// The scale of a row, from the largest of its elements' bits without the sign. A row with an
// infinity or a NaN has no scale: as NaN, it makes everything computed from it NaN.
ART_HD float row_scale(int32_t largest_magnitude) {
  if (largest_magnitude >= kInfinityBits) return float_of_bits(kNaNBits);
  return divide(float_of_bits(largest_magnitude), kMaxRowCode);
}

// clamp(rint(x / scale), -127, 127), ties to even; 0 where the scale is 0 or NaN. Clamping first
// gives the same, and what is that small is rounded by adding 1.5 * 2^23.
ART_HD int32_t row_code(float x, float scale) {
  const float steps = divide(x, scale);
  const float lower = steps < -kMaxRowCode ? -kMaxRowCode : steps;
  const float clamped = lower > kMaxRowCode ? kMaxRowCode : lower;
  const int32_t code = static_cast<int32_t>(bits_of(clamped + 0x1.8p23f)) - 0x4b400000;
  return scale > 0.0f ? code : 0;
}

}  // namespace art
