// Log-sum-exp of units from key codes on tensor cores: tokens are the rows of an instruction, query
// heads its columns. Each warp streams the records of neighbouring groups through a ring of its own
// in shared memory, and waits for no other warp. A group's result depends on nothing but its record
// and its queries: not on the warp, the place in the ring, the thread block or the group beside it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/exponential.cuh"
#include "cuda/guided/code_query.cuh"
#include "cuda/guided/plain_scores.cuh"
#include "cuda/guided/units.cuh"
#include "cuda/guided/workspace.h"
#include "cuda/sm80/mma.cuh"

namespace art::cuda::guided {

using sm80::copy_async;
using HalfMma = sm80::Mma<__half>;

// Groups that a warp scores at once, and heads of a tile of which a lane has the sums, in columns
// 2 * (lane % 4) and next: both parts of one head, or one part of two heads in each of two
// instructions. So the four units of two groups or of two heads are a sum for each row of lanes.
template <bool kPacked>
constexpr int kGroupsAtOnce = kPacked ? 2 : 1;
template <bool kPacked>
constexpr int kLaneHeads = kPacked ? 1 : 2;
constexpr int kLaneSets = 2;  // of units: kGroupsAtOnce * kLaneHeads

// Sizes for one number of steps of 16 channels, which is even.
template <int kSteps>
struct TensorSizes {
  static constexpr int kPairs = kSteps / 2;
  // So many are multiplied at a time: all of them need too many registers where there are many.
  template <bool kPacked>
  static constexpr int kAtOnce = !kPacked          ? 1
                                 : kPairs % 2 == 0 ? 2
                                                   : 3;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRecordBytes = 320 * kSteps;
  static constexpr int kUnitBytes = 64 * kSteps;
  static constexpr int kGridBytes = 32 * kSteps;  // of the scales, and of the zeros
};

// The ring of a warp; a stage has the records of the groups that are scored at once.
template <int kSteps, bool kPacked>
struct RecordRing {
  using Sizes = TensorSizes<kSteps>;
  static constexpr int kStageBytes = kGroupsAtOnce<kPacked> * Sizes::kRecordBytes;
  static constexpr int kStages = kPacked ? (kSteps > 4 ? 2 : 3) : (kSteps > 4 ? 3 : 4);
  static constexpr int kBytes = kStages * kStageBytes;

  // Of a thread block.
  static constexpr size_t shared_bytes(int32_t tiles) {
    return std::max(Sizes::kWarps * kBytes + tiles * Sizes::kPairs * sizeof(QueryPair),
                    sizeof(PlainShared));
  }
};

// Whole vectors from shared memory, as long as they can be aligned.
template <int kWords>
__device__ void load_words(const uint8_t* from, uint32_t (&to)[kWords]) {
  if constexpr (kWords % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 words = *reinterpret_cast<const uint4*>(from + 4 * i);
      to[i] = words.x, to[i + 1] = words.y, to[i + 2] = words.z, to[i + 3] = words.w;
    }
  } else if constexpr (kWords % 2 == 0) {
#pragma unroll
    for (int i = 0; i < kWords; i += 2) {
      const uint2 words = *reinterpret_cast<const uint2*>(from + 4 * i);
      to[i] = words.x, to[i + 1] = words.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i) to[i] = *reinterpret_cast<const uint32_t*>(from + 4 * i);
  }
}

// Sums of one lane over the channels, with the tokens lane / 4 and 8 further of one group.
template <bool kPacked>
struct LaneSums {
  float codes[kGroupUnits][4];
  float zeros[kLaneHeads<kPacked>];
  float codes_factor;  // what the sums of codes have to be multiplied by

  __device__ float of_codes(int unit, int head, int row) const {
    return kPacked ? codes[unit][2 * row] + codes[unit][2 * row + 1] : codes[unit][2 * row + head];
  }
};

// The largest scale of a record, as float16 bits, for all lanes.
template <int kSteps>
__device__ uint32_t largest_scale(const uint8_t* scales) {
  constexpr int kPairs = TensorSizes<kSteps>::kPairs;
  __half2 largest = unpack(0);
#pragma unroll
  for (int p = 0; p < kPlaces; ++p) {
    uint32_t scale[kPairs];
    load_words(scales + (p * 4 + threadIdx.x % 4) * 4 * kPairs, scale);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) largest = __hmax2(largest, unpack(scale[j]));
  }
  // All lanes of a column have read the same.
  largest = __hmax2(largest, unpack(__shfl_xor_sync(~0u, pack(largest), 1)));
  largest = __hmax2(largest, unpack(__shfl_xor_sync(~0u, pack(largest), 2)));
  const uint32_t both = pack(largest), low = both & 0xffff, high = both >> 16;
  return low > high ? low : high;
}

