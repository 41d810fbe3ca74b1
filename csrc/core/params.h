// What a decode-attention kernel is given: raw pointers, strides and sizes, never a Tensor.
#pragma once

#include <cstdint>

namespace art {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kInt8 };

enum class WalkOrder : int32_t { kOldestFirst, kRecentFirst, kSinkRecent, kExplicit };

// A KV cache in pages. Strides are in elements; page ids times strides need 64 bits.
struct PagedCache {
  const void* data;  // [num_pages, page_size, num_kv_heads, dim]
  int64_t page_stride;
  int64_t token_stride;
  int64_t head_stride;
  int64_t dim_stride;  // 1, or for keys anything when token_stride is 1
};

// What the rows of an int8 cache are multiplied by, see core/int8_rows.h. Strides are in elements.
struct PagedScales {
  const float* data;  // [num_pages, page_size, num_kv_heads], or null: the cache is not int8
  int64_t page_stride;
  int64_t token_stride;
  int64_t head_stride;

  const float* at(int64_t page, int64_t offset, int32_t head) const {
    return data + page * page_stride + offset * token_stride + head * head_stride;
  }
};

struct DecodeParams {
  DType dtype;        // of keys and values
  DType query_dtype;  // of query and out: the same, except for int8 keys and values

  int32_t batch;
  int32_t num_q_heads;
  int32_t num_kv_heads;
  int32_t group_size;  // num_q_heads / num_kv_heads
  int32_t head_dim;
  int32_t value_dim;
  int32_t page_size;
  int32_t max_pages;
  int64_t num_pages;

  const void* query;  // [batch, num_q_heads, head_dim]
  int64_t query_batch_stride;
  int64_t query_head_stride;
  PagedCache key;
  PagedCache value;
  PagedScales key_scale;
  PagedScales value_scale;

  const int32_t* block_table;  // [batch, max_pages] or [batch, num_kv_heads, max_pages]
  int64_t block_table_batch_stride;
  int64_t block_table_head_stride;  // 0: one table for all heads
  const int32_t* seq_lens;          // [batch] or [batch, num_kv_heads]
  int64_t seq_lens_batch_stride;
  int64_t seq_lens_head_stride;  // 0: one length for all heads
  const int32_t* seq_starts;     // [batch], or null: every sequence starts at token 0

  float scale;
  float softcap;              // 0: off
  int32_t sliding_window;     // 0: off
  const float* attn_sinks;    // [num_q_heads], or null
  const float* alibi_slopes;  // [num_q_heads], or null

  WalkOrder walk_order;
  const int32_t* walk;          // [batch, num_kv_heads, max_units], for kExplicit
  const int32_t* walk_lens;     // [batch, num_kv_heads], for kExplicit
  int32_t max_units;            // row length of walk
  bool walk_is_visible;         // all units of walk have a visible token: none has to be dropped
  const int32_t* pinned_units;  // [batch, num_kv_heads], or null: num_pinned for all
  int32_t num_pinned;
  int32_t unit_size;   // tokens
  int32_t block_size;  // tokens, a multiple of unit_size

  bool use_stability;
  float d_scale;
  float d_direction;
  const float* thresholds;  // [num_kv_heads, 2]: d_scale, d_direction; null: the two floats above
  int32_t patience;
  bool use_residual;
  float residual_limit;   // see core/termination.h
  const float* log_rest;  // [batch, num_q_heads, max_units]: of the mass after each entry of walk
  bool all_agree;         // stability and residual mass must; false: one is enough
  bool batch_invariant;   // the same bits, whatever the batch

  void* out;             // [batch, num_q_heads, value_dim], contiguous
  float* lse;            // [batch, num_q_heads]
  int32_t* tokens_read;  // [batch, num_kv_heads]
  int32_t* stop_block;   // [batch, num_kv_heads]
};

// A pool of key codes. Strides are in bytes.
struct CodePool {
  uint8_t* records;  // [num_code_pages, num_kv_heads, record_bytes]
  int64_t num_pages;
  int64_t page_stride;
  int64_t head_stride;
  const int32_t* table;  // [batch, max_groups] or [batch, num_kv_heads, max_groups]
  int64_t table_batch_stride;
  int64_t table_head_stride;  // 0: one table for all heads
};

// Complete groups of keys that become codes.
struct EncodeParams {
  DecodeParams cache;  // its keys, tables and lengths
  CodePool codes;
  const int32_t* coded_lens;  // [batch] or [batch, num_kv_heads]; null: nothing is coded yet
  int64_t coded_lens_batch_stride;
  int64_t coded_lens_head_stride;  // 0: one length for all heads
};

// Units of a cache in the order of their estimated softmax mass.
struct GuidedParams {
  DecodeParams attention;  // its query, keys, tables, lengths and logits; unit_size is kUnitTokens
  CodePool codes;
  int32_t max_units;  // row length of walk, log_mass and log_rest

  int32_t* walk;        // [batch, num_kv_heads, max_units]
  int32_t* walk_lens;   // [batch, num_kv_heads]
  int32_t* num_pinned;  // [batch, num_kv_heads]
  float* log_mass;      // [batch, num_kv_heads, max_units]
  float* log_rest;      // [batch, num_q_heads, max_units], or null
};

// New tokens of one tensor, keys or values, and the cache that takes them.
struct AppendParams {
  int64_t num_tokens;
  int64_t num_kv_heads;
  int64_t dim;
  int64_t page_size;
  DType source_dtype;
  int64_t element_size;  // bytes of the source; strides are in elements

  const void* source;  // [num_tokens, num_kv_heads, dim]
  int64_t source_token_stride;
  int64_t source_head_stride;
  int64_t source_dim_stride;

  void* cache;  // [num_pages, page_size, num_kv_heads, dim]
  int64_t page_stride;
  int64_t token_stride;
  int64_t head_stride;
  int64_t dim_stride;

  // Of an int8 cache; null: the cache takes the source as it is.
  float* scale;  // [num_pages, page_size, num_kv_heads]
  int64_t scale_page_stride;
  int64_t scale_token_stride;
  int64_t scale_head_stride;

  const int64_t* slots;  // [num_tokens] or [num_tokens, num_kv_heads]; -1: skip
  int64_t slots_token_stride;
  int64_t slots_head_stride;  // 0: one slot for all heads
};

}  // namespace art
