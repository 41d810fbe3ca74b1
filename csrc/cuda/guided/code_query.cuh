// Operand B of the tensor cores: the queries of eight heads in two float16 numbers each, and what a
// record's scales make of them.
//
// A code in a float16 number is a denormal, code * 4^place * 2^-24. Tensor cores take denormals as
// they are and add products in float32, so the query has to have the precision, and float16 has 11
// bits in a range of 2^40. Hence
// - two numbers stand for each element, the second for what the first leaves: 22 bits;
// - a head's queries are multiplied by a power of two, so that the largest is in [2^4, 2^5), and a
//   record's scales by another, so that the largest is in [2^9, 2^10): nothing overflows.
// The product of both is rounded in two parts again, the error of the first being exact (a fused
// multiplication). What is lost is below 2^-21 of a term, or 2^-25 where the largest term is about
// 2^14: of the order of float32 arithmetic. The powers of two come off the sums.
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
constexpr int32_t kQueryExponent = 4;
constexpr int32_t kScaleExponent = 9;

// Elements of one lane for a pair of steps: column lane / 4, channels of lane % 4. Each word is a
// place: its channel in the first step, and in the second.
struct alignas(16) PlaceWords {
  uint32_t at[kPlaces];
};

// The two parts of one pair of steps. Up to kPackedHeads heads share one instruction. Columns 0 to
// 3 are their first parts, in `low`, with `high` 0. Columns 4 to 7 are the second parts in `low`,
// with the first in `high`, for the error of its product. So the same instructions scale either.
struct QueryPair {
  PlaceWords high[32];
  PlaceWords low[32];
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
      const float x = first[i] * normalise, y = second[i] * normalise;
      const __half high_x = __float2half_rn(x), high_y = __float2half_rn(y);
      const uint32_t high = pack(high_x, high_y);
      const uint32_t low = pack(__float2half_rn(x - __half2float(high_x)),
                                __float2half_rn(y - __half2float(high_y)));
      const int place = w % kPlaces, lane = g * 4 + w / kPlaces % 4;
      QueryPair& to = query[w / kWordsOfPair];
      if constexpr (kPacked) {
        to.high[lane].at[place] = 0;
        to.low[lane].at[place] = high;
      }
      const int second_lane = kPacked ? lane + 4 * kPackedHeads : lane;
      to.high[second_lane].at[place] = high;
      to.low[second_lane].at[place] = low;
    }
  }
};

// A power of two for the scales of a record, in half precision for each place: with 4^-place, for
// the codes there are larger.
struct ScaleFactors {
  int32_t exponent;

  // `largest`: bits of the largest scale of the record, as float16.
  __device__ explicit ScaleFactors(uint32_t largest) {
    const int32_t wanted = kScaleExponent - (static_cast<int32_t>(largest >> 10 & 0x1f) - 15);
    exponent = wanted < 15 ? wanted : 15;  // the largest power of two that float16 has
  }
  __device__ __half2 of_place(int place) const {
    const uint32_t half = static_cast<uint32_t>(exponent - 2 * place + 15) << 10;
    return unpack(half | half << 16);
  }
};

// Multiplies both parts of a query.
__device__ inline void scale_query(uint32_t* high, uint32_t* low, __half2 scale) {
  const __half2 product = __hmul2_rn(unpack(*high), scale);
  const __half2 error = __hfma2(unpack(*high), scale, __hneg2(product));
  *high = pack(product);
  *low = pack(__hfma2(unpack(*low), scale, error));
}

}  // namespace art::cuda::guided
