#include "ops/decode_attention.h"

#include <algorithm>

#include "core/termination.h"
#include "ops/allocate.h"
#include "ops/check.h"
#include "ops/check_cache.h"

namespace art {
namespace {

constexpr char kOp[] = "decode_attention";

// Bits of the argument `criterion`.
constexpr int64_t kStability = 1, kResidualMass = 2, kAllAgree = 8;

void set_values(DecodeParams& params, const DecodeArguments& args) {
  const Tensor &key = args.key_cache, &value = args.value_cache;
  check_rank(kOp, "value_cache", value, 4, "[num_pages, page_size, num_kv_heads, value_dim]");
  check_same_device(kOp, "value_cache", value, args.query);
  check_same_dtype(kOp, "value_cache", value, "key_cache", key);
  check_row_dim(kOp, "value_dim", value.size(3));
  check_same_pages(kOp, value, key);
  ART_CHECK(value.stride(3) == 1, kOp, ": the last dimension of value_cache must be contiguous");
  params.value_dim = value.size(3);
  params.value = paged_cache(value);
  params.value_scale = paged_scales(kOp, "value_scale", args.value_scale, "value_cache", value);
}

WalkOrder parse_walk_order(const std::string& name) {
  if (name == "sink_recent") return WalkOrder::kSinkRecent;
  if (name == "recent_first") return WalkOrder::kRecentFirst;
  if (name == "oldest_first") return WalkOrder::kOldestFirst;
  fail_check(kOp,
             ": walk_order must be 'oldest_first', 'recent_first' or 'sink_recent', or 'guided' ",
             "with the explicit walk that guided_walk makes from key codes, got '", name, "'");
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
    check_rank(kOp, "walk", *args.walk, 3, "[batch, num_kv_heads, max_units]");
    params.max_units = args.walk->size(2);
    params.walk_is_visible = args.walk_order == "guided";
  }
  params.walk = optional_ints(kOp, "walk", args.walk, "[batch, num_kv_heads, max_units]",
                              {batch, heads, params.max_units}, args.query);
  params.walk_lens = optional_ints(kOp, "walk_lens", args.walk_lens, "[batch, num_kv_heads]",
                                   {batch, heads}, args.query);
  params.pinned_units = optional_ints(kOp, "num_pinned_per_head", args.num_pinned_per_head,
                                      "[batch, num_kv_heads]", {batch, heads}, args.query);
  const int64_t sink_units = (kSinkTokens + unit - 1) / unit;
  const int64_t pinned_by_default =
      params.walk_order == WalkOrder::kSinkRecent ? 2 * sink_units : 0;
  params.num_pinned = std::min<int64_t>(args.num_pinned.value_or(pinned_by_default), INT32_MAX);
}

// After the walk.
void set_residual(DecodeParams& params, const DecodeArguments& args) {
  params.use_residual = args.criterion & kResidualMass;
  ART_CHECK(args.residual_mass >= 0 && args.residual_mass < 1, kOp,
            ": residual_mass must be at least 0 and less than 1, got ", args.residual_mass);
  // Whoever estimates the rest wants it used.
  ART_CHECK(params.use_residual || !args.log_rest, kOp,
            ": log_rest must not be given without the criterion ResidualMass, got criterion ",
            args.criterion);
  if (!params.use_residual) return;
  ART_CHECK(args.walk && args.log_rest, kOp,
            ": the criterion ResidualMass needs an explicit walk and its log_rest, got no ",
            args.walk ? "log_rest" : "walk");
  params.residual_limit = residual_limit(args.residual_mass);
  params.log_rest =
      optional_floats(kOp, "log_rest", args.log_rest, "[batch, num_q_heads, max_units]",
                      {params.batch, params.num_q_heads, params.max_units}, args.query);
}

void set_criterion(DecodeParams& params, const DecodeArguments& args) {
  constexpr int64_t kRules = kStability | kResidualMass;
  const int64_t criterion = args.criterion;
  ART_CHECK(criterion == (criterion & kRules) || criterion == (kRules | kAllAgree), kOp,
            ": criterion must be 0 (none), 1 (Stability), 2 (ResidualMass), 3 (either of them) or "
            "11 (both), got ",
            criterion);
  ART_CHECK(args.patience >= 1 && args.patience <= INT32_MAX, kOp,
            ": patience must be at least 1, got ", args.patience);
  ART_CHECK(args.d_scale >= 0, kOp, ": d_scale must not be negative or NaN, got ", args.d_scale);
  ART_CHECK(args.d_direction >= 0, kOp, ": d_direction must not be negative or NaN, got ",
            args.d_direction);
  params.use_stability = criterion & kStability;
  params.all_agree = criterion & kAllAgree;
  params.d_scale = args.d_scale;
  params.d_direction = args.d_direction;
  params.patience = args.patience;
  params.batch_invariant = args.batch_invariant;
  params.thresholds = optional_floats(kOp, "thresholds", args.thresholds, "[num_kv_heads, 2]",
                                      {params.num_kv_heads, 2}, args.query);
  set_residual(params, args);
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
  set_query(params, kOp, args.query, args.key_cache);
  set_keys(params, kOp, args.key_cache, args.key_scale, args.query);
  set_values(params, args);
  set_tables(params, kOp, args.block_table, args.seq_lens, args.seq_starts, args.query);
  set_logits(params, kOp,
             {args.scale, args.softcap, args.attn_sinks, args.sliding_window, args.alibi_slopes,
              args.seq_lens.dim() == 2},
             args.query);
  set_walk(params, args);
  set_criterion(params, args);
  return params;
}

DecodeOutputs allocate_outputs(const DecodeArguments& args) {
  const int64_t batch = args.query.size(0), heads = args.query.size(1);
  const int64_t kv_heads = args.key_cache.size(2), value_dim = args.value_cache.size(3);
  const auto empty = [&](std::initializer_list<int64_t> shape, ScalarType dtype) {
    return new_empty(args.query, shape, dtype);
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
