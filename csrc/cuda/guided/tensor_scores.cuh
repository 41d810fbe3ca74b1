// Log-sum-exp of units from key codes on tensor cores: tokens are the rows of an instruction, query
// heads its columns. Each warp streams the records of neighbouring groups through a ring of its own
// in shared memory, and waits for no other warp. A group's result depends on nothing but its record
// and its queries: not on the warp, the place in the ring or the thread block.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/guided/code_query.cuh"
#include "cuda/guided/plain_scores.cuh"
#include "cuda/guided/units.cuh"
#include "cuda/guided/workspace.h"
#include "cuda/sm80/mma.cuh"

namespace art::cuda::guided {

using sm80::copy_async;
using HalfMma = sm80::Mma<__half>;

// Sizes for one number of steps of 16 channels, which is even.
template <int kSteps>
struct TensorSizes {
  static constexpr int kPairs = kSteps / 2;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kStages = kSteps > 4 ? 3 : 4;
  static constexpr int kRecordBytes = 320 * kSteps;
  static constexpr int kUnitBytes = 64 * kSteps;
  static constexpr int kGridBytes = 32 * kSteps;  // of the scales, and of the zeros
  static constexpr size_t kRingBytes = size_t{kWarps} * kStages * kRecordBytes;

  static size_t shared_bytes(int32_t tiles) {
    return std::max(kRingBytes + tiles * kPairs * sizeof(QueryPair), sizeof(PlainShared));
  }
};

__device__ inline float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

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

// Sums of one lane over the channels: tokens lane / 4 and 8 further, columns 2 (lane % 4) and next.
struct LaneSums {
  float codes[kGroupUnits][4];
  float zeros[2];
  float codes_factor;  // what the sums of codes have to be multiplied by
};

// Logits of one lane: tokens lane / 4 and 8 further of some neighbouring units, for two heads.
template <int kUnits>
struct LaneLogits {
  float at[kUnits][4];
  int32_t first_unit;  // of the group
  int32_t first_head;
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

// <query, zero> of a group for a tile of heads.
template <int kSteps, bool kPacked>
__device__ void multiply_zeros(const uint8_t* record, const QueryPair* query, float (&sums)[2]) {
  using Sizes = TensorSizes<kSteps>;
  constexpr int kPairs = Sizes::kPairs;
  const int lane = threadIdx.x % 32;
  const uint8_t* of_lane =
      record + kGroupUnits * Sizes::kUnitBytes + Sizes::kGridBytes + lane % 4 * kPairs * 4;
  // Rows of an instruction: the first eight are good in one of these, the others in the other.
  float even_places[4] = {}, odd_places[4] = {};
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    uint32_t zero[kPlaces];
#pragma unroll
    for (int p = 0; p < kPlaces; ++p) {
      zero[p] = *reinterpret_cast<const uint32_t*>(of_lane + (p * 4 * kPairs + j) * 4);
    }
    const PlaceWords low = query[j].low[lane];
    HalfMma::run(even_places, zero, low.at[0], low.at[2]);
    HalfMma::run(odd_places, zero, low.at[1], low.at[3]);
    if constexpr (!kPacked) {
      const PlaceWords high = query[j].high[lane];
      HalfMma::run(even_places, zero, high.at[0], high.at[2]);
      HalfMma::run(odd_places, zero, high.at[1], high.at[3]);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) sums[i] = even_places[i] + odd_places[2 + i];
}

// <query * scale, code> of a group for a tile of heads. Some pairs of steps at a time, for all of
// them need more registers than there are.
template <int kSteps, bool kPacked>
__device__ void multiply_codes(const uint8_t* record, const QueryPair* query, ScaleFactors factors,
                               float (&sums)[kGroupUnits][4]) {
  using Sizes = TensorSizes<kSteps>;
  constexpr int kPairs = Sizes::kPairs, kAtOnce = kPacked && kPairs % 2 == 0 ? 2 : 1;
  const int lane = threadIdx.x % 32;
  const uint8_t* scales = record + kGroupUnits * Sizes::kUnitBytes + lane % 4 * kPairs * 4;
#pragma unroll 1
  for (int first = 0; first < kPairs; first += kAtOnce) {
    uint32_t code[kGroupUnits][kAtOnce];
#pragma unroll
    for (int u = 0; u < kGroupUnits; ++u) {
      load_words(record + u * Sizes::kUnitBytes + (lane * kPairs + first) * 4, code[u]);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      PlaceWords high = query[first + j].high[lane], low = query[first + j].low[lane];
#pragma unroll
      for (int p = 0; p < kPlaces; ++p) {
        const auto* scale =
            reinterpret_cast<const uint32_t*>(scales + (p * 4 * kPairs + first + j) * 4);
        const __half2 scaled = __hmul2_rn(unpack(*scale), factors.of_place(p));
        scale_query(&high.at[p], &low.at[p], scaled);
      }
#pragma unroll
      for (int u = 0; u < kGroupUnits; ++u) {
        const uint32_t first_tokens = code[u][j], second_tokens = first_tokens >> 8;
#pragma unroll
        for (int p = 0; p < kPlaces; p += 2) {
          const uint32_t mask = 0x00030003u << 2 * p, next = mask << 2;
          const uint32_t a[4] = {first_tokens & mask, second_tokens & mask, first_tokens & next,
                                 second_tokens & next};
          HalfMma::run(sums[u], a, low.at[p], low.at[p + 1]);
          if constexpr (!kPacked) HalfMma::run(sums[u], a, high.at[p], high.at[p + 1]);
        }
      }
    }
  }
}

template <int kSteps, bool kPacked>
__device__ LaneSums multiply(const uint8_t* record, const QueryPair* query) {
  using Sizes = TensorSizes<kSteps>;
  const ScaleFactors factors(largest_scale<kSteps>(record + kGroupUnits * Sizes::kUnitBytes));
  LaneSums sums = {};
  sums.codes_factor = power_of_two(24 - factors.exponent);
  multiply_zeros<kSteps, kPacked>(record, query, sums.zeros);
  multiply_codes<kSteps, kPacked>(record, query, factors, sums.codes);
  return sums;
}

// From the sums of a tile to logits; `factors`: of all heads of the group. Where the parts of a
// query are in columns of their own, lanes that have the same heads add them up, and share out the
// units.
template <bool kPacked>
__device__ auto to_logits(const LaneSums& sums, const float* factors, int32_t tile) {
  const int column = threadIdx.x % 4;
  if constexpr (kPacked) {
    constexpr int kUnits = kGroupUnits / 2;
    const bool has_second_units = column >= 2;
    LaneLogits<kUnits> logits = {{}, has_second_units ? kUnits : 0, column % 2 * 2};
    float zeros[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      zeros[i] = sums.zeros[i] + __shfl_xor_sync(~0u, sums.zeros[i], 2);
      zeros[i] *= factors[logits.first_head + i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float factor = sums.codes_factor * factors[logits.first_head + i % 2];
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const float mine = sums.codes[u][i], next = sums.codes[u + kUnits][i];
        const float sent = has_second_units ? mine : next, kept = has_second_units ? next : mine;
        const float both = kept + __shfl_xor_sync(~0u, sent, 2);
        logits.at[u][i] = fmaf(both, factor, zeros[i % 2]);
      }
    }
    return logits;
  } else {
    LaneLogits<kGroupUnits> logits = {{}, 0, tile * kTileHeads + column * 2};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float of_head = factors[logits.first_head + i % 2];
      const float factor = sums.codes_factor * of_head, zero = sums.zeros[i % 2] * of_head;
#pragma unroll
      for (int u = 0; u < kGroupUnits; ++u) {
        logits.at[u][i] = fmaf(sums.codes[u][i], factor, zero);
      }
    }
    return logits;
  }
}

// Soft cap, slopes, and what is not visible.
template <int kUnits>
__device__ void finish_logits(const GuidedParams& guided, const Target& target, int32_t group,
                              LaneLogits<kUnits>& logits) {
  const DecodeParams& params = guided.attention;
  if (params.softcap <= 0.0f && params.alibi_slopes == nullptr &&
      target.visible.begin <= group * kGroupTokens) {
    return;
  }
  const int32_t first_unit = group * kGroupUnits + logits.first_unit;
  const int32_t first_token = first_unit * kUnitTokens + static_cast<int32_t>(threadIdx.x % 32 / 4);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // Heads that only fill up the tile have no slope.
    const int32_t g = logits.first_head + i % 2, last = params.group_size - 1;
    const int32_t q_head = target.kv_head * params.group_size + (g < last ? g : last);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      float& x = logits.at[u][i];
      x = logit_of(params, target.visible, q_head, first_token + i / 2 * 8 + u * kUnitTokens, x);
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

// One of a lane's sums: of a unit and head, relative to a power of two.
struct UnitSum {
  int32_t index;  // head * kUnits + unit, among those of the lane
  float reference;
  float sum;
};

// Adds up the probabilities of each unit and head, relative to 2^reference. The eight rows of lanes
// have parts of all 2 * kUnits sums: each exchange halves what a lane is left with, until it has
// one.
template <int kUnits>
__device__ UnitSum add_rows(const LaneLogits<kUnits>& logits,
                            const float (&references)[2 * kUnits]) {
  const int row = threadIdx.x % 32 / 4;
  float sums[2 * kUnits], reference[2 * kUnits];
#pragma unroll
  for (int i = 0; i < 2 * kUnits; ++i) {
    const float* x = logits.at[i % kUnits] + i / kUnits;
    reference[i] = references[i];
    sums[i] = power_of_2(fmaf(x[0], kLog2e, -reference[i])) +
              power_of_2(fmaf(x[2], kLog2e, -reference[i]));
  }
#pragma unroll
  for (int half = kUnits; half > 0; half /= 2) {
    const bool keeps_second = (row & half) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float sent = keeps_second ? sums[i] : sums[i + half];
      sums[i] = keeps_second ? sums[i + half] : sums[i];
      sums[i] += __shfl_xor_sync(~0u, sent, 4 * half);
      reference[i] = keeps_second ? reference[i + half] : reference[i];
    }
  }
#pragma unroll
  for (int distance = 2 * kUnits; distance < 8; distance *= 2) {  // rows that have the same sum
    sums[0] += __shfl_xor_sync(~0u, sums[0], 4 * distance);
  }
  return {row % (2 * kUnits), reference[0], sums[0]};
}

// What the sums are relative to: the largest logit of each unit, or of all that the lane has of a
// head, to base 2.
template <int kUnits>
__device__ void find_references(const LaneLogits<kUnits>& logits, bool by_unit,
                                float (&references)[2 * kUnits]) {
#pragma unroll
  for (int head = 0; head < 2; ++head) {
    float max[kUnits];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) max[u] = fmaxf(logits.at[u][head], logits.at[u][head + 2]);
    if (by_unit) {
#pragma unroll
      for (int u = 0; u < kUnits; ++u) max[u] = max_of_rows(max[u]);
    } else {
#pragma unroll
      for (int u = 1; u < kUnits; ++u) max[0] = fmaxf(max[0], max[u]);
      max[0] = max_of_rows(max[0]);
#pragma unroll
      for (int u = 1; u < kUnits; ++u) max[u] = max[0];
    }
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      references[head * kUnits + u] = reference_of(max[u]) * kLog2e;
    }
  }
}

