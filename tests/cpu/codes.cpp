#include "codes.h"

#include <cmath>
#include <cstring>
#include <numeric>

#include "core/coded_groups.h"
#include "core/key_codes.h"
#include "exact.h"

namespace checks {
namespace {

constexpr uint8_t kUntouched = 0xa5;

void write_half(uint8_t* to, uint16_t half) { std::memcpy(to, &half, sizeof(half)); }

uint16_t read_half(const uint8_t* from) {
  uint16_t half;
  std::memcpy(&half, from, sizeof(half));
  return half;
}

void encode_channel(const art::DecodeParams& cache, int32_t batch, int32_t head, int32_t group,
                    int32_t channel, uint8_t* record) {
  const art::CodeLayout layout(cache.head_dim);
  float keys[art::kGroupTokens], min = 0.0f, max = 0.0f;
  for (int32_t t = 0; t < art::kGroupTokens; ++t) {
    keys[t] = 0.0f;  // channels that fill up the last step
    if (channel < cache.head_dim) {
      const double key = read(cache, cache.key, cache.key_scale, batch, head,
                              group * art::kGroupTokens + t, channel);
      keys[t] = art::encodable(static_cast<float>(key));
    }
    min = t == 0 ? keys[t] : std::fmin(min, keys[t]);
    max = t == 0 ? keys[t] : std::fmax(max, keys[t]);
  }
  const art::CodeGrid grid = art::code_grid(min, max);
  write_half(record + layout.scales_at() + 2 * layout.position(channel), grid.scale);
  write_half(record + layout.zeros_at() + 2 * layout.position(channel), grid.zero);
  for (int32_t t = 0; t < art::kGroupTokens; ++t) {
    const uint32_t code =
        art::code_of(keys[t], art::float_of(grid.zero), art::float_of(grid.scale));
    uint8_t& byte = record[layout.byte(t, channel)];
    byte = static_cast<uint8_t>((byte & ~(3u << layout.shift(channel))) |
                                code << layout.shift(channel));
  }
}

// The logit that the codes promise, before soft cap and ALiBi.
double coded_logit(const art::GuidedParams& params, int32_t batch, int32_t head, int32_t token) {
  const art::DecodeParams& cache = params.attention;
  const int32_t kv_head = head / cache.group_size;
  const art::CodeLayout layout(cache.head_dim);
  const int32_t page = art::code_table_of(params.codes, batch, kv_head)[token / art::kGroupTokens];
  const uint8_t* record = art::record_of(params.codes, page, kv_head);
  double sum = 0.0;
  for (int32_t d = 0; d < cache.head_dim; ++d) {
    const uint32_t code =
        record[layout.byte(token % art::kGroupTokens, d)] >> layout.shift(d) & art::kMaxCode;
    const double zero =
        art::float_of(read_half(record + layout.zeros_at() + 2 * layout.position(d)));
    const double scale =
        art::float_of(read_half(record + layout.scales_at() + 2 * layout.position(d)));
    const double q = read(cache.query_dtype, cache.query,
                          batch * cache.query_batch_stride + head * cache.query_head_stride + d);
    sum += q * (zero + scale * code);
  }
  return sum * cache.scale;
}

}  // namespace

void build(const Problem& problem, uint32_t seed, Codes& codes) {
  const DecodeParams& cache = problem.params;
  Random random(seed);
  const int32_t heads = cache.num_kv_heads, groups = problem.capacity / art::kGroupTokens + 1;
  const int32_t pages = cache.batch * groups + 1;
  const int64_t record_bytes = art::CodeLayout(cache.head_dim).record_bytes();
  codes.table.resize(pages);
  std::iota(codes.table.begin(), codes.table.end(), 0);
  for (int32_t i = pages - 1; i > 0; --i)
    std::swap(codes.table[i], codes.table[random.below(i + 1)]);
  codes.memory.assign(pages * heads * record_bytes, kUntouched);
  codes.params.cache = cache;
  codes.params.codes = {codes.memory.data(),
                        pages,
                        heads * record_bytes,
                        record_bytes,
                        codes.table.data(),
                        groups,
                        0};
}

std::vector<uint8_t> exact_records(const Codes& codes) {
  const art::DecodeParams& cache = codes.params.cache;
  std::vector<uint8_t> memory(codes.memory.size(), kUntouched);
  art::CodePool pool = codes.params.codes;
  pool.records = memory.data();
  for (int32_t b = 0; b < cache.batch; ++b) {
    for (int32_t h = 0; h < cache.num_kv_heads; ++h) {
      for (int32_t group = 0; group < cache.seq_lens[b] / art::kGroupTokens; ++group) {
        uint8_t* record = art::record_of(pool, art::code_table_of(pool, b, h)[group], h);
        const int32_t channels = art::CodeLayout(cache.head_dim).channels();
        for (int32_t d = 0; d < channels; ++d) encode_channel(cache, b, h, group, d, record);
      }
    }
  }
  return memory;
}

std::vector<double> exact_units(const art::GuidedParams& params, int32_t batch, int32_t head) {
  const art::DecodeParams& cache = params.attention;
  const Visible visible = visible_of(cache, batch);
  const int32_t coded = visible.end / art::kGroupTokens * art::kGroupTokens;
  std::vector<double> units(params.max_units, -INFINITY);
  for (int32_t token = visible.begin; token < visible.end; ++token) {
    const double plain = token < coded ? coded_logit(params, batch, head, token)
                                       : plain_logit(cache, batch, head, token).value;
    double& unit = units[token / art::kUnitTokens];
    unit = log_add(unit, adjusted(cache, batch, head, token, plain));
  }
  return units;
}

}  // namespace checks
