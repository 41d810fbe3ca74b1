// encode_keys and guided_walk: from the operators' arguments to parameters. Shared by all devices.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

#include "core/params.h"

namespace art {

using torch::stable::Tensor;

// In the order of the schema.
struct EncodeArguments {
  Tensor key_cache;
  Tensor block_table;
  Tensor seq_lens;
  Tensor key_codes;
  Tensor code_table;
  std::optional<Tensor> coded_lens;
  std::optional<bool> checked;
  std::optional<Tensor> key_scale;
};

struct GuidedArguments {
  Tensor query;
  Tensor key_cache;
  Tensor block_table;
  Tensor seq_lens;
  Tensor key_codes;
  Tensor code_table;
  std::optional<double> scale;
  double softcap;
  std::optional<Tensor> attn_sinks;
  int64_t sliding_window;
  std::optional<Tensor> alibi_slopes;
  std::optional<Tensor> seq_starts;
  std::optional<bool> checked;
  bool rest;
  std::optional<Tensor> key_scale;
};

struct GuidedOutputs {
  Tensor walk;        // [batch, num_kv_heads, max_units] int32
  Tensor walk_lens;   // [batch, num_kv_heads] int32
  Tensor num_pinned;  // [batch, num_kv_heads] int32
  Tensor log_mass;    // [batch, num_kv_heads, max_units] float32
  Tensor log_rest;    // [batch, num_q_heads, max_units] float32, or max_units 0 where not asked for
};

// Check everything that shapes, dtypes and numbers tell.
EncodeParams check_encode(const EncodeArguments& args);
GuidedParams check_guided(const GuidedArguments& args);

// The parts of these that only point to a tensor: also for copies that the host can read.
void point_to_table(CodePool& codes, const Tensor& code_table);
void point_to_coded_lens(EncodeParams& params, const Tensor& coded_lens);

GuidedOutputs allocate_outputs(const GuidedArguments& args, GuidedParams& params);

// Check what only the data tell: lengths and page ids. The host must be able to read them.
void check_values(const EncodeParams& params);
void check_values(const GuidedParams& params);

// Run the kernels of one device.
using EncodeLauncher = void (*)(const EncodeArguments& args, const EncodeParams& params);
// num_splits: thread blocks that order the units of one (sequence, KV head); 0 leaves it to the
// schedule.
using GuidedLauncher = void (*)(const GuidedArguments& args, const GuidedParams& params,
                                int64_t num_splits);

template <EncodeLauncher launch>
void encode_keys(Tensor key_cache, Tensor block_table, Tensor seq_lens, Tensor key_codes,
                 Tensor code_table, std::optional<Tensor> coded_lens, std::optional<bool> checked,
                 std::optional<Tensor> key_scale) {
  const EncodeArguments args = {key_cache,  block_table, seq_lens, key_codes,
                                code_table, coded_lens,  checked,  key_scale};
  launch(args, check_encode(args));
}

using GuidedTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <GuidedLauncher launch>
GuidedTensors guided_walk_split(Tensor query, Tensor key_cache, Tensor block_table, Tensor seq_lens,
                                Tensor key_codes, Tensor code_table, std::optional<double> scale,
                                double softcap, std::optional<Tensor> attn_sinks,
                                int64_t sliding_window, std::optional<Tensor> alibi_slopes,
                                std::optional<Tensor> seq_starts, std::optional<bool> checked,
                                bool rest, std::optional<Tensor> key_scale, int64_t num_splits) {
  const GuidedArguments args = {query,        key_cache,  block_table, seq_lens,   key_codes,
                                code_table,   scale,      softcap,     attn_sinks, sliding_window,
                                alibi_slopes, seq_starts, checked,     rest,       key_scale};
  GuidedParams params = check_guided(args);
  const GuidedOutputs outputs = allocate_outputs(args, params);
  launch(args, params, num_splits);
  return {outputs.walk, outputs.walk_lens, outputs.num_pinned, outputs.log_mass, outputs.log_rest};
}

template <GuidedLauncher launch>
GuidedTensors guided_walk(Tensor query, Tensor key_cache, Tensor block_table, Tensor seq_lens,
                          Tensor key_codes, Tensor code_table, std::optional<double> scale,
                          double softcap, std::optional<Tensor> attn_sinks, int64_t sliding_window,
                          std::optional<Tensor> alibi_slopes, std::optional<Tensor> seq_starts,
                          std::optional<bool> checked, bool rest, std::optional<Tensor> key_scale) {
  return guided_walk_split<launch>(query, key_cache, block_table, seq_lens, key_codes, code_table,
                                   scale, softcap, attn_sinks, sliding_window, alibi_slopes,
                                   seq_starts, checked, rest, key_scale, 0);
}

}  // namespace art
