// The operator's arguments, as the schema gives them, and the way from them to DecodeParams.
// Shared by all devices.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

#include "core/params.h"

namespace art {

using torch::stable::Tensor;

// In the order of the schema.
struct DecodeArguments {
  Tensor query;
  Tensor key_cache;
  Tensor value_cache;
  Tensor block_table;
  Tensor seq_lens;
  std::optional<double> scale;
  int64_t criterion;
  double d_scale;
  double d_direction;
  int64_t patience;
  std::optional<Tensor> thresholds;
  std::string walk_order;
  std::optional<Tensor> walk;
  std::optional<Tensor> walk_lens;
  std::optional<int64_t> num_pinned;
  std::optional<Tensor> num_pinned_per_head;
  int64_t block_size;
  int64_t unit_size;
  double softcap;
  std::optional<Tensor> attn_sinks;
  int64_t sliding_window;
  std::optional<Tensor> alibi_slopes;
  std::optional<Tensor> seq_starts;
  bool batch_invariant;
  std::optional<bool> checked;
  std::optional<Tensor> log_rest;
  double residual_mass;
  std::optional<Tensor> key_scale;
  std::optional<Tensor> value_scale;
};

struct DecodeOutputs {
  Tensor out;          // [batch, num_q_heads, value_dim], dtype of the query
  Tensor lse;          // [batch, num_q_heads] float32
  Tensor tokens_read;  // [batch, num_kv_heads] int32
  Tensor stop_block;   // [batch, num_kv_heads] int32
};

// Checks everything that shapes, dtypes and numbers tell. Throws before any work is done.
DecodeParams check_arguments(const DecodeArguments& args);

DecodeOutputs allocate_outputs(const DecodeArguments& args);
void check_outputs(const DecodeArguments& args, const DecodeOutputs& outputs);
void set_outputs(DecodeParams& params, const DecodeOutputs& outputs);

// Checks what only the data tell: lengths, page ids, walk entries, thresholds. All pointers of
// `params` must be readable by the host. `duplicates` also refuses units listed twice.
void check_values(const DecodeParams& params, bool duplicates);

// Runs the kernels of one device. `num_splits` 0 leaves the schedule to them.
using DecodeLauncher = void (*)(const DecodeArguments& args, const DecodeParams& params,
                                int64_t num_splits);

// The three operators over the same argument list, which is written out only once.
template <DecodeLauncher launch, class... Args>
struct DecodeOperators {
  using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

  static Results decode_attention(Args... args) { return run({std::move(args)...}, 0); }

  static Results decode_attention_split(Args... args, int64_t num_splits) {
    return run({std::move(args)...}, num_splits);
  }

  static void decode_attention_out(Args... args, Tensor out, Tensor lse, Tensor tokens_read,
                                   Tensor stop_block) {
    const DecodeArguments arguments{std::move(args)...};
    const DecodeOutputs outputs{out, lse, tokens_read, stop_block};
    DecodeParams params = check_arguments(arguments);
    check_outputs(arguments, outputs);
    set_outputs(params, outputs);
    launch(arguments, params, 0);
  }

 private:
  static Results run(const DecodeArguments& args, int64_t num_splits) {
    DecodeParams params = check_arguments(args);
    const DecodeOutputs outputs = allocate_outputs(args);
    set_outputs(params, outputs);
    launch(args, params, num_splits);
    return {outputs.out, outputs.lse, outputs.tokens_read, outputs.stop_block};
  }
};

template <DecodeLauncher launch>
using Decode =
    DecodeOperators<launch, Tensor, Tensor, Tensor, Tensor, Tensor, std::optional<double>, int64_t,
                    double, double, int64_t, std::optional<Tensor>, std::string,
                    std::optional<Tensor>, std::optional<Tensor>, std::optional<int64_t>,
                    std::optional<Tensor>, int64_t, int64_t, double, std::optional<Tensor>, int64_t,
                    std::optional<Tensor>, std::optional<Tensor>, bool, std::optional<bool>,
                    std::optional<Tensor>, double, std::optional<Tensor>, std::optional<Tensor>>;

}  // namespace art
