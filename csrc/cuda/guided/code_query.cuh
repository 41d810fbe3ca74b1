// Operand B of the tensor cores: the queries of eight heads in two float16 numbers each, and what a
// record's scales make of them.
//
// A code in a float16 number is a denormal, code * 4^place * 2^-24. Tensor cores take denormals as
// they are and add products in float32, so the query has to have the precision, and float16 has 11
// bits in a range of 2^40. Hence
// - two numbers stand for each element, the second for what the first leaves: 22 bits;
// - a head's queries are multiplied by a power of two, so that the largest is in [2^6, 2^7), and by
//   4^-place, for codes there are larger. So products with scales up to 511 are within range.
// The product of both is rounded in two parts again, the error of the first being exact (a fused
// multiplication). What is lost is below 2^-21 of a term, or 2^-25 of the largest element of the
// head times a key of 1: of the order of float32 arithmetic for keys and queries of usual size.
// For others (is_careful) a record's scales are multiplied by another power of two, so that the
// largest is in [2^8, 2^9). The powers of two come off the sums.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "core/bits.h"
#include "core/key_codes.h"
#include "core/params.h"
#include "cuda/elements.cuh"
#include "cuda/guided/units.cuh"
#include "cuda/rows.cuh"

namespace art::cuda::guided {

constexpr int kTileHeads = 8;  // columns of an instruction
constexpr int kPackedHeads = kTileHeads / 2;
constexpr int kMaxTiles = 2;
constexpr int32_t kQueryExponent = 6;
constexpr int32_t kScaleExponent = 8;
// Beyond it, what is lost is too much: queries of 2^10, times the scale of the logits.
constexpr float kLargeFactor = 0x1p4f;

// Elements of one lane for a pair of steps: column lane / 4, channels of lane % 4. Each word is a
// place: its channel in the first step, and in the second.
struct alignas(16) PlaceWords {
  uint32_t at[kPlaces];
};

// Elements of one lane for the zeros: any four words, in the order in which they make two operands.
struct alignas(16) ZeroWords {
  uint32_t at[4];

  __device__ static constexpr int place_of(int word) { return word % 2 * 2 + word / 2; }
};

// The two parts of one pair of steps. Up to kPackedHeads heads share one instruction: column 2 h is
// the first part of head h, in `low` with `high` 0; column 2 h + 1 is the second part in `low`,
// with the first in `high`, for the error of its product. So the same instructions scale either,
// and the sums of both are in one lane. For more heads, a column has one head, with both parts.
// For the product with the zeros there is no factor of the place. The words of all pairs, [place]
// [pair], are taken four at a time: the columns themselves, or both parts.
struct QueryPair {
  PlaceWords high[32];
  PlaceWords low[32];
  ZeroWords zeros[32];
  ZeroWords zeros_rest[32];
};

__device__ inline uint32_t pack(__half first, __half second) {
  const __half2 pair = __halves2half2(first, second);
  uint32_t word;
  memcpy(&word, &pair, sizeof(word));
  return word;
}

__device__ inline __half2 unpack(uint32_t word) {
  __half2 pair;
  memcpy(&pair, &word, sizeof(pair));
  return pair;
}

__device__ inline uint32_t pack(__half2 pair) { return pack(__low2half(pair), __high2half(pair)); }

// Two numbers in two float16 numbers each.
struct Parts {
  uint32_t high, low;

  __device__ Parts(float x, float y) {
    const __half high_x = __float2half_rn(x), high_y = __float2half_rn(y);
    high = pack(high_x, high_y);
    low =
        pack(__float2half_rn(x - __half2float(high_x)), __float2half_rn(y - __half2float(high_y)));
  }
};

__device__ inline float query_element(const DecodeParams& params, const Target& target, int32_t g,
                                      int32_t channel) {
  if (g >= params.group_size) return 0.0f;
  const int64_t head = int64_t{target.kv_head} * params.group_size + g;
  const int64_t at =
      target.batch * params.query_batch_stride + head * params.query_head_stride + channel;
  return element(params.query, at, params.dtype) * params.scale;
}

// The exponent of a head's largest element. What is not finite stays so, and its scores with it.
__device__ inline int32_t exponent_of(float largest) {
  const int32_t biased = static_cast<int32_t>(bits_of(largest) >> 23 & 0xff);
  if (biased == 0xff) return 0;
  return biased < 27 ? -100 : biased - 127;  // below 2^-100, nothing tells logits apart
}

__device__ inline float power_of_two(int32_t exponent) {
  return float_of_bits(static_cast<uint32_t>(exponent + 127) << 23);
}

// A warp's share of one head's query: each lane has words of it, both elements apart.
template <int kPairs>
struct HeadWords {
  static constexpr int kWordsOfPair = 4 * kPlaces;  // of the four lanes that have a column
  static constexpr int kWords = kPairs * kWordsOfPair;
  static constexpr int kOfLane = (kWords + 31) / 32;
  float first[kOfLane];
  float second[kOfLane];

