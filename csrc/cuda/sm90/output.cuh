// Thresholds, sinks and results of an item.
#pragma once

#include "core/item.h"
#include "core/online_softmax.h"
#include "core/termination.h"

namespace art::cuda::sm90 {

__device__ inline StabilityThresholds thresholds_of(const DecodeParams& params, int32_t kv_head) {
  if (params.thresholds == nullptr) return {params.d_scale, params.d_direction};
  return {params.thresholds[2 * kv_head], params.thresholds[2 * kv_head + 1]};
}

// For head g of the group of a KV head; null: no sink, or no such head.
__device__ inline const float* sink_of(const DecodeParams& params, int32_t kv_head, int32_t g) {
  if (params.attn_sinks == nullptr || g >= params.group_size) return nullptr;
  return params.attn_sinks + kv_head * params.group_size + g;
}

// What an element of the accumulator is divided by; infinite where nothing was read, for that is
// defined as zero and not 0 / 0.
__device__ inline float denominator_of(const SoftmaxState& state, const float* sink) {
  return state.sum == 0.0f ? INFINITY : state.sum + sink_mass(state, sink);
}

}  // namespace art::cuda::sm90