// <query, zero> of the groups for a tile of heads. Any four words of zeros make an operand: rows 0
// to 7 of it have the first and the third, the others the second and the fourth. So of two
// instructions, with the queries of either, one half each is good.
template <int kSteps, bool kPacked>
__device__ void multiply_zeros(const uint8_t* records, const QueryPair* query,
                               LaneSums<kPacked> (&sums)[kGroupsAtOnce<kPacked>]) {
  using Sizes = TensorSizes<kSteps>;
  constexpr int kPairs = Sizes::kPairs, kGroups = kGroupsAtOnce<kPacked>;
  const int lane = threadIdx.x % 32;
  const uint8_t* of_lane =
      records + kGroupUnits * Sizes::kUnitBytes + Sizes::kGridBytes + lane % 4 * kPairs * 4;
  uint32_t zeros[kGroups][kPlaces][kPairs];
#pragma unroll
  for (int i = 0; i < kGroups * kPlaces; ++i) {
    load_words(of_lane + i / kPlaces * Sizes::kRecordBytes + i % kPlaces * 16 * kPairs,
               zeros[i / kPlaces][i % kPlaces]);
  }
  float first_rows[kGroups][4] = {}, last_rows[kGroups][4] = {};
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const ZeroWords parts = query[i].zeros[lane];
    const ZeroWords rest = kPacked ? ZeroWords{} : query[i].zeros_rest[lane];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      uint32_t zero[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) zero[w] = zeros[g][(4 * i + w) / kPairs][(4 * i + w) % kPairs];
      HalfMma::run(first_rows[g], zero, parts.at[0], parts.at[1]);
      HalfMma::run(last_rows[g], zero, parts.at[2], parts.at[3]);
      if constexpr (!kPacked) {
        HalfMma::run(first_rows[g], zero, rest.at[0], rest.at[1]);
        HalfMma::run(last_rows[g], zero, rest.at[2], rest.at[3]);
      }
    }
  }
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const float of_columns[2] = {first_rows[g][0] + last_rows[g][2],
                                 first_rows[g][1] + last_rows[g][3]};
    sums[g].zeros[0] = kPacked ? of_columns[0] + of_columns[1] : of_columns[0];
    if constexpr (!kPacked) sums[g].zeros[1] = of_columns[1];
  }
}

// <query * scale, code> of a group for a tile of heads and the channels of pairs `first` and next.
// `normalise`: multiplies the scales if `kCareful`.
template <int kSteps, bool kPacked, bool kCareful, int kAtOnce>
__device__ void multiply_codes(const uint8_t* record, int first, const PlaceWords (&high)[kAtOnce],
                               const PlaceWords (&low)[kAtOnce], __half2 normalise,
                               float (&sums)[kGroupUnits][4]) {
  using Sizes = TensorSizes<kSteps>;
  constexpr int kPairs = Sizes::kPairs;
  const int lane = threadIdx.x % 32;
  const uint8_t* scales = record + kGroupUnits * Sizes::kUnitBytes + lane % 4 * kPairs * 4;
  uint32_t scale[kPlaces][kAtOnce];
#pragma unroll
  for (int p = 0; p < kPlaces; ++p) load_words(scales + (p * 4 * kPairs + first) * 4, scale[p]);
  if constexpr (kCareful) {
#pragma unroll
    for (int i = 0; i < kPlaces * kAtOnce; ++i) {
      uint32_t& word = scale[i / kAtOnce][i % kAtOnce];
      word = pack(__hmul2_rn(unpack(word), normalise));
    }
  }
  PlaceWords of_high[kAtOnce], of_low[kAtOnce];
#pragma unroll
  for (int i = 0; i < kPlaces * kAtOnce; ++i) {
    const int p = i / kAtOnce, j = i % kAtOnce;
    of_high[j].at[p] = high[j].at[p], of_low[j].at[p] = low[j].at[p];
    scale_query(&of_high[j].at[p], &of_low[j].at[p], unpack(scale[p][j]));
  }
#pragma unroll
  for (int u = 0; u < kGroupUnits; ++u) {
    uint32_t code[kAtOnce];
    load_words(record + u * Sizes::kUnitBytes + (lane * kPairs + first) * 4, code);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const uint32_t first_tokens = code[j], second_tokens = first_tokens >> 8;
#pragma unroll
      for (int p = 0; p < kPlaces; p += 2) {
        const uint32_t mask = 0x00030003u << 2 * p, next = mask << 2;
        const uint32_t a[4] = {first_tokens & mask, second_tokens & mask, first_tokens & next,
                               second_tokens & next};
        HalfMma::run(sums[u], a, of_low[j].at[p], of_low[j].at[p + 1]);
        if constexpr (!kPacked) HalfMma::run(sums[u], a, of_high[j].at[p], of_high[j].at[p + 1]);
      }
    }
  }
}

