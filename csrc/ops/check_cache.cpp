#include "ops/check_cache.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/item.h"
#include "ops/check.h"

namespace art {

DType check_element_type(const char* op, const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  const bool known =
      dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
  ART_CHECK(known, op, ": dtype of ", name, " must be float32, float16 or bfloat16, got ",
            dtype_name(dtype));
  if (dtype == ScalarType::Float) return DType::kFloat32;
  return dtype == ScalarType::Half ? DType::kFloat16 : DType::kBFloat16;
}

DType check_cache_type(const char* op, const char* name, const Tensor& cache) {
  const ScalarType dtype = cache.scalar_type();
  if (dtype != ScalarType::Char) return check_element_type(op, name, cache);
  ART_CHECK(cache.is_cpu(), op, ": int8 caches run on the CPU, got a ", name,
            " on another device: use a cache in the dtype of the query there");
  return DType::kInt8;
}

void check_rank(const char* op, const char* name, const Tensor& tensor, int64_t rank,
                const char* meaning) {
  ART_CHECK(tensor.dim() == rank, op, ": ", name, " must have shape ", meaning, ", got ",
            shape_of(tensor));
}

void check_row_dim(const char* op, const char* name, int64_t dim) {
  ART_CHECK(dim != 576, op, ": ", name, " 576 is a latent (MLA) cache, which is not supported; ",
            name, " must be a multiple of 8 from 32 to 256");
  ART_CHECK(dim >= 32 && dim <= 256 && dim % 8 == 0, op, ": ", name,
            " must be a multiple of 8 from 32 to 256, got ", dim);
}

void check_int32(const char* op, const char* name, const Tensor& tensor, const Tensor& first) {
  check_dtype(op, name, tensor, ScalarType::Int);
  check_same_device(op, name, tensor, first);
}

void check_lens(const char* op, const char* name, const Tensor& lens, const DecodeParams& cache,
                const Tensor& first) {
  check_int32(op, name, lens, first);
  ART_CHECK(has_shape(lens, {cache.batch}) || has_shape(lens, {cache.batch, cache.num_kv_heads}),
            op, ": ", name, " must have shape [batch] or [batch, num_kv_heads] = ",
            text_of({cache.batch, cache.num_kv_heads}), ", got ", shape_of(lens));
}

int64_t check_table(const char* op, const char* name, const Tensor& table, const char* width,
                    const DecodeParams& cache, const Tensor& first) {
  check_int32(op, name, table, first);
  const int64_t entries = table.dim() == 0 ? 0 : table.size(table.dim() - 1);
  ART_CHECK(has_shape(table, {cache.batch, entries}) ||
                has_shape(table, {cache.batch, cache.num_kv_heads, entries}),
            op, ": ", name, " must have shape [batch, ", width, "] or [batch, num_kv_heads, ",
            width, "] = [", cache.batch, ", ", cache.num_kv_heads, ", *], got ", shape_of(table));
  ART_CHECK(entries <= 1 || table.stride(table.dim() - 1) == 1, op, ": the last dimension of ",
            name, " must be contiguous");
  return entries;
}

const float* optional_floats(const char* op, const char* name, const std::optional<Tensor>& tensor,
                             const char* meaning, std::initializer_list<int64_t> shape,
                             const Tensor& first) {
  if (!tensor) return nullptr;
  check_dtype(op, name, *tensor, ScalarType::Float);
  check_same_device(op, name, *tensor, first);
  check_shape(op, name, *tensor, meaning, shape);
  ART_CHECK(tensor->is_contiguous(), op, ": ", name, " must be contiguous");
  return tensor->const_data_ptr<float>();
}

const int32_t* optional_ints(const char* op, const char* name, const std::optional<Tensor>& tensor,
                             const char* meaning, std::initializer_list<int64_t> shape,
                             const Tensor& first) {
  if (!tensor) return nullptr;
  check_int32(op, name, *tensor, first);
  check_shape(op, name, *tensor, meaning, shape);
  ART_CHECK(tensor->is_contiguous(), op, ": ", name, " must be contiguous");
  return tensor->const_data_ptr<int32_t>();
}

PagedCache paged_cache(const Tensor& cache) {
  return {cache.const_data_ptr(), cache.stride(0), cache.stride(1), cache.stride(2),
          cache.stride(3)};
}

void check_same_pages(const char* op, const Tensor& value_cache, const Tensor& key_cache) {
  const int64_t pages = key_cache.size(0), page_size = key_cache.size(1);
  ART_CHECK(has_shape(value_cache, {pages, page_size, key_cache.size(2), value_cache.size(3)}), op,
            ": value_cache must have the pages and heads of key_cache, ", shape_of(key_cache),
            ", got ", shape_of(value_cache));
}

PagedScales paged_scales(const char* op, const char* name, const std::optional<Tensor>& scale,
                         const char* cache_name, const Tensor& cache) {
  const bool is_int8 = cache.scalar_type() == ScalarType::Char;
  ART_CHECK(scale || !is_int8, op, ": an int8 ", cache_name, " needs its ", name,
            " [num_pages, page_size, num_kv_heads], got None");
  ART_CHECK(!scale || is_int8, op, ": ", name, " must only be given with an int8 ", cache_name,
            ", got one of ", dtype_name(cache.scalar_type()));
  if (!scale) return {};
  check_dtype(op, name, *scale, ScalarType::Float);
  check_same_device(op, name, *scale, cache);
  check_shape(op, name, *scale, "[num_pages, page_size, num_kv_heads]",
              {cache.size(0), cache.size(1), cache.size(2)});
  return {scale->const_data_ptr<float>(), scale->stride(0), scale->stride(1), scale->stride(2)};
}

void set_query(DecodeParams& params, const char* op, const Tensor& query, const Tensor& key_cache) {
  check_rank(op, "query", query, 3, "[batch, num_q_heads, head_dim]");
  check_rank(op, "key_cache", key_cache, 4, "[num_pages, page_size, num_kv_heads, head_dim]");
  params.query_dtype = check_element_type(op, "query", query);
  if (key_cache.scalar_type() != ScalarType::Char) {  // which goes with any query
    check_same_dtype(op, "key_cache", key_cache, "query", query);
  }
  const int64_t heads = query.size(1), kv_heads = key_cache.size(2);
  ART_CHECK(kv_heads >= 1 && heads >= 1 && heads % kv_heads == 0, op,
            ": num_q_heads must be a positive multiple of num_kv_heads, got ", heads, " and ",
            kv_heads);
  check_row_dim(op, "head_dim", query.size(2));
  ART_CHECK(key_cache.size(3) == query.size(2), op, ": key_cache must have head_dim ",
            query.size(2), " as the query has, got ", key_cache.size(3));
  ART_CHECK(query.stride(2) == 1, op, ": the last dimension of query must be contiguous");
  params.batch = query.size(0);
  params.num_q_heads = heads;
  params.group_size = heads / kv_heads;
  params.query = query.const_data_ptr();
  params.query_batch_stride = query.stride(0);
  params.query_head_stride = query.stride(1);
}

void set_keys(DecodeParams& params, const char* op, const Tensor& key,
              const std::optional<Tensor>& key_scale, const Tensor& first) {
  check_rank(op, "key_cache", key, 4, "[num_pages, page_size, num_kv_heads, head_dim]");
  check_same_device(op, "key_cache", key, first);
  params.dtype = check_cache_type(op, "key_cache", key);
  check_row_dim(op, "head_dim", key.size(3));
  ART_CHECK(key.size(2) >= 1, op, ": num_kv_heads must be at least 1, got ", key.size(2));
  ART_CHECK(key.size(1) >= 1, op, ": page_size must be at least 1, got ", key.size(1));
  ART_CHECK(key.stride(3) == 1 || key.stride(1) == 1, op,
            ": head_dim or the token dimension of key_cache must be contiguous, got strides ",
            key.stride(3), " and ", key.stride(1));
  params.num_kv_heads = key.size(2);
  params.head_dim = key.size(3);
  params.page_size = key.size(1);
  params.num_pages = key.size(0);
  params.key = paged_cache(key);
  params.key_scale = paged_scales(op, "key_scale", key_scale, "key_cache", key);
}

void point_to_tables(DecodeParams& params, const Tensor& block_table, const Tensor& seq_lens) {
  params.block_table = block_table.const_data_ptr<int32_t>();
  params.block_table_batch_stride = block_table.stride(0);
  params.block_table_head_stride = block_table.dim() == 3 ? block_table.stride(1) : 0;
  params.seq_lens = seq_lens.const_data_ptr<int32_t>();
  params.seq_lens_batch_stride = seq_lens.stride(0);
  params.seq_lens_head_stride = seq_lens.dim() == 2 ? seq_lens.stride(1) : 0;
}

void set_tables(DecodeParams& params, const char* op, const Tensor& table, const Tensor& lens,
                const std::optional<Tensor>& seq_starts, const Tensor& first) {
  const int64_t max_pages = check_table(op, "block_table", table, "max_pages", params, first);
  check_lens(op, "seq_lens", lens, params, first);
  ART_CHECK(max_pages * params.page_size <= std::numeric_limits<int32_t>::max(), op,
            ": block_table must address fewer than 2^31 tokens, got ", max_pages, " pages of ",
            params.page_size);
  params.max_pages = max_pages;
  point_to_tables(params, table, lens);
  params.seq_starts = optional_ints(op, "seq_starts", seq_starts, "[batch]", {params.batch}, first);
}

void set_logits(DecodeParams& params, const char* op, const LogitArguments& args,
                const Tensor& first) {
  const double scale = args.scale ? *args.scale : 1.0 / std::sqrt(double(params.head_dim));
  ART_CHECK(std::isfinite(scale), op, ": scale must be finite, got ", scale);
  ART_CHECK(std::isfinite(args.softcap) && args.softcap >= 0, op,
            ": softcap must be positive, or 0 for none, got ", args.softcap);
  ART_CHECK(args.sliding_window >= 0, op, ": sliding_window must be positive, or 0 for none, got ",
            args.sliding_window);
  ART_CHECK(!args.per_head_lens || (args.sliding_window == 0 && !args.alibi_slopes), op,
            ": sliding_window and alibi_slopes need positions, which seq_lens per head ",
            "(an evicted cache) does not tell");
  params.scale = scale;
  params.softcap = args.softcap;
  params.sliding_window = std::min<int64_t>(args.sliding_window, INT32_MAX);
  const int64_t heads = params.num_q_heads;
  params.attn_sinks =
      optional_floats(op, "attn_sinks", args.attn_sinks, "[num_q_heads]", {heads}, first);
  params.alibi_slopes =
      optional_floats(op, "alibi_slopes", args.alibi_slopes, "[num_q_heads]", {heads}, first);
}

TokenRange check_length(const DecodeParams& params, const char* op, int64_t batch, int64_t head) {
  const int64_t capacity = int64_t{params.max_pages} * params.page_size;
  const int32_t len =
      params.seq_lens[batch * params.seq_lens_batch_stride + head * params.seq_lens_head_stride];
  ART_CHECK(len >= 0 && len <= capacity, op, ": seq_lens must be from 0 to ", capacity, " (",
            params.max_pages, " pages of ", params.page_size, "), got ", len, " for ",
            text_of_item(batch, head, params.seq_lens_head_stride));
  const int32_t start = params.seq_starts == nullptr ? 0 : params.seq_starts[batch];
  ART_CHECK(start >= 0, op, ": seq_starts must not be negative, got ", start, " for sequence ",
            batch);
  return visible_tokens(len, start, params.sliding_window);
}

void check_pages(const DecodeParams& params, const char* op, int64_t batch, int64_t head,
                 TokenRange tokens) {
  if (tokens.size() == 0) return;
  const int32_t* table = block_table_of(params, batch, head);
  const int32_t last = (tokens.end - 1) / params.page_size;
  for (int32_t i = tokens.begin / params.page_size; i <= last; ++i) {
    ART_CHECK(table[i] >= 0 && table[i] < params.num_pages, op,
              ": page ids in block_table must be from 0 to ", params.num_pages - 1, ", got ",
              table[i], " at page ", i, " of ",
              text_of_item(batch, head, params.block_table_head_stride));
  }
}

}  // namespace art
