#include "ops/key_codes.h"

#include "core/coded_groups.h"
#include "core/key_codes.h"
#include "ops/allocate.h"
#include "ops/check.h"
#include "ops/check_cache.h"

namespace art {
namespace {

constexpr char kEncode[] = "encode_keys";
constexpr char kGuided[] = "guided_walk";

// Records must start where vector loads may.
constexpr int64_t kRecordAlignment = 16;

void set_pool(CodePool& codes, const char* op, const Tensor& pool, const DecodeParams& cache,
              const Tensor& first) {
  const int64_t record_bytes = CodeLayout(cache.head_dim).record_bytes();
  check_dtype(op, "key_codes", pool, ScalarType::Byte);
  check_same_device(op, "key_codes", pool, first);
  check_rank(op, "key_codes", pool, 3, "[num_code_pages, num_kv_heads, record_bytes]");
  ART_CHECK(pool.size(1) == cache.num_kv_heads && pool.size(2) == record_bytes, op,
            ": key_codes must have shape [num_code_pages, num_kv_heads, record_bytes] = [*, ",
            cache.num_kv_heads, ", ", record_bytes, "] for head_dim ", cache.head_dim, ", got ",
            shape_of(pool));
  const bool aligned = reinterpret_cast<uintptr_t>(pool.const_data_ptr()) % kRecordAlignment == 0 &&
                       (pool.size(0) <= 1 || pool.stride(0) % kRecordAlignment == 0) &&
                       (pool.size(1) <= 1 || pool.stride(1) % kRecordAlignment == 0);
  ART_CHECK(pool.stride(2) == 1 && aligned, op, ": records of key_codes must be contiguous and ",
            "start at multiples of ", kRecordAlignment, " bytes, got strides ", pool.stride(0),
            ", ", pool.stride(1), " and ", pool.stride(2));
  codes.records = static_cast<uint8_t*>(pool.mutable_data_ptr());
  codes.num_pages = pool.size(0);
  codes.page_stride = pool.stride(0);
  codes.head_stride = pool.stride(1);
}

void set_code_table(CodePool& codes, const char* op, const Tensor& table, const DecodeParams& cache,
                    const Tensor& first) {
  const int64_t max_groups = check_table(op, "code_table", table, "max_groups", cache, first);
  // So that no length that fits the block table needs an entry that is not there.
  const int64_t capacity = int64_t{cache.max_pages} * cache.page_size;
  ART_CHECK(max_groups >= capacity / kGroupTokens, op, ": code_table must have at least ",
            capacity / kGroupTokens, " entries a row, one for each ", kGroupTokens,
            " tokens that block_table holds (", cache.max_pages, " pages of ", cache.page_size,
            "), got ", max_groups);
  point_to_table(codes, table);
}

void check_code_ids(const CodePool& codes, const char* op, int64_t batch, int64_t head,
                    GroupRange groups) {
  const int32_t* table = code_table_of(codes, batch, head);
  for (int32_t g = groups.begin; g < groups.end; ++g) {
    ART_CHECK(table[g] >= 0 && table[g] < codes.num_pages, op,
              ": ids in code_table must be from 0 to ", codes.num_pages - 1, ", got ", table[g],
              " at group ", g, " of ", text_of_item(batch, head, codes.table_head_stride));
  }
}

}  // namespace

void point_to_table(CodePool& codes, const Tensor& code_table) {
  codes.table = code_table.const_data_ptr<int32_t>();
  codes.table_batch_stride = code_table.stride(0);
  codes.table_head_stride = code_table.dim() == 3 ? code_table.stride(1) : 0;
}

void point_to_coded_lens(EncodeParams& params, const Tensor& coded_lens) {
  params.coded_lens = coded_lens.const_data_ptr<int32_t>();
  params.coded_lens_batch_stride = coded_lens.stride(0);
  params.coded_lens_head_stride = coded_lens.dim() == 2 ? coded_lens.stride(1) : 0;
}

EncodeParams check_encode(const EncodeArguments& args) {
  EncodeParams params = {};
  DecodeParams& cache = params.cache;
  set_keys(cache, kEncode, args.key_cache, args.key_scale, args.key_cache);
  ART_CHECK(args.seq_lens.dim() >= 1, kEncode,
            ": seq_lens must have shape [batch] or [batch, num_kv_heads], got []");
  cache.batch = args.seq_lens.size(0);
  set_tables(cache, kEncode, args.block_table, args.seq_lens, std::nullopt, args.key_cache);
  set_pool(params.codes, kEncode, args.key_codes, cache, args.key_cache);
  set_code_table(params.codes, kEncode, args.code_table, cache, args.key_cache);
  if (args.coded_lens) {
    check_lens(kEncode, "coded_lens", *args.coded_lens, cache, args.key_cache);
    point_to_coded_lens(params, *args.coded_lens);
  }
  return params;
}

GuidedParams check_guided(const GuidedArguments& args) {
  GuidedParams params = {};
  DecodeParams& attention = params.attention;
  set_query(attention, kGuided, args.query, args.key_cache);
  set_keys(attention, kGuided, args.key_cache, args.key_scale, args.query);
  set_tables(attention, kGuided, args.block_table, args.seq_lens, args.seq_starts, args.query);
  set_logits(attention, kGuided,
             {args.scale, args.softcap, args.attn_sinks, args.sliding_window, args.alibi_slopes,
              args.seq_lens.dim() == 2},
             args.query);
  ART_CHECK(attention.page_size % kUnitTokens == 0 || attention.max_pages <= 1, kGuided,
            ": page_size must be a multiple of ", kUnitTokens,
            " (unless there is one page per sequence), got ", attention.page_size);
  attention.unit_size = attention.block_size = kUnitTokens;
  set_pool(params.codes, kGuided, args.key_codes, attention, args.query);
  set_code_table(params.codes, kGuided, args.code_table, attention, args.query);
  const int64_t capacity = int64_t{attention.max_pages} * attention.page_size;
  params.max_units = (capacity + kUnitTokens - 1) / kUnitTokens;
  return params;
}

GuidedOutputs allocate_outputs(const GuidedArguments& args, GuidedParams& params) {
  const int64_t batch = params.attention.batch, heads = params.attention.num_kv_heads;
  const auto empty = [&](std::initializer_list<int64_t> shape, ScalarType dtype) {
    return new_empty(args.query, shape, dtype);
  };
  const GuidedOutputs outputs = {
      empty({batch, heads, params.max_units}, ScalarType::Int),
      empty({batch, heads}, ScalarType::Int), empty({batch, heads}, ScalarType::Int),
      empty({batch, heads, params.max_units}, ScalarType::Float),
      empty({batch, params.attention.num_q_heads, args.rest ? params.max_units : 0},
            ScalarType::Float)};
  params.walk = outputs.walk.mutable_data_ptr<int32_t>();
  params.walk_lens = outputs.walk_lens.mutable_data_ptr<int32_t>();
  params.num_pinned = outputs.num_pinned.mutable_data_ptr<int32_t>();
  params.log_mass = outputs.log_mass.mutable_data_ptr<float>();
  params.log_rest = args.rest ? outputs.log_rest.mutable_data_ptr<float>() : nullptr;
  return outputs;
}

void check_values(const EncodeParams& params) {
  const DecodeParams& cache = params.cache;
  for (int64_t batch = 0; batch < cache.batch; ++batch) {
    for (int64_t head = 0; head < cache.num_kv_heads; ++head) {
      check_length(cache, kEncode, batch, head);
      const GroupRange groups = new_groups(params, batch, head);
      ART_CHECK(groups.begin >= 0, kEncode, ": coded_lens must not be negative, got ",
                params.coded_lens[batch * params.coded_lens_batch_stride +
                                  head * params.coded_lens_head_stride],
                " for ", text_of_item(batch, head, params.coded_lens_head_stride));
      if (groups.begin >= groups.end) continue;
      check_code_ids(params.codes, kEncode, batch, head, groups);
      check_pages(cache, kEncode, batch, head,
                  {groups.begin * kGroupTokens, groups.end * kGroupTokens});
    }
  }
}

void check_values(const GuidedParams& params) {
  const DecodeParams& attention = params.attention;
  for (int64_t batch = 0; batch < attention.batch; ++batch) {
    for (int64_t head = 0; head < attention.num_kv_heads; ++head) {
      const TokenRange visible = check_length(attention, kGuided, batch, head);
      const GroupRange groups = coded_groups(visible);
      check_code_ids(params.codes, kGuided, batch, head, groups);
      const int32_t tail = groups.end * kGroupTokens;
      check_pages(attention, kGuided, batch, head,
                  {tail > visible.begin ? tail : visible.begin, visible.end});
    }
  }
}

}  // namespace art
