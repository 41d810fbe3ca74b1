#include "exact.h"

#include <algorithm>
#include <cmath>

#include "problem.h"

namespace checks {
namespace {

struct Block {
  std::vector<int32_t> tokens;  // in the order of the walk
  int32_t last_entry = 0;       // of the walk, among those of the block
};

std::vector<int32_t> units_in_order(const DecodeParams& params, int64_t item, Visible visible) {
  if (params.walk_order == WalkOrder::kExplicit) {
    const int32_t* units = params.walk + item * params.max_units;
    return {units, units + params.walk_lens[item]};
  }
  std::vector<int32_t> units;
  for (int32_t unit = 0; unit * params.unit_size < visible.end; ++unit) {
    if ((unit + 1) * params.unit_size > visible.begin) units.push_back(unit);
  }
  if (visible.begin >= visible.end) units.clear();
  const size_t sink = (64 + params.unit_size - 1) / params.unit_size;
  const size_t kept = params.walk_order == WalkOrder::kSinkRecent ? sink : 0;
  if (params.walk_order != WalkOrder::kOldestFirst && kept < units.size()) {
    std::reverse(units.begin() + kept, units.end());
  }
  return units;
}

// Block 0 is the pinned units, or the first block where there are none.
std::vector<Block> blocks_of(const DecodeParams& params, int64_t item, Visible visible) {
  const std::vector<int32_t> units = units_in_order(params, item, visible);
  const int32_t pinned =
      params.pinned_units == nullptr ? params.num_pinned : params.pinned_units[item];
  const int32_t units_per_block = params.block_size / params.unit_size;
  std::vector<Block> blocks;
  int32_t in_block = units_per_block;  // the last block is full
  for (size_t i = 0; i < units.size(); ++i) {
    std::vector<int32_t> tokens;
    for (int32_t token = units[i] * params.unit_size;
         token < (units[i] + 1) * params.unit_size && token < visible.end; ++token) {
      if (token >= visible.begin) tokens.push_back(token);
    }
    if (tokens.empty()) continue;
    const bool is_pinned = static_cast<int32_t>(i) < pinned;
    if (is_pinned ? blocks.empty() : in_block == units_per_block) {
      blocks.emplace_back();
      in_block = 0;
    }
    // Whatever follows the pinned units begins a block.
    in_block = is_pinned ? units_per_block : in_block + 1;
    Block& block = blocks.back();
    block.tokens.insert(block.tokens.end(), tokens.begin(), tokens.end());
    block.last_entry = static_cast<int32_t>(i);
  }
  return blocks;
}

// The softmax of one query head over the tokens read so far.
struct Head {
  double max = -INFINITY;
  double sum = 0.0;
  std::vector<double> values;

  void add(double logit, const std::vector<double>& value) {
    const double higher = std::max(max, logit);
    const double before = max == -INFINITY ? 0.0 : std::exp(max - higher);
    const double weight = std::exp(logit - higher);
    sum = sum * before + weight;
    for (size_t d = 0; d < values.size(); ++d) values[d] = values[d] * before + weight * value[d];
    max = higher;
  }

  std::vector<double> output(const float* sink) const {
    const double total = sum + (sink == nullptr ? 0.0 : std::exp(*sink - max));
    std::vector<double> out(values.size());
    for (size_t d = 0; d < out.size(); ++d) out[d] = sum == 0.0 ? 0.0 : values[d] / total;
    return out;
  }
};

// The rules on when to stop, for one (sequence, KV head).
class Rules {
 public:
  Rules(const DecodeParams& params, int32_t batch, int32_t kv_head, double& nearest)
      : params_(params), batch_(batch), kv_head_(kv_head), nearest_(nearest) {
    const float* own = params.thresholds == nullptr ? nullptr : params.thresholds + 2 * kv_head;
    d_scale_ = own == nullptr ? params.d_scale : own[0];
    d_direction_ = own == nullptr ? params.d_direction : own[1];
  }

  // Whether reading stops after a block.
  bool stops(bool is_first, int32_t last_entry, const std::vector<std::vector<double>>& before,
             const std::vector<std::vector<double>>& after, const std::vector<Head>& heads) {
    bool stable = params_.use_stability && !is_first;
    bool covered = params_.use_residual;
    for (int32_t g = 0; g < params_.group_size; ++g) {
      if (params_.use_stability && !is_first) stable &= is_stable(before[g], after[g]);
      if (params_.use_residual) covered &= is_covered(g, last_entry, heads[g]);
    }
    stable_blocks_ = stable ? stable_blocks_ + 1 : 0;
    const bool settled = stable && stable_blocks_ >= params_.patience;
    return params_.all_agree ? settled && covered : settled || covered;
  }

 private:
  bool is_stable(const std::vector<double>& before, const std::vector<double>& after) {
    double aa = 0.0, bb = 0.0, ab = 0.0;
    for (size_t d = 0; d < before.size(); ++d) {
      aa += before[d] * before[d];
      bb += after[d] * after[d];
      ab += before[d] * after[d];
    }
    const double scale = std::abs(std::sqrt(bb) - std::sqrt(aa)) / std::sqrt(aa);
    const double direction = 1.0 - ab / std::sqrt(aa * bb);
    note(scale / d_scale_ - 1.0);
    note(direction / d_direction_ - 1.0);
    return scale <= d_scale_ && direction <= d_direction_;
  }

