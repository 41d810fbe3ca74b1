#include "ops/append_kv.h"

#include "core/int8_rows.h"
#include "ops/check.h"
#include "ops/check_cache.h"

namespace art {
namespace {

constexpr char kOp[] = "append_kv";

AppendParams check_one(const char* name, const Tensor& source, const char* cache_name,
                       const Tensor& cache, const Tensor& slots, const char* scale_name,
                       const std::optional<Tensor>& scale) {
  ART_CHECK(source.dim() == 3, kOp, ": ", name,
            " must have shape [tokens, num_kv_heads, dim], got ", shape_of(source));
  ART_CHECK(cache.dim() == 4, kOp, ": ", cache_name,
            " must have shape [num_pages, page_size, num_kv_heads, dim], got ", shape_of(cache));
  check_same_device(kOp, cache_name, cache, source);
  check_same_device(kOp, "slot_mapping", slots, source);
  const PagedScales scales = paged_scales(kOp, scale_name, scale, cache_name, cache);
  if (scale) {
    check_cache_type(kOp, cache_name, cache);
    ART_CHECK(cache.size(3) <= kMaxInt8Dim, kOp, ": rows of an int8 ", cache_name,
              " must have at most ", kMaxInt8Dim, " elements, got ", cache.size(3));
  } else {
    check_same_dtype(kOp, name, source, cache_name, cache);
  }
  check_shape(kOp, name, source, "[tokens, num_kv_heads, dim]",
              {slots.size(0), cache.size(2), cache.size(3)});
  AppendParams params = {};
  params.num_tokens = source.size(0);
  params.num_kv_heads = source.size(1);
  params.dim = source.size(2);
  params.page_size = cache.size(1);
  params.element_size = static_cast<int64_t>(source.element_size());
  if (scale) {
    params.source_dtype = check_element_type(kOp, name, source);
    params.scale = scale->mutable_data_ptr<float>();
    params.scale_page_stride = scales.page_stride;
    params.scale_token_stride = scales.token_stride;
    params.scale_head_stride = scales.head_stride;
  }
  params.source = source.const_data_ptr();
  params.source_token_stride = source.stride(0);
  params.source_head_stride = source.stride(1);
  params.source_dim_stride = source.stride(2);
  params.cache = cache.mutable_data_ptr();
  params.page_stride = cache.stride(0);
  params.token_stride = cache.stride(1);
  params.head_stride = cache.stride(2);
  params.dim_stride = cache.stride(3);
  params.slots = slots.const_data_ptr<int64_t>();
  params.slots_token_stride = slots.stride(0);
  params.slots_head_stride = slots.dim() == 2 ? slots.stride(1) : 0;
  return params;
}

}  // namespace

AppendPair check_append(const Tensor& key, const Tensor& value, const Tensor& key_cache,
                        const Tensor& value_cache, const Tensor& slot_mapping,
                        const std::optional<Tensor>& key_scale,
                        const std::optional<Tensor>& value_scale) {
  check_dtype(kOp, "slot_mapping", slot_mapping, ScalarType::Long);
  ART_CHECK(slot_mapping.dim() == 1 || slot_mapping.dim() == 2, kOp,
            ": slot_mapping must have shape [tokens] or [tokens, num_kv_heads], got ",
            shape_of(slot_mapping));
  const AppendPair pair = {
      check_one("key", key, "key_cache", key_cache, slot_mapping, "key_scale", key_scale),
      check_one("value", value, "value_cache", value_cache, slot_mapping, "value_scale",
                value_scale)};
  ART_CHECK(slot_mapping.dim() == 1 || slot_mapping.size(1) == key.size(1), kOp,
            ": slot_mapping must have shape [tokens, num_kv_heads] = ",
            text_of({key.size(0), key.size(1)}), ", got ", shape_of(slot_mapping));
  check_same_pages(kOp, value_cache, key_cache);
  return pair;
}

void check_slots(const AppendParams& params, int64_t num_pages) {
  const int64_t num_slots = num_pages * params.page_size;
  const int64_t heads = params.slots_head_stride == 0 ? 1 : params.num_kv_heads;
  for (int64_t token = 0; token < params.num_tokens; ++token) {
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t slot =
          params.slots[token * params.slots_token_stride + head * params.slots_head_stride];
      ART_CHECK(slot >= -1 && slot < num_slots, kOp, ": slot_mapping must be from -1 (skip) to ",
                num_slots - 1, ", got ", slot, " for token ", token,
                params.slots_head_stride == 0 ? "" : ", KV head " + std::to_string(head));
    }
  }
}

}  // namespace art
