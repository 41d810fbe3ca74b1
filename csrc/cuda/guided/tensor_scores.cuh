// Log-sum-exp of units from key codes on tensor cores: tokens are the rows of an instruction, query
// heads its columns. Each warp streams the records of neighbouring groups through a ring of its own
// in shared memory, and waits for no other warp. A group's result depends on nothing but its record
// and its queries: not on the warp, the place in the ring or the thread block.
#pragma once

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
  static constexpr int kPairsAtOnce = kPairs % 4 == 0 && kPairs > 4 ? 4 : (kPairs % 2 == 0 ? 2 : 3);
  static constexpr int kWarps = kSteps > 8 ? 4 : 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kStages = kSteps > 4 ? 3 : 4;
  static constexpr int kRecordBytes = 320 * kSteps;
  static constexpr int kUnitBytes = 64 * kSteps;
  static constexpr int kGridBytes = 32 * kSteps;  // of the scales, and of the zeros
  static constexpr size_t kRingBytes = size_t{kWarps} * kStages * kRecordBytes;
  static constexpr size_t kQueryBytes = kMaxTiles * kPairs * sizeof(QueryPair);
  static constexpr size_t kSharedBytes = kRingBytes + kQueryBytes > sizeof(PlainShared)
                                             ? kRingBytes + kQueryBytes
                                             : sizeof(PlainShared);
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

// Sums of one lane over the channels: tokens lane / 4 and 8 further, heads 2 (lane % 4) and next.
struct LaneScores {
  float codes[kGroupUnits][4];
  float zeros[4];
  float codes_factor;  // what the sums of codes have to be multiplied by
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

// <query, zero> and <query * scale, code> of a group for a tile of heads. Some pairs of steps at a
// time, for all of them need more registers than there are.
template <int kSteps>
__device__ void multiply(const uint8_t* record, const QueryPair* query, LaneScores& scores) {
  using Sizes = TensorSizes<kSteps>;
  constexpr int kPairs = Sizes::kPairs, kAtOnce = Sizes::kPairsAtOnce;
  const int lane = threadIdx.x % 32;
  const uint8_t* scales = record + kGroupUnits * Sizes::kUnitBytes;
  const ScaleFactors factors(largest_scale<kSteps>(scales));
  scores = {};
  scores.codes_factor = power_of_two(24 - factors.exponent);
#pragma unroll 1
  for (int first = 0; first < kPairs; first += kAtOnce) {
    uint32_t scale[kPlaces][kAtOnce], zero[kPlaces][kAtOnce], code[kGroupUnits][kAtOnce];
#pragma unroll
    for (int p = 0; p < kPlaces; ++p) {
      const uint8_t* of_lane = scales + ((p * 4 + lane % 4) * kPairs + first) * 4;
      load_words(of_lane, scale[p]);
      load_words(of_lane + Sizes::kGridBytes, zero[p]);
    }
#pragma unroll
    for (int u = 0; u < kGroupUnits; ++u) {
      load_words(record + u * Sizes::kUnitBytes + (lane * kPairs + first) * 4, code[u]);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      PlaceWords high = query[first + j].high[lane], low = query[first + j].low[lane];
#pragma unroll
      for (int p = 0; p < kPlaces; p += 2) {  // all rows of A are equal
        const uint32_t a[4] = {zero[p][j], zero[p][j], zero[p + 1][j], zero[p + 1][j]};
        HalfMma::run(scores.zeros, a, high.at[p], high.at[p + 1]);
        HalfMma::run(scores.zeros, a, low.at[p], low.at[p + 1]);
      }
#pragma unroll
      for (int p = 0; p < kPlaces; ++p) {
        const __half2 scaled = __hmul2_rn(unpack(scale[p][j]), factors.of_place(p));
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
          HalfMma::run(scores.codes[u], a, high.at[p], high.at[p + 1]);
          HalfMma::run(scores.codes[u], a, low.at[p], low.at[p + 1]);
        }
      }
    }
  }
}

// Turns the sums into logits.
__device__ inline void finish_logits(const GuidedParams& guided, const Target& target,
                                     int32_t group, int32_t first_head, const float* factors,
                                     LaneScores& scores) {
  const DecodeParams& params = guided.attention;
  const int32_t first_token = group * kGroupTokens;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float factor = factors[first_head + i % 2];
#pragma unroll
    for (int u = 0; u < kGroupUnits; ++u) {
      float& x = scores.codes[u][i];
      x = fmaf(x, scores.codes_factor, scores.zeros[i % 2]) * factor;
    }
  }
  if (params.softcap <= 0.0f && params.alibi_slopes == nullptr &&
      target.visible.begin <= first_token) {
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // Heads that only fill up the tile have no slope.
    const int32_t g = first_head + i % 2, last = params.group_size - 1;
    const int32_t q_head = target.kv_head * params.group_size + (g < last ? g : last);
    const int32_t token = first_token + static_cast<int32_t>(threadIdx.x % 32 / 4) + i / 2 * 8;
#pragma unroll
    for (int u = 0; u < kGroupUnits; ++u) {
      float& x = scores.codes[u][i];
      x = logit_of(params, target.visible, q_head, token + u * kUnitTokens, x);
    }
  }
}

// Part of a unit: its largest logit, to base 2, and the sum of the probabilities relative to it.
struct UnitPart {
  float max;
  float sum;
};

__device__ inline UnitPart merge(const UnitPart& a, const UnitPart& b) {
  const float max = fmaxf(a.max, b.max), reference = reference_of(max);
  return {max, fmaf(a.sum, power_of_2(a.max - reference), b.sum * power_of_2(b.max - reference))};
}

// Log-sum-exp of the group's units for a tile of heads, from their logits. The eight rows of lanes
// have parts of eight sums (four units of two heads): each exchange halves what a lane is left
// with, until it has all of one.
__device__ inline void reduce_tile(const GuidedParams& guided, const Target& target, int32_t group,
                                   int32_t first_head, const LaneScores& scores,
                                   const Workspace& space) {
  const int row = threadIdx.x % 32 / 4;
  UnitPart parts[2 * kGroupUnits];
#pragma unroll
  for (int i = 0; i < 2 * kGroupUnits; ++i) {
    const float* x = scores.codes[i % kGroupUnits] + i / kGroupUnits;
    parts[i] = merge({x[0] * kLog2e, 1.0f}, {x[2] * kLog2e, 1.0f});
  }
#pragma unroll
  for (int half = kGroupUnits; half > 0; half /= 2) {
    const bool keeps_second = (row & half) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const UnitPart kept = keeps_second ? parts[i + half] : parts[i];
      const UnitPart sent = keeps_second ? parts[i] : parts[i + half];
      const UnitPart received = {__shfl_xor_sync(~0u, sent.max, 4 * half),
                                 __shfl_xor_sync(~0u, sent.sum, 4 * half)};
      parts[i] = merge(kept, received);
    }
  }
  const int32_t g = first_head + row / kGroupUnits;
  if (g >= guided.attention.group_size) return;
  const int64_t head = int64_t{target.index} * guided.attention.group_size + g;
  space.unit_lse[head * space.unit_stride + group * kGroupUnits + row % kGroupUnits] =
      quantise_steps((parts[0].max + __log2f(parts[0].sum)) * 64.0f);
}

}  // namespace art::cuda::guided
