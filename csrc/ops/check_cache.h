// Checks of what several operators take: queries, a paged key cache, its tables, and what shapes
// the logits. Each fills its part of DecodeParams; `op` starts the messages, and every tensor has
// to be on the device of `first`.
#pragma once

#include <initializer_list>
#include <optional>

#include <torch/csrc/stable/tensor.h>

#include "core/params.h"
#include "core/walk.h"

namespace art {

using torch::stable::Tensor;

struct LogitArguments {
  std::optional<double> scale;
  double softcap;
  std::optional<Tensor> attn_sinks;
  int64_t sliding_window;
  std::optional<Tensor> alibi_slopes;
  bool per_head_lens;
};

// The element types of queries, and those of caches, which on the CPU may also be int8.
DType check_element_type(const char* op, const char* name, const Tensor& tensor);
DType check_cache_type(const char* op, const char* name, const Tensor& cache);

void check_rank(const char* op, const char* name, const Tensor& tensor, int64_t rank,
                const char* meaning);
void check_row_dim(const char* op, const char* name, int64_t dim);
void check_int32(const char* op, const char* name, const Tensor& tensor, const Tensor& first);

// What all heads of a sequence share, or each has of its own: lengths, of shape [batch] or
// [batch, num_kv_heads], and tables, which have a row for each. Returns how long rows are, which is
// called `width` in messages.
void check_lens(const char* op, const char* name, const Tensor& lens, const DecodeParams& cache,
                const Tensor& first);
int64_t check_table(const char* op, const char* name, const Tensor& table, const char* width,
                    const DecodeParams& cache, const Tensor& first);

// Data of an optional contiguous tensor; null when absent.
const float* optional_floats(const char* op, const char* name, const std::optional<Tensor>& tensor,
                             const char* meaning, std::initializer_list<int64_t> shape,
                             const Tensor& first);
const int32_t* optional_ints(const char* op, const char* name, const std::optional<Tensor>& tensor,
                             const char* meaning, std::initializer_list<int64_t> shape,
                             const Tensor& first);

PagedCache paged_cache(const Tensor& cache);

// Of two caches with four dimensions.
void check_same_pages(const char* op, const Tensor& value_cache, const Tensor& key_cache);

// The scales of an int8 cache, which any other must not have.
PagedScales paged_scales(const char* op, const char* name, const std::optional<Tensor>& scale,
                         const char* cache_name, const Tensor& cache);

void set_query(DecodeParams& params, const char* op, const Tensor& query, const Tensor& key_cache);
void set_keys(DecodeParams& params, const char* op, const Tensor& key_cache,
              const std::optional<Tensor>& key_scale, const Tensor& first);

// After the keys, and with params.batch set.
void set_tables(DecodeParams& params, const char* op, const Tensor& block_table,
                const Tensor& seq_lens, const std::optional<Tensor>& seq_starts,
                const Tensor& first);

// The same without a check: for copies, where the host can read them, of tables that were checked.
void point_to_tables(DecodeParams& params, const Tensor& block_table, const Tensor& seq_lens);

// After the tables and the query.
void set_logits(DecodeParams& params, const char* op, const LogitArguments& args,
                const Tensor& first);

// Checks of the data, which the host must be able to read. The visible tokens of a head:
TokenRange check_length(const DecodeParams& params, const char* op, int64_t batch, int64_t head);
// The page ids of some of its tokens:
void check_pages(const DecodeParams& params, const char* op, int64_t batch, int64_t head,
                 TokenRange tokens);

}  // namespace art
