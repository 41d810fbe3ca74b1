// Key codes, format version 1: keys in two bits an element, from which a query estimates its
// logits. docs/key_codes.md is the specification. Every operation is exact or correctly rounded,
// so that all devices write the same bytes.
#pragma once

#include <cstdint>

#include "core/bits.h"
#include "core/macros.h"

namespace art {

constexpr int32_t kGroupTokens = 64;  // tokens that share a scale and a zero in each channel
constexpr int32_t kUnitTokens = 16;   // rows of a tensor-core tile, and tokens of a walk's unit
constexpr int32_t kGroupUnits = kGroupTokens / kUnitTokens;
constexpr int32_t kMaxCode = 3;
constexpr int32_t kPlaces = 4;  // channels that share a byte
constexpr int32_t kMaxCodeChannels = 256;
constexpr float kLargestHalf = 65504.0f;

// Sizes and places in the record of one group and one KV head. A step is 16 channels, the depth of
// one tensor-core instruction; head_dim is rounded up to whole steps.
struct CodeLayout {
  int32_t steps;

  ART_HD explicit CodeLayout(int32_t head_dim) : steps((head_dim + 15) / 16) {}

  ART_HD int32_t channels() const { return 16 * steps; }
  ART_HD int32_t lane_bytes() const { return 2 * steps; }
  ART_HD int32_t line_bytes() const { return 4 * lane_bytes(); }  // of tokens t and t + 8
  ART_HD int32_t unit_bytes() const { return 32 * lane_bytes(); }
  ART_HD int32_t scales_at() const { return kGroupUnits * unit_bytes(); }
  ART_HD int32_t zeros_at() const { return scales_at() + 2 * channels(); }
  ART_HD int32_t record_bytes() const { return zeros_at() + 2 * channels(); }

  // Where a channel stands among the scales and zeros: by its place in the fields (the two bits),
  // then by lane, then by field. One lane's scales of neighbouring fields are adjacent.
  ART_HD int32_t position(int32_t channel) const {
    return (place(channel) * 4 + lane(channel)) * steps + channel / 16;
  }

  // The byte of a record that holds a token's codes of a channel, and the bits in it. Even bytes
  // hold tokens t, odd ones t + 8: in a word of two fields, one shift brings either to the masks.
  ART_HD int32_t byte(int32_t token, int32_t channel) const {
    const int32_t row = token % kUnitTokens;
    return token / kUnitTokens * unit_bytes() + (row % 8 * 4 + lane(channel)) * lane_bytes() +
           channel / 16 * 2 + row / 8;
  }
  ART_HD static int32_t shift(int32_t channel) { return 2 * place(channel); }

 private:
  ART_HD static int32_t lane(int32_t channel) { return channel % 8 / 2; }
  ART_HD static int32_t place(int32_t channel) { return channel % 2 + channel % 16 / 8 * 2; }
};

// To float16, to nearest even; |x| is at most kLargestHalf.
ART_HD uint16_t half_of(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude < 0x38800000) {  // subnormal: float addition rounds at 2^-24
    const float shifted = float_of_bits(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_of(shifted) - 0x3f000000));
  }
  const uint32_t rounded = magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | rounded >> 13);
}

ART_HD float float_of(uint16_t half) {
  const uint32_t sign = uint32_t{half} >> 15 << 31, magnitude = half & 0x7fff;
  // The exponent bias is 112 larger in float; the product is exact, also for subnormals.
  const float value = float_of_bits(magnitude << 13) * 0x1p112f;
  return float_of_bits(bits_of(value) | sign);
}

// Correctly rounded whatever the compiler was told about divisions.
ART_HD float divide(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

// What is encoded of a key: NaN becomes 0 and float16's range is kept to. A negative zero becomes
// positive, so that the smaller of the two does not depend on the order of comparison.
ART_HD float encodable(float x) {
  if (!(x == x)) return 0.0f;
  const float clamped = x < -kLargestHalf ? -kLargestHalf : (x > kLargestHalf ? kLargestHalf : x);
  return clamped + 0.0f;
}

// A code c stands for zero + scale * c.
struct CodeGrid {
  uint16_t zero;   // float16
  uint16_t scale;  // float16
};

// The grid of a channel whose encodable keys in the group are from `min` to `max`: the middle 7/8
// of them. Nothing else decides on it. The product in the sum is exact, so fusing both changes
// nothing.
ART_HD CodeGrid code_grid(float min, float max) {
  const float range = max - min;
  return {half_of(min + range * 0.0625f),
          half_of(divide(range * 0.875f, static_cast<float>(kMaxCode)))};
}

// clamp(rint((x - zero) / scale), 0, 3), ties to even. Clamping first gives the same, and a number
// up to 3 is rounded by adding 2^23, whose last bits are whole.
ART_HD uint32_t code_of(float x, float zero, float scale) {
  const float steps = divide(x - zero, scale);
  const float lower = steps < 0.0f ? 0.0f : steps;
  const float clamped = lower > static_cast<float>(kMaxCode) ? static_cast<float>(kMaxCode) : lower;
  const uint32_t code = bits_of(clamped + 0x1p23f) & kMaxCode;
  return scale == 0.0f ? 0 : code;
}

}  // namespace art
