// One (sequence, KV head): all that a kernel derives about it from the parameters.
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "core/params.h"
#include "core/schedule.h"
#include "core/termination.h"
#include "core/walk.h"

namespace art {

struct Item {
  int32_t batch;
  int32_t kv_head;
  TokenRange visible;
  Walk walk;
  StepSchedule steps;
  const int32_t* block_table;  // [max_pages]
};

// Items are numbered batch * num_kv_heads + kv_head.
ART_HD TokenRange visible_of(const DecodeParams& params, int32_t index) {
  const int32_t batch = index / params.num_kv_heads, head = index % params.num_kv_heads;
  const int32_t listed =
      params.seq_lens[batch * params.seq_lens_batch_stride + head * params.seq_lens_head_stride];
  // Lengths on a device are not checked by the host; what the table cannot hold is not read.
  const int32_t capacity = params.max_pages * params.page_size;
  const int32_t len = listed < 0 ? 0 : (listed < capacity ? listed : capacity);
  const int32_t start = params.seq_starts == nullptr ? 0 : params.seq_starts[batch];
  return visible_tokens(len, start < 0 ? 0 : start, params.sliding_window);
}

ART_HD int32_t num_pinned_of(const DecodeParams& params, int32_t index) {
  const int32_t pinned =
      params.pinned_units == nullptr ? params.num_pinned : params.pinned_units[index];
  return pinned < 0 ? 0 : pinned;
}

// An explicit walk of which nothing is dropped.
ART_HD Walk walk_in_place(const DecodeParams& params, int64_t index, int32_t num_pinned) {
  const int32_t listed = params.walk_lens[index];
  const int32_t len = listed < 0 ? 0 : (listed < params.max_units ? listed : params.max_units);
  const int32_t pinned = num_pinned < len ? num_pinned : len;
  return {WalkOrder::kExplicit, 0, len, 0, pinned, params.walk + index * params.max_units};
}

ART_HD const int32_t* block_table_of(const DecodeParams& params, int32_t batch, int32_t head) {
  return params.block_table + batch * params.block_table_batch_stride +
         head * params.block_table_head_stride;
}

ART_HD Item make_item(const DecodeParams& params, int32_t index, TokenRange visible,
                      const Walk& walk) {
  const int32_t batch = index / params.num_kv_heads, head = index % params.num_kv_heads;
  const int32_t* table = block_table_of(params, batch, head);
  const StepSchedule steps(walk, params.block_size, params.unit_size);
  return {static_cast<int32_t>(batch), static_cast<int32_t>(head), visible, walk, steps, table};
}

// For head g of the item's group; null: no sink, or no such head.
ART_HD const float* sink_of(const DecodeParams& params, const Item& item, int32_t g) {
  if (params.attn_sinks == nullptr || g >= params.group_size) return nullptr;
  return params.attn_sinks + item.kv_head * params.group_size + g;
}

ART_HD StabilityThresholds thresholds_of(const DecodeParams& params, const Item& item) {
  if (params.thresholds == nullptr) return {params.d_scale, params.d_direction};
  return {params.thresholds[2 * item.kv_head], params.thresholds[2 * item.kv_head + 1]};
}

}  // namespace art