  __device__ static int word(int i) { return static_cast<int>(threadIdx.x % 32) + 32 * i; }

  __device__ HeadWords(const DecodeParams& params, const Target& target, int32_t g) {
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const int w = word(i), place = w % kPlaces;
      const int32_t channel =
          32 * (w / kWordsOfPair) + w / kPlaces % 4 * 2 + place % 2 + place / 2 * 8;
      const bool exists = kWords % 32 == 0 || w < kWords;
      first[i] = exists ? query_element(params, target, g, channel) : 0.0f;
      second[i] = exists ? query_element(params, target, g, channel + 16) : 0.0f;
    }
  }

  // Writes both parts to `query` [kPairs], and the factor that the head's scores have to be
  // multiplied by. `g`: the head's number in its tile.
  template <bool kPacked>
  __device__ void split(int32_t g, float* factor, QueryPair* query) const {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      largest = fmaxf(largest, fmaxf(fabsf(first[i]), fabsf(second[i])));
    }
    const int32_t exponent = exponent_of(warp_max(largest)) - kQueryExponent;
    if (threadIdx.x % 32 == 0) *factor = power_of_two(exponent);
    const float normalise = power_of_two(-exponent);
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const int w = word(i);
      if (kWords % 32 != 0 && w >= kWords) break;
      const int place = w % kPlaces, column_lane = w / kPlaces % 4;
      QueryPair& to = query[w / kWordsOfPair];
      const float x = first[i] * normalise, y = second[i] * normalise;
      const float of_place = power_of_two(-2 * place);
      const Parts plain(x, y), parts(x * of_place, y * of_place);
      const int zero_word = place * kPairs + w / kWordsOfPair;
      const int zero_place = ZeroWords::place_of(zero_word % 4);
      QueryPair& for_zeros = query[zero_word / 4];
      if constexpr (kPacked) {
        const int lane = 2 * g * 4 + column_lane, next = lane + 4;
        to.high[lane].at[place] = 0;
        to.low[lane].at[place] = to.high[next].at[place] = parts.high;
        to.low[next].at[place] = parts.low;
        for_zeros.zeros[lane].at[zero_place] = plain.high;
        for_zeros.zeros[next].at[zero_place] = plain.low;
      } else {
        const int lane = g * 4 + column_lane;
        to.high[lane].at[place] = parts.high;
        to.low[lane].at[place] = parts.low;
        for_zeros.zeros[lane].at[zero_place] = plain.high;
        for_zeros.zeros_rest[lane].at[zero_place] = plain.low;
      }
    }
  }
};

// The exponent of a power of two for the scales of a record. `largest`: bits of the largest of
// them, as float16.
__device__ inline int32_t scale_exponent(uint32_t largest) {
  const int32_t wanted = kScaleExponent - (static_cast<int32_t>(largest >> 10 & 0x1f) - 15);
  return wanted < 15 ? wanted : 15;  // the largest power of two that float16 has
}

__device__ inline __half2 half_power_of_two(int32_t exponent) {
  const uint32_t half = static_cast<uint32_t>(exponent + 15) << 10;
  return unpack(half | half << 16);
}

// Multiplies both parts of a query.
__device__ inline void scale_query(uint32_t* high, uint32_t* low, __half2 scale) {
  const __half2 product = __hmul2_rn(unpack(*high), scale);
  const __half2 error = __hfma2(unpack(*high), scale, __hneg2(product));
  *high = pack(product);
  *low = pack(__hfma2(unpack(*low), scale, error));
}

}  // namespace art::cuda::guided
