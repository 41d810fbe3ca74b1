#include "ops/decode_attention.h"

#include <cmath>
#include <limits>

#include <torch/csrc/stable/ops.h>

#include "core/walk.h"
#include "ops/check.h"

namespace art {
namespace {

constexpr char kOp[] = "decode_attention";

DType check_element_type(const DecodeArguments& args) {
  const ScalarType dtype = args.query.scalar_type();
  const bool known =
      dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
  ART_CHECK(known, kOp, ": dtype of query must be float32, float16 or bfloat16, got ",
            dtype_name(dtype));
  check_dtype(kOp, "key_cache", args.key_cache, dtype);
  check_dtype(kOp, "value_cache", args.value_cache, dtype);
  if (dtype == ScalarType::Float) return DType::kFloat32;
  return dtype == ScalarType::Half ? DType::kFloat16 : DType::kBFloat16;
}

void check_rank(const char* name, const Tensor& tensor, int64_t rank, const char* meaning) {
  ART_CHECK(tensor.dim() == rank, kOp, ": ", name, " must have shape ", meaning, ", got ",
            shape_of(tensor));
}

void check_dim(const char* name, int64_t dim) {
  ART_CHECK(dim != 576, kOp, ": ", name, " 576 is a latent (MLA) cache, which is not supported; ",
            name, " must be a multiple of 8 from 32 to 256");
  ART_CHECK(dim >= 32 && dim <= 256 && dim % 8 == 0, kOp, ": ", name,
            " must be a multiple of 8 from 32 to 256, got ", dim);
}

void check_int32(const char* name, const Tensor& tensor, const DecodeArguments& args) {
  check_dtype(kOp, name, tensor, ScalarType::Int);
  check_same_device(kOp, name, tensor, args.query);
}

// An optional float32 tensor; null when absent.
const float* float_data(const char* name, const std::optional<Tensor>& tensor, const char* meaning,
                        std::initializer_list<int64_t> shape, const DecodeArguments& args) {
  if (!tensor) return nullptr;
  check_dtype(kOp, name, *tensor, ScalarType::Float);
  check_same_device(kOp, name, *tensor, args.query);
  check_shape(kOp, name, *tensor, meaning, shape);
  ART_CHECK(tensor->is_contiguous(), kOp, ": ", name, " must be contiguous");
  return tensor->const_data_ptr<float>();
}

// An optional contiguous int32 tensor; null when absent.
const int32_t* int_data(const char* name, const std::optional<Tensor>& tensor, const char* meaning,
                        std::initializer_list<int64_t> shape, const DecodeArguments& args) {
  if (!tensor) return nullptr;
  check_int32(name, *tensor, args);
  check_shape(kOp, name, *tensor, meaning, shape);
  ART_CHECK(tensor->is_contiguous(), kOp, ": ", name, " must be contiguous");
  return tensor->const_data_ptr<int32_t>();
}

PagedCache paged_cache(const Tensor& cache) {
  return {cache.const_data_ptr(), cache.stride(0), cache.stride(1), cache.stride(2),
          cache.stride(3)};
}

void set_caches(DecodeParams& params, const DecodeArguments& args) {
  const Tensor &query = args.query, &key = args.key_cache, &value = args.value_cache;
  check_rank("query", query, 3, "[batch, num_q_heads, head_dim]");
  check_rank("key_cache", key, 4, "[num_pages, page_size, num_kv_heads, head_dim]");
  check_rank("value_cache", value, 4, "[num_pages, page_size, num_kv_heads, value_dim]");
  check_same_device(kOp, "key_cache", key, query);
  check_same_device(kOp, "value_cache", value, query);
  params.dtype = check_element_type(args);
  const int64_t heads = query.size(1), kv_heads = key.size(2), page_size = key.size(1);
  ART_CHECK(kv_heads >= 1 && heads >= 1 && heads % kv_heads == 0, kOp,
            ": num_q_heads must be a positive multiple of num_kv_heads, got ", heads, " and ",
            kv_heads);
  check_dim("head_dim", query.size(2));
  check_dim("value_dim", value.size(3));
  ART_CHECK(key.size(3) == query.size(2), kOp, ": key_cache must have head_dim ", query.size(2),
            " as the query has, got ", key.size(3));
  ART_CHECK(value.size(0) == key.size(0) && value.size(1) == page_size && value.size(2) == kv_heads,
            kOp, ": value_cache must have the pages and heads of key_cache, ", shape_of(key),
            ", got ", shape_of(value));
  ART_CHECK(page_size >= 1, kOp, ": page_size must be at least 1, got ", page_size);
  ART_CHECK(query.stride(2) == 1, kOp, ": the last dimension of query must be contiguous");
  ART_CHECK(key.stride(3) == 1 || key.stride(1) == 1, kOp,
            ": head_dim or the token dimension of key_cache must be contiguous, got strides ",
            key.stride(3), " and ", key.stride(1));
  ART_CHECK(value.stride(3) == 1, kOp, ": the last dimension of value_cache must be contiguous");
  params.batch = query.size(0);
  params.num_q_heads = heads;
  params.num_kv_heads = kv_heads;
  params.group_size = heads / kv_heads;
  params.head_dim = query.size(2);
  params.value_dim = value.size(3);
  params.page_size = page_size;
  params.num_pages = key.size(0);
  params.query = query.const_data_ptr();
  params.query_batch_stride = query.stride(0);
  params.query_head_stride = query.stride(1);
  params.key = paged_cache(key);
  params.value = paged_cache(value);
}

void set_tables(DecodeParams& params, const DecodeArguments& args) {
  const Tensor &table = args.block_table, &lens = args.seq_lens;
  check_int32("block_table", table, args);
  check_int32("seq_lens", lens, args);
  const int64_t batch = params.batch, heads = params.num_kv_heads;
  ART_CHECK(table.dim() == 2 || table.dim() == 3, kOp,
            ": block_table must have shape [batch, max_pages] or [batch, num_kv_heads, ",
            "max_pages], got ", shape_of(table));
  const bool table_per_head = table.dim() == 3;
  const int64_t max_pages = table.size(table.dim() - 1);
  if (table_per_head) {
    check_shape(kOp, "block_table", table, "[batch, num_kv_heads, max_pages]",
                {batch, heads, max_pages});
  } else {
    check_shape(kOp, "block_table", table, "[batch, max_pages]", {batch, max_pages});
  }
  ART_CHECK(max_pages <= 1 || table.stride(table.dim() - 1) == 1, kOp,
            ": the last dimension of block_table must be contiguous");
  const bool lens_per_head = lens.dim() == 2;
  if (lens_per_head) {
    check_shape(kOp, "seq_lens", lens, "[batch, num_kv_heads]", {batch, heads});
  } else {
    check_shape(kOp, "seq_lens", lens, "[batch]", {batch});
  }
  ART_CHECK(max_pages * params.page_size <= std::numeric_limits<int32_t>::max(), kOp,
            ": block_table must address fewer than 2^31 tokens, got ", max_pages, " pages of ",
            params.page_size);
  params.max_pages = max_pages;
  params.block_table = table.const_data_ptr<int32_t>();
  params.block_table_batch_stride = table.stride(0);
  params.block_table_head_stride = table_per_head ? table.stride(1) : 0;
  params.seq_lens = lens.const_data_ptr<int32_t>();
  params.seq_lens_batch_stride = lens.stride(0);
  params.seq_lens_head_stride = lens_per_head ? lens.stride(1) : 0;
  params.seq_starts = int_data("seq_starts", args.seq_starts, "[batch]", {batch}, args);
}

void set_logits(DecodeParams& params, const DecodeArguments& args) {
  const double scale = args.scale ? *args.scale : 1.0 / std::sqrt(double(params.head_dim));
  ART_CHECK(std::isfinite(scale), kOp, ": scale must be finite, got ", scale);
  ART_CHECK(std::isfinite(args.softcap) && args.softcap >= 0, kOp,
            ": softcap must be positive, or 0 for none, got ", args.softcap);
  ART_CHECK(args.sliding_window >= 0, kOp, ": sliding_window must be positive, or 0 for none, got ",
            args.sliding_window);
  const bool per_head_lens = params.seq_lens_head_stride != 0 || args.seq_lens.dim() == 2;
  ART_CHECK(!per_head_lens || (args.sliding_window == 0 && !args.alibi_slopes), kOp,
            ": sliding_window and alibi_slopes need positions, which seq_lens per head ",
            "(an evicted cache) does not tell");
  params.scale = scale;
  params.softcap = args.softcap;
  params.sliding_window = std::min<int64_t>(args.sliding_window, INT32_MAX);
  const int64_t heads = params.num_q_heads;
  params.attn_sinks = float_data("attn_sinks", args.attn_sinks, "[num_q_heads]", {heads}, args);
  params.alibi_slopes =
      float_data("alibi_slopes", args.alibi_slopes, "[num_q_heads]", {heads}, args);
}

WalkOrder parse_walk_order(const std::string& name) {
  if (name == "sink_recent") return WalkOrder::kSinkRecent;
  if (name == "recent_first") return WalkOrder::kRecentFirst;
  if (name == "oldest_first") return WalkOrder::kOldestFirst;
  fail_check(kOp, ": walk_order must be 'oldest_first', 'recent_first' or 'sink_recent', got '",
             name, "'");
}

void set_walk(DecodeParams& params, const DecodeArguments& args) {
  const int64_t unit = args.unit_size, block = args.block_size;
  ART_CHECK(unit >= 1 && unit <= INT32_MAX, kOp, ": unit_size must be at least 1, got ", unit);
  ART_CHECK(params.page_size % unit == 0 || params.max_pages <= 1, kOp,
            ": unit_size must divide page_size ", params.page_size,
            " (unless there is one page per sequence), got ", unit);
  ART_CHECK(block >= unit && block <= INT32_MAX && block % unit == 0, kOp,
            ": block_size must be a positive multiple of unit_size ", unit, ", got ", block);
  ART_CHECK(!args.num_pinned || !args.num_pinned_per_head, kOp,
            ": num_pinned and num_pinned_per_head must not both be given");
  ART_CHECK(!args.num_pinned || *args.num_pinned >= 0, kOp,
            ": num_pinned must not be negative, got ", args.num_pinned.value_or(0));
  ART_CHECK(args.walk.has_value() == args.walk_lens.has_value(), kOp,
            ": walk and walk_lens must be given together");
  const int64_t batch = params.batch, heads = params.num_kv_heads;
  params.unit_size = unit;
  params.block_size = block;
  params.walk_order = args.walk ? WalkOrder::kExplicit : parse_walk_order(args.walk_order);
  if (args.walk) {
    check_rank("walk", *args.walk, 3, "[batch, num_kv_heads, max_units]");
    params.max_units = args.walk->size(2);
  }
  params.walk = int_data("walk", args.walk, "[batch, num_kv_heads, max_units]",
                         {batch, heads, params.max_units}, args);
  params.walk_lens =
      int_data("walk_lens", args.walk_lens, "[batch, num_kv_heads]", {batch, heads}, args);
  params.pinned_units = int_data("num_pinned_per_head", args.num_pinned_per_head,
                                 "[batch, num_kv_heads]", {batch, heads}, args);
  const int64_t sink_units = (kSinkTokens + unit - 1) / unit;
  const int64_t pinned_by_default =
      params.walk_order == WalkOrder::kSinkRecent ? 2 * sink_units : 0;
  params.num_pinned = std::min<int64_t>(args.num_pinned.value_or(pinned_by_default), INT32_MAX);
}

void set_criterion(DecodeParams& params, const DecodeArguments& args) {
  ART_CHECK(args.criterion == 0 || args.criterion == 1, kOp,
            ": criterion must be 0 (none) or 1 (Stability), got ", args.criterion);
  ART_CHECK(args.patience >= 1 && args.patience <= INT32_MAX, kOp,
            ": patience must be at least 1, got ", args.patience);
  ART_CHECK(args.d_scale >= 0, kOp, ": d_scale must not be negative or NaN, got ", args.d_scale);
  ART_CHECK(args.d_direction >= 0, kOp, ": d_direction must not be negative or NaN, got ",
            args.d_direction);
  params.use_stability = args.criterion == 1;
  params.d_scale = args.d_scale;
  params.d_direction = args.d_direction;
  params.patience = args.patience;
  params.batch_invariant = args.batch_invariant;
  params.thresholds = float_data("thresholds", args.thresholds, "[num_kv_heads, 2]",
                                 {params.num_kv_heads, 2}, args);
}

void check_output(const char* name, const Tensor& tensor, ScalarType dtype, const char* meaning,
                  std::initializer_list<int64_t> shape, const DecodeArguments& args) {
  check_dtype(kOp, name, tensor, dtype);
  check_same_device(kOp, name, tensor, args.query);
  check_shape(kOp, name, tensor, meaning, shape);
  ART_CHECK(tensor.is_contiguous(), kOp, ": ", name, " must be contiguous");
}

}  // namespace

DecodeParams check_arguments(const DecodeArguments& args) {
  DecodeParams params = {};
  set_caches(params, args);
  set_tables(params, args);
  set_logits(params, args);
  set_walk(params, args);
  set_criterion(params, args);
  return params;
}

bool is_checked(const DecodeArguments& args) {
  return args.checked ? *args.checked : checked_by_environment();
}

DecodeOutputs allocate_outputs(const DecodeArguments& args) {
  const int64_t batch = args.query.size(0), heads = args.query.size(1);
  const int64_t kv_heads = args.key_cache.size(2), value_dim = args.value_cache.size(3);
  const auto empty = [&](std::initializer_list<int64_t> shape, ScalarType dtype) {
    return torch::stable::new_empty(args.query, shape, dtype);
  };
  return {empty({batch, heads, value_dim}, args.query.scalar_type()),
          empty({batch, heads}, ScalarType::Float), empty({batch, kv_heads}, ScalarType::Int),
          empty({batch, kv_heads}, ScalarType::Int)};
}

void check_outputs(const DecodeArguments& args, const DecodeOutputs& outputs) {
  const int64_t batch = args.query.size(0), heads = args.query.size(1);
  const int64_t kv_heads = args.key_cache.size(2);
  check_output("out", outputs.out, args.query.scalar_type(), "[batch, num_q_heads, value_dim]",
               {batch, heads, args.value_cache.size(3)}, args);
  check_output("lse", outputs.lse, ScalarType::Float, "[batch, num_q_heads]", {batch, heads}, args);
  check_output("tokens_read", outputs.tokens_read, ScalarType::Int, "[batch, num_kv_heads]",
               {batch, kv_heads}, args);
  check_output("stop_block", outputs.stop_block, ScalarType::Int, "[batch, num_kv_heads]",
               {batch, kv_heads}, args);
}

void set_outputs(DecodeParams& params, const DecodeOutputs& outputs) {
  params.out = outputs.out.mutable_data_ptr();
  params.lse = outputs.lse.mutable_data_ptr<float>();
  params.tokens_read = outputs.tokens_read.mutable_data_ptr<int32_t>();
  params.stop_block = outputs.stop_block.mutable_data_ptr<int32_t>();
}

}  // namespace art
