// What the kernels of a guided walk share: one (sequence, KV head), and the log-sum-exp of its
// units.
#pragma once

#include <cstdint>

#include "core/coded_groups.h"
#include "core/item.h"
#include "core/params.h"
#include "core/unit_order.h"

namespace art::cuda::guided {

struct Target {
  int32_t index;
  int32_t batch;
  int32_t kv_head;
  TokenRange visible;
  GroupRange groups;  // with codes

  __device__ Target(const GuidedParams& guided, int32_t index)
      : index(index),
        batch(index / guided.attention.num_kv_heads),
        kv_head(index % guided.attention.num_kv_heads),
        visible(visible_of(guided.attention, index)),
        groups(coded_groups(visible)) {}

  __device__ int32_t num_groups() const {
    return groups.end > groups.begin ? groups.end - groups.begin : 0;
  }
  // Whether there are tokens after the last complete group.
  __device__ bool has_tail() const { return visible.size() > 0 && visible.end % kGroupTokens != 0; }
};

// Where the codes of a group are. Nowhere, if the id is out of range: nothing is read then, and the
// keys count as zeros.
__device__ inline const uint8_t* record_inside(const CodePool& codes, int64_t page, int32_t head) {
  return page >= 0 && page < codes.num_pages ? record_of(codes, page, head) : nullptr;
}

// From <query, key> * scale to the logit: -inf where the token is not visible.
__device__ inline float logit_of(const DecodeParams& params, TokenRange visible, int32_t q_head,
                                 int32_t token, float x) {
  if (params.softcap > 0.0f) x = params.softcap * tanhf(x / params.softcap);
  if (params.alibi_slopes != nullptr) {
    x += params.alibi_slopes[q_head] * static_cast<float>(token - (visible.end - 1));
  }
  return token >= visible.begin && token < visible.end ? x : -INFINITY;
}

// What probabilities of a unit are relative to. We don't want (-inf) - (-inf), which would be NaN.
__device__ inline float reference_of(float max) { return max == -INFINITY ? 0.0f : max; }

__device__ inline int16_t lse_steps(float max, float sum) {
  return quantise_steps(max * kStepsPerNat + __log2f(sum) * 64.0f);
}

}  // namespace art::cuda::guided
