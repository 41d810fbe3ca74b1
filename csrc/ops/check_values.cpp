// Checks that have to look at the data. An index that is out of range would otherwise read foreign
// memory, or attend to the wrong tokens without a word.
#include <vector>

#include "core/item.h"
#include "ops/check.h"
#include "ops/check_cache.h"
#include "ops/decode_attention.h"

namespace art {
namespace {

constexpr char kOp[] = "decode_attention";

// Each head of each sequence has its own.
std::string text_of_item(const DecodeParams& params, int64_t index) {
  return art::text_of_item(index / params.num_kv_heads, index % params.num_kv_heads, 1);
}

void check_walk(const DecodeParams& params, int64_t index, bool duplicates) {
  const int32_t len = params.walk_lens[index];
  ART_CHECK(len >= 0 && len <= params.max_units, kOp, ": walk_lens must be from 0 to ",
            params.max_units, " (the last dimension of walk), got ", len, " for ",
            text_of_item(params, index));
  const int64_t capacity = int64_t{params.max_pages} * params.page_size;
  const int64_t num_units = (capacity + params.unit_size - 1) / params.unit_size;
  const int32_t* units = params.walk + index * params.max_units;
  const TokenRange visible = visible_of(params, index);
  std::vector<bool> seen(duplicates ? num_units : 0);
  for (int32_t i = 0; i < len; ++i) {
    ART_CHECK(units[i] >= 0 && units[i] < num_units, kOp,
              ": walk entries are unit numbers (token / unit_size), from 0 to ", num_units - 1,
              ", got ", units[i], " at position ", i, " of ", text_of_item(params, index));
    ART_CHECK(
        !params.walk_is_visible || unit_tokens(units[i], params.unit_size, visible).size() > 0, kOp,
        ": a walk of walk_order 'guided' must list units with a visible token, got ", units[i],
        " at position ", i, " of ", text_of_item(params, index), ", where tokens ", visible.begin,
        " to ", visible.end, " are visible");
    if (!duplicates) continue;
    ART_CHECK(!seen[units[i]], kOp, ": walk must not list a unit twice, got ", units[i],
              " again at position ", i, " of ", text_of_item(params, index));
    seen[units[i]] = true;
  }
}

}  // namespace

void check_values(const DecodeParams& params, bool duplicates) {
  const bool per_head = params.block_table_head_stride != 0 || params.seq_lens_head_stride != 0;
  for (int64_t batch = 0; batch < params.batch; ++batch) {
    for (int64_t head = 0; head < params.num_kv_heads; ++head) {
      if (head == 0 || per_head) {
        check_pages(params, kOp, batch, head, check_length(params, kOp, batch, head));
      }
      const int64_t index = batch * params.num_kv_heads + head;
      if (params.walk_order == WalkOrder::kExplicit) check_walk(params, index, duplicates);
      if (params.pinned_units == nullptr) continue;
      ART_CHECK(params.pinned_units[index] >= 0, kOp,
                ": num_pinned_per_head must not be negative, got ", params.pinned_units[index],
                " for ", text_of_item(params, index));
    }
  }
  for (int64_t i = 0; params.thresholds != nullptr && i < 2 * params.num_kv_heads; ++i) {
    ART_CHECK(params.thresholds[i] >= 0, kOp, ": thresholds must not be negative or NaN, got ",
              params.thresholds[i], i % 2 == 0 ? " as d_scale" : " as d_direction", " of KV head ",
              i / 2);
  }
}

}  // namespace art