  bool is_covered(int32_t g, int32_t last_entry, const Head& head) {
    const int32_t q_head = kv_head_ * params_.group_size + g;
    const int64_t row = (int64_t{batch_} * params_.num_q_heads + q_head) * params_.max_units;
    const double sink = params_.attn_sinks == nullptr ? -INFINITY : params_.attn_sinks[q_head];
    const double read = log_add(head.max + std::log(head.sum), sink);
    const double above = params_.log_rest[row + last_entry] - read - params_.residual_limit;
    note(above);
    return above <= 0.0;
  }

  void note(double distance) { nearest_ = std::min(nearest_, std::abs(distance)); }

  const DecodeParams& params_;
  int32_t batch_, kv_head_;
  double& nearest_;
  double d_scale_, d_direction_;
  int32_t stable_blocks_ = 0;
};

// Reads one token for all query heads of a KV head.
void read_token(const DecodeParams& params, int32_t batch, int32_t kv_head, int32_t token,
                std::vector<Head>& heads, Exact& exact) {
  std::vector<double> value(params.value_dim);
  double largest = 0.0;
  for (int32_t d = 0; d < params.value_dim; ++d) {
    value[d] = read(params, params.value, params.value_scale, batch, kv_head, token, d);
    largest = std::max(largest, std::abs(value[d]));
  }
  for (int32_t g = 0; g < params.group_size; ++g) {
    const int32_t head = kv_head * params.group_size + g;
    const int64_t row = int64_t{batch} * params.num_q_heads + head;
    const Logit logit = plain_logit(params, batch, head, token);
    heads[g].add(adjusted(params, batch, head, token, logit.value), value);
    exact.magnitude[row] = std::max(exact.magnitude[row], logit.magnitude);
    exact.largest_value[row] = std::max(exact.largest_value[row], largest);
  }
}

void attend(const DecodeParams& params, int32_t batch, int32_t kv_head, Exact& exact) {
  const int64_t item = int64_t{batch} * params.num_kv_heads + kv_head;
  const int32_t group = params.group_size;
  const std::vector<Block> blocks = blocks_of(params, item, visible_of(params, batch));
  std::vector<Head> heads(group, Head{.values = std::vector<double>(params.value_dim)});
  std::vector<std::vector<double>> before(group), after(group, heads[0].values);
  Rules rules(params, batch, kv_head, exact.nearest);
  exact.stop_block[item] = -1;
  for (size_t j = 0; j < blocks.size() && exact.stop_block[item] < 0; ++j) {
    for (const int32_t token : blocks[j].tokens) {
      read_token(params, batch, kv_head, token, heads, exact);
    }
    exact.tokens_read[item] += static_cast<int32_t>(blocks[j].tokens.size());
    before = after;
    for (int32_t g = 0; g < group; ++g) {
      const int32_t head = kv_head * group + g;
      after[g] = heads[g].output(params.attn_sinks == nullptr ? nullptr : params.attn_sinks + head);
    }
    if (rules.stops(j == 0, blocks[j].last_entry, before, after, heads)) {
      exact.stop_block[item] = static_cast<int32_t>(j);
    }
  }
  for (int32_t g = 0; g < group; ++g) {
    const int64_t row = int64_t{batch} * params.num_q_heads + kv_head * group + g;
    exact.lse[row] = heads[g].max + std::log(heads[g].sum);
    std::copy(after[g].begin(), after[g].end(), exact.out.begin() + row * params.value_dim);
  }
}

}  // namespace

double log_add(double a, double b) {
  const double max = std::max(a, b), min = std::min(a, b);
  return min == -INFINITY ? max : max + std::log1p(std::exp(min - max));
}

Visible visible_of(const DecodeParams& params, int32_t batch) {
  const int32_t end = params.seq_lens[batch];
  int32_t begin = params.seq_starts == nullptr ? 0 : params.seq_starts[batch];
  if (params.sliding_window > 0) begin = std::max(begin, end - params.sliding_window);
  return {begin, end};
}

Logit plain_logit(const DecodeParams& params, int32_t batch, int32_t head, int32_t token) {
  const int32_t kv_head = head / params.group_size;
  Logit logit = {};
  for (int32_t d = 0; d < params.head_dim; ++d) {
    const double q = read(params.query_dtype, params.query,
                          batch * params.query_batch_stride + head * params.query_head_stride + d);
    const double k = read(params, params.key, params.key_scale, batch, kv_head, token, d);
    logit.value += q * k * params.scale;
    logit.magnitude += std::abs(q * k) * params.scale;
  }
  return logit;
}

double adjusted(const DecodeParams& params, int32_t batch, int32_t head, int32_t token,
                double logit) {
  if (params.softcap > 0.0f) logit = params.softcap * std::tanh(logit / params.softcap);
  if (params.alibi_slopes == nullptr) return logit;
  return logit + double{params.alibi_slopes[head]} * (token - (params.seq_lens[batch] - 1));
}

Exact exact_attention(const DecodeParams& params) {
  Exact exact;
  const size_t heads = size_t(params.batch) * params.num_q_heads;
  exact.out.resize(heads * params.value_dim);
  exact.lse.resize(heads);
  exact.magnitude.resize(heads);
  exact.largest_value.resize(heads);
  exact.tokens_read.resize(size_t(params.batch) * params.num_kv_heads);
  exact.stop_block = exact.tokens_read;
  for (int32_t b = 0; b < params.batch; ++b) {
    for (int32_t h = 0; h < params.num_kv_heads; ++h) attend(params, b, h, exact);
  }
  return exact;
}

}  // namespace checks
