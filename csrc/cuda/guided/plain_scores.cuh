// Log-sum-exp of the units of 64 tokens in float32, for one thread block: of a group by its codes,
// of what follows the last complete group by its keys. Made to be right for every shape and dtype.
#pragma once

#include <cstdint>

#include "cuda/elements.cuh"
#include "cuda/guided/units.cuh"
#include "cuda/guided/workspace.h"
#include "cuda/rows.cuh"

namespace art::cuda::guided {

constexpr int kPlainHeads = 16;  // query heads that are computed together; more take more rounds
constexpr int kLaneChannels = kMaxCodeChannels / 32;  // a lane's are 32 apart

struct PlainShared {
  float query[kPlainHeads][kMaxCodeChannels];  // scaled
  float scores[kPlainHeads][kGroupTokens];
};

// The grid of a lane's channels: zeros where there is no record, and no such channel.
struct LaneGrid {
  float zero[kLaneChannels];
  float scale[kLaneChannels];

  __device__ LaneGrid(const CodeLayout& layout, const uint8_t* record, int32_t head_dim) {
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) {
      const int32_t channel = static_cast<int32_t>(threadIdx.x % 32) + 32 * i;
      zero[i] = scale[i] = 0.0f;
      if (record == nullptr || channel >= head_dim) continue;
      const auto half_at = [&](int32_t at) {
        return __half2float(reinterpret_cast<const __half*>(record + at)[layout.position(channel)]);
      };
      zero[i] = half_at(layout.zeros_at());
      scale[i] = half_at(layout.scales_at());
    }
  }
};

__device__ inline void decode_key(const CodeLayout& layout, const uint8_t* record,
                                  const LaneGrid& grid, int32_t in_group, int32_t head_dim,
                                  float (&key)[kLaneChannels]) {
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) {
    const int32_t channel = static_cast<int32_t>(threadIdx.x % 32) + 32 * i;
    key[i] = 0.0f;
    if (record == nullptr || channel >= head_dim) continue;
    const uint32_t byte = record[layout.byte(in_group, channel)];
    const uint32_t code = byte >> CodeLayout::shift(channel) & kMaxCode;
    key[i] = grid.zero[i] + grid.scale[i] * static_cast<float>(code);
  }
}

// The key itself; zeros if its page is out of range.
__device__ inline void load_key(const DecodeParams& params, const Target& target, int32_t token,
                                float (&key)[kLaneChannels]) {
  const int32_t* table = block_table_of(params, target.batch, target.kv_head);
  const int64_t page = table[token / params.page_size];
  const bool inside = page >= 0 && page < params.num_pages;
  const int64_t row =
      inside ? row_offset(params.key, page, token % params.page_size, target.kv_head) : 0;
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) {
    const int32_t channel = static_cast<int32_t>(threadIdx.x % 32) + 32 * i;
    key[i] = 0.0f;
    if (!inside || channel >= params.head_dim) continue;
    key[i] = element(params.key.data, row + channel * params.key.dim_stride, params.dtype);
  }
}

__device__ inline void load_heads(const DecodeParams& params, const Target& target,
                                  int32_t first_head, int32_t heads, PlainShared& shared) {
  const int32_t first = target.kv_head * params.group_size + first_head;
  for (int32_t i = threadIdx.x; i < heads * params.head_dim; i += blockDim.x) {
    const int32_t g = i / params.head_dim, d = i % params.head_dim;
    const int64_t at =
        target.batch * params.query_batch_stride + (first + g) * params.query_head_stride + d;
    shared.query[g][d] = element(params.query, at, params.dtype) * params.scale;
  }
}

// One warp per token: the key is read once for all heads.
__device__ inline void score_tokens(const GuidedParams& guided, const Target& target,
                                    int32_t origin, bool is_coded, const uint8_t* record,
                                    int32_t first_head, int32_t heads, PlainShared& shared) {
  const DecodeParams& params = guided.attention;
  const CodeLayout layout(params.head_dim);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int32_t first_q_head = target.kv_head * params.group_size + first_head;
  const LaneGrid grid(layout, record, params.head_dim);
  for (int t = warp; t < kGroupTokens; t += warps) {
    const int32_t token = origin + t;
    if (token < target.visible.begin || token >= target.visible.end) {
      if (lane < heads) shared.scores[lane][t] = -INFINITY;
      continue;
    }
    float key[kLaneChannels];
    if (is_coded) {
      decode_key(layout, record, grid, t, params.head_dim, key);
    } else {
      load_key(params, target, token, key);
    }
    for (int32_t g = 0; g < heads; ++g) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kLaneChannels; ++i) {
        if (lane + 32 * i < params.head_dim) sum += key[i] * shared.query[g][lane + 32 * i];
      }
      const float x = warp_sum(sum);
      if (lane == 0) {
        shared.scores[g][t] = logit_of(params, target.visible, first_q_head + g, token, x);
      }
    }
  }
}

// Half a warp for each unit and head.
__device__ inline void reduce_units(const GuidedParams& guided, const Target& target,
                                    int32_t origin, int32_t first_head, int32_t heads,
                                    const Workspace& space, const PlainShared& shared) {
  const int32_t in_unit = threadIdx.x % kUnitTokens, halves = blockDim.x / kUnitTokens;
  // The two halves of a warp go round equally often: there are four units for each head.
  for (int32_t i = threadIdx.x / kUnitTokens; i < heads * kGroupUnits; i += halves) {
    const int32_t g = i / kGroupUnits, u = i % kGroupUnits;
    const int32_t unit = origin / kUnitTokens + u;
    const float x = shared.scores[g][u * kUnitTokens + in_unit];
    float max = x;
#pragma unroll
    for (int distance = kUnitTokens / 2; distance > 0; distance /= 2) {
      max = fmaxf(max, __shfl_xor_sync(~0u, max, distance));
    }
    float sum = expf(x - reference_of(max));
#pragma unroll
    for (int distance = kUnitTokens / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(~0u, sum, distance);
    }
    if (in_unit != 0 || unit * kUnitTokens >= target.visible.end) continue;
    const int64_t row = int64_t{target.index} * guided.attention.group_size + first_head + g;
    space.unit_lse[row * space.unit_stride + unit] = lse_steps(max, sum);
  }
}

// All units of the 64 tokens from `origin` on. Starts and ends with all threads together.
__device__ inline void score_plainly(const GuidedParams& guided, const Target& target,
                                     int32_t origin, bool is_coded, const Workspace& space,
                                     PlainShared& shared) {
  const int32_t group_size = guided.attention.group_size;
  const uint8_t* record = nullptr;
  if (is_coded) {
    const int32_t* table = code_table_of(guided.codes, target.batch, target.kv_head);
    record = record_inside(guided.codes, table[origin / kGroupTokens], target.kv_head);
  }
  for (int32_t first = 0; first < group_size; first += kPlainHeads) {
    const int32_t left = group_size - first, heads = left < kPlainHeads ? left : kPlainHeads;
    load_heads(guided.attention, target, first, heads, shared);
    __syncthreads();
    score_tokens(guided, target, origin, is_coded, record, first, heads, shared);
    __syncthreads();
    reduce_units(guided, target, origin, first, heads, space, shared);
    __syncthreads();
  }
}

}  // namespace art::cuda::guided
