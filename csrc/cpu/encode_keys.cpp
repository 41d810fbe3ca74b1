// Comparisons may be evaluated for both outcomes: no value depends on it, and loops become vectors.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math")
#endif

#include "cpu/encode_keys.h"

#include <cstring>

#include "core/coded_groups.h"
#include "core/item.h"
#include "core/key_codes.h"
#include "cpu/elements.h"

namespace art::cpu {
namespace {

// A group of keys as float32, channels padded with zeros to whole steps.
struct Group {
  float keys[kGroupTokens][kMaxCodeChannels];
};

template <DType dtype>
void load_keys(const DecodeParams& cache, int32_t batch, int32_t head, int32_t group,
               const CodeLayout& layout, Group& result) {
  constexpr int64_t kSize = size_of(dtype);
  const char* keys =
      static_cast<const char*>(cache.key.data) + head * cache.key.head_stride * kSize;
  const int32_t* table = block_table_of(cache, batch, head);
  for (int32_t t = 0; t < kGroupTokens; ++t) {
    const int32_t token = group * kGroupTokens + t;
    const int64_t page = table[token / cache.page_size], offset = token % cache.page_size;
    const char* key =
        keys + (page * cache.key.page_stride + offset * cache.key.token_stride) * kSize;
    float* row = result.keys[t];
    const auto load_row = [&](int64_t stride, auto convert) {
      for (int32_t d = 0; d < cache.head_dim; ++d) {
        row[d] = encodable(convert(value_of(key + d * stride * kSize, DTypeConstant<dtype>())));
      }
    };
    const auto load_with = [&](auto convert) {
      if (cache.key.dim_stride == 1) {  // apart, so that it becomes vectors
        load_row(1, convert);
      } else {
        load_row(cache.key.dim_stride, convert);
      }
    };
    if constexpr (dtype == DType::kInt8) {
      const float scale = *cache.key_scale.at(page, offset, head);
      load_with([scale](float code) { return code * scale; });
    } else {
      load_with([](float key) { return key; });
    }
    for (int32_t d = cache.head_dim; d < layout.channels(); ++d) row[d] = 0.0f;
  }
}

void write_half(uint8_t* to, uint16_t half) { std::memcpy(to, &half, sizeof(half)); }

void write_record(const Group& group, const CodeLayout& layout, uint8_t* record) {
  const int32_t channels = layout.channels();
  float zero[kMaxCodeChannels], scale[kMaxCodeChannels], max[kMaxCodeChannels];
  std::memcpy(zero, group.keys[0], sizeof(float) * channels);
  std::memcpy(max, group.keys[0], sizeof(float) * channels);
  for (const float (&row)[kMaxCodeChannels] : group.keys) {
    for (int32_t d = 0; d < channels; ++d) {
      zero[d] = row[d] < zero[d] ? row[d] : zero[d];
      max[d] = row[d] > max[d] ? row[d] : max[d];
    }
  }
  for (int32_t d = 0; d < channels; ++d) {
    const CodeGrid grid = code_grid(zero[d], max[d]);
    write_half(record + layout.scales_at() + 2 * layout.position(d), grid.scale);
    write_half(record + layout.zeros_at() + 2 * layout.position(d), grid.zero);
    zero[d] = float_of(grid.zero);
    scale[d] = float_of(grid.scale);
  }
  for (int32_t t = 0; t < kGroupTokens; ++t) {
    uint32_t codes[kMaxCodeChannels];
    for (int32_t d = 0; d < channels; ++d) codes[d] = code_of(group.keys[t][d], zero[d], scale[d]);
    for (int32_t lane = 0; lane < 4; ++lane) {
      // The four channels of a byte: two neighbours, and those 8 further.
      uint8_t* byte = record + layout.byte(t, 2 * lane);
      for (int32_t step = 0; step < layout.steps; ++step) {
        const uint32_t* c = codes + 16 * step + 2 * lane;
        byte[2 * step] = c[0] | c[1] << 2 | c[8] << 4 | c[9] << 6;
      }
    }
  }
}

}  // namespace

void encode_item(const EncodeParams& params, int64_t index) {
  const int32_t batch = index / params.cache.num_kv_heads, head = index % params.cache.num_kv_heads;
  const CodeLayout layout(params.cache.head_dim);
  const int32_t* table = code_table_of(params.codes, batch, head);
  const GroupRange groups = new_groups(params, batch, head);
  Group group;
  for (int32_t g = groups.begin; g < groups.end; ++g) {
    with_dtype(params.cache.dtype, [&](auto kind) {
      load_keys<decltype(kind)::value>(params.cache, batch, head, g, layout, group);
    });
    write_record(group, layout, record_of(params.codes, table[g], head));
  }
}

}  // namespace art::cpu