// Sums of the groups whose records are at `records`. `kCareful`: for scales of any size. Otherwise
// sums are infinite or NaN where a product with a scale is beyond float16's range.
template <int kSteps, bool kPacked, bool kCareful>
__device__ void multiply(const uint8_t* records, const QueryPair* query,
                         LaneSums<kPacked> (&sums)[kGroupsAtOnce<kPacked>]) {
  using Sizes = TensorSizes<kSteps>;
  constexpr int kPairs = Sizes::kPairs, kAtOnce = Sizes::template kAtOnce<kPacked>;
  constexpr int kGroups = kGroupsAtOnce<kPacked>;
  multiply_zeros<kSteps, kPacked>(records, query, sums);
  __half2 normalise[kGroups];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const uint8_t* scales = records + g * Sizes::kRecordBytes + kGroupUnits * Sizes::kUnitBytes;
    const int32_t exponent = kCareful ? scale_exponent(largest_scale<kSteps>(scales)) : 0;
    sums[g].codes_factor = power_of_two(24 - exponent);
    normalise[g] = half_power_of_two(exponent);
#pragma unroll
    for (int i = 0; i < 4 * kGroupUnits; ++i) sums[g].codes[i / 4][i % 4] = 0.0f;
  }
#pragma unroll 1
  for (int first = 0; first < kPairs; first += kAtOnce) {
    PlaceWords high[kAtOnce], low[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      high[j] = query[first + j].high[threadIdx.x % 32];
      low[j] = query[first + j].low[threadIdx.x % 32];
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      multiply_codes<kSteps, kPacked, kCareful>(records + g * Sizes::kRecordBytes, first, high, low,
                                                normalise[g], sums[g].codes);
    }
  }
}

// Logits of one lane to base 2, relative to the `base` of their set: tokens lane / 4 and 8 further
// of each unit.
struct LaneLogits {
  float at[kLaneSets][kGroupUnits][2];
  float base[kLaneSets];
};

__host__ __device__ inline bool changes_logits(const DecodeParams& params) {
  return params.softcap > 0.0f || params.alibi_slopes != nullptr;
}

// From sums to logits, of the sets from `first_set` on. `factors`: of the lane's heads, the first
// of which is `first_head`. `extras`: whether logits are more than the product of query and key.
template <bool kPacked>
__device__ void to_logits(const DecodeParams& params, const Target& target, int32_t group,
                          bool extras, const LaneSums<kPacked>& sums, int32_t first_head,
                          const float* factors, int first_set, LaneLogits& logits) {
  constexpr int kHeads = kLaneHeads<kPacked>;
  if (!extras) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const float factor = factors[h] * kLog2e, of_codes = sums.codes_factor * factor;
      logits.base[first_set + h] = sums.zeros[h] * factor;
#pragma unroll
      for (int i = 0; i < 2 * kGroupUnits; ++i) {
        logits.at[first_set + h][i / 2][i % 2] = sums.of_codes(i / 2, h, i % 2) * of_codes;
      }
    }
    return;
  }
  int32_t first_token = group * kGroupTokens + static_cast<int32_t>(threadIdx.x % 32 / 4);
  // Or all comparisons would be made beforehand, also where nobody asks for them.
  asm volatile("" : "+r"(first_token));
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const float zero = sums.zeros[h] * factors[h], factor = sums.codes_factor * factors[h];
    // Heads that only fill up the tile have no slope.
    const int32_t g = first_head + h, last = params.group_size - 1;
    const int32_t q_head = target.kv_head * params.group_size + (g < last ? g : last);
    logits.base[first_set + h] = 0.0f;