// Log-sum-exp of the group's units, from logits. Relative to the largest of a head's units in the
// lane, which is exact unless one of them is so much smaller that its sum is lost; then again, each
// relative to its own.
template <int kUnits>
__device__ void reduce_units(const GuidedParams& guided, const Target& target, int32_t group,
                             const LaneLogits<kUnits>& logits, const Workspace& space) {
  constexpr float kLeastSum = 0x1p-100f;
  UnitSum unit;
  bool by_unit = false;
#pragma unroll 1
  while (true) {
    float references[2 * kUnits];
    find_references(logits, by_unit, references);
    unit = add_rows(logits, references);
    if (by_unit || !__any_sync(~0u, !(unit.sum >= kLeastSum))) break;
    by_unit = true;
  }
  const int32_t g = logits.first_head + unit.index / kUnits;
  if (g >= guided.attention.group_size || threadIdx.x % 32 / 4 >= 2 * kUnits) return;
  const int64_t head = int64_t{target.index} * guided.attention.group_size + g;
  const int32_t number = group * kGroupUnits + logits.first_unit + unit.index % kUnits;
  space.unit_lse[head * space.unit_stride + number] =
      quantise_steps((unit.reference + __log2f(unit.sum)) * 64.0f);
}

}  // namespace art::cuda::guided