#pragma unroll
    for (int i = 0; i < 2 * kGroupUnits; ++i) {
      const float x = fmaf(sums.of_codes(i / 2, h, i % 2), factor, zero);
      const int32_t token = first_token + i / 2 * kUnitTokens + i % 2 * 8;
      logits.at[first_set + h][i / 2][i % 2] =
          logit_of(params, target.visible, q_head, token, x) * kLog2e;
    }
  }
}

// The largest over the eight rows of lanes.
__device__ inline float max_of_rows(float x) {
#pragma unroll
  for (int distance = 4; distance < 32; distance *= 2) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, distance));
  }
  return x;
}

// Of a set and unit: set * kGroupUnits + unit is the lane's row.
struct UnitSum {
  float base;
  float sum;
};

// Adds up 2^x of each set and unit. The eight rows of lanes have parts of all sums: each exchange
// halves what a lane is left with, until it has one.
__device__ inline UnitSum add_rows(const LaneLogits& logits) {
  constexpr int kSums = kLaneSets * kGroupUnits;
  static_assert(kSums == 8);
  const int row = threadIdx.x % 32 / 4;
  float sums[kSums];
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    const float (&x)[2] = logits.at[i / kGroupUnits][i % kGroupUnits];
    sums[i] = exp2_approximate(x[0]) + exp2_approximate(x[1]);
  }
#pragma unroll
  for (int half = kSums / 2; half > 0; half /= 2) {
    const bool keeps_second = (row & half) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float sent = keeps_second ? sums[i] : sums[i + half];
      sums[i] = keeps_second ? sums[i + half] : sums[i];
      sums[i] += __shfl_xor_sync(~0u, sent, 4 * half);
    }
  }
  return {row < kGroupUnits ? logits.base[0] : logits.base[1], sums[0]};
}

// The same relative to the largest of each set and unit.
__device__ inline UnitSum add_rows_carefully(LaneLogits& logits) {
  UnitSum unit = {};
#pragma unroll
  for (int i = 0; i < kLaneSets * kGroupUnits; ++i) {
    float (&x)[2] = logits.at[i / kGroupUnits][i % kGroupUnits];
    const float reference = reference_of(max_of_rows(fmaxf(x[0], x[1])));
    x[0] -= reference, x[1] -= reference;
    if (threadIdx.x % 32 / 4 == i) unit.base = reference;
  }
  const UnitSum sum = add_rows(logits);
  return {unit.base + sum.base, sum.sum};
}

// Whether all sums of the lane's group can be trusted.
template <bool kPacked>
__device__ bool is_group_good(float sum) {
  constexpr float kLeastSum = 0x1p-100f, kMostSum = 0x1p100f;
  const uint32_t good = __ballot_sync(~0u, sum >= kLeastSum && sum <= kMostSum);
  const uint32_t own = kPacked ? 0xffffu << (threadIdx.x & 16) : ~0u;
  return (good & own) == own;
}

// A unit's log-sum-exp in steps, and whether it can be trusted.
struct UnitScore {
  int16_t steps;
  bool is_good;
};

// Log-sum-exp of the units of neighbouring groups for a tile of heads: of the set and unit that are
// the lane's row. Relative to the zeros of the group, which needs no search for the largest logit;
// `kCareful`: in a way that always holds, for groups with sums that are too large or small for the
// other. Nothing but a group's record and the queries decides which.
template <int kSteps, bool kPacked, bool kExtras, bool kCareful>
__device__ UnitScore score_groups(const DecodeParams& params, const Target& target,
                                  int32_t first_group, const uint8_t* records,
                                  const QueryPair* query, int32_t first_head,
                                  const float* factors) {
  constexpr int kGroups = kGroupsAtOnce<kPacked>;
  LaneSums<kPacked> sums[kGroups];
  multiply<kSteps, kPacked, kCareful>(records, query, sums);
  LaneLogits logits;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int32_t group = first_group + g;
    const bool extras =
        kExtras && (changes_logits(params) || target.visible.begin > group * kGroupTokens);
    to_logits<kPacked>(params, target, group, extras, sums[g], first_head, factors,
                       g * kLaneHeads<kPacked>, logits);
  }
  const UnitSum unit = kCareful ? add_rows_carefully(logits) : add_rows(logits);
  return {quantise_steps((unit.base + __log2f(unit.sum)) * 64.0f),
          kCareful || is_group_good<kPacked>(unit.sum)};
}

}  // namespace art::cuda::guided
