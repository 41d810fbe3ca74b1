#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "checks.h"
#include "codes.h"
#include "core/key_codes.h"
#include "core/termination.h"
#include "core/unit_order.h"
#include "cpu/encode_keys.h"
#include "cpu/guided_walk.h"

namespace checks {
namespace {

// Log-sum-exps are rounded to whole steps, and so are their totals: one and a half at most.
constexpr double kMassError = 1.5 * art::kNatsPerStep + 1e-3;
// Units further below the best share a bucket, or do not count in sums of integers.
constexpr double kFarBelow = 16.0;

void add_to_digest(const std::vector<uint8_t>& bytes, uint64_t& digest) {
  for (const uint8_t byte : bytes) digest = (digest ^ byte) * 0x100000001b3;  // FNV-1a
}

// In two parts, as a cache does that grows.
void encode(const Problem& problem, uint32_t seed, Codes& codes) {
  Random random(seed);
  std::vector<int32_t> first = problem.lens;
  for (int32_t& len : first) len = random.below(len + 1);
  art::EncodeParams part = codes.params;
  part.cache.seq_lens = first.data();
  const int64_t items = int64_t{part.cache.batch} * part.cache.num_kv_heads;
  for (int64_t item = 0; item < items; ++item) art::cpu::encode_item(part, item);
  part = codes.params;
  part.coded_lens = first.data();
  part.coded_lens_batch_stride = 1;
  for (int64_t item = 0; item < items; ++item) art::cpu::encode_item(part, item);
}

// The results of a guided walk, and the parameters that point to them.
struct Guided {
  art::GuidedParams params = {};
  std::vector<int32_t> walk, walk_lens, num_pinned;
  std::vector<float> log_mass, log_rest;

  Guided(const Problem& problem, const Codes& codes) {
    params.attention = problem.params;
    params.attention.unit_size = params.attention.block_size = art::kUnitTokens;
    params.codes = codes.params.codes;
    params.max_units = (problem.capacity + art::kUnitTokens - 1) / art::kUnitTokens;
    const size_t items = size_t(problem.params.batch) * problem.params.num_kv_heads;
    walk.resize(items * params.max_units);
    walk_lens.resize(items);
    num_pinned.resize(items);
    log_mass.resize(walk.size());
    log_rest.resize(walk.size() * problem.params.group_size);
    params.walk = walk.data();
    params.walk_lens = walk_lens.data();
    params.num_pinned = num_pinned.data();
    params.log_mass = log_mass.data();
    params.log_rest = log_rest.data();
  }
  Guided(const Guided&) = delete;
  Guided& operator=(const Guided&) = delete;

  void run(int64_t num_workers) {
    const size_t bytes = art::cpu::guided_bytes(params);
    const Memory memory = allocate(bytes * num_workers);
    std::atomic<int64_t> next{0};
    const int64_t items = static_cast<int64_t>(walk_lens.size());
    on_threads(num_workers, [&](int64_t worker) {
      char* own = static_cast<char*>(memory.get()) + worker * bytes;
      for (int64_t item; (item = next.fetch_add(1)) < items;) {
        art::cpu::guide_item(params, item, own);
      }
    });
  }
};

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Units in the order they must have: pinned ones, and the rest that is to be ranked.
struct Ranks {
  std::vector<int32_t> pinned, ranked;

  explicit Ranks(Visible visible) {
    if (visible.begin >= visible.end) return;
    const int32_t first = visible.begin / art::kUnitTokens;
    const int32_t end = (visible.end - 1) / art::kUnitTokens + 1;
    const int32_t last_group = (visible.end / art::kGroupTokens - 1) * art::kGroupUnits;
    for (int32_t unit = first; unit < end; ++unit) {
      const bool is_pinned = unit < first + art::kSinkUnits || unit >= last_group;
      (is_pinned ? pinned : ranked).push_back(unit);
    }
  }
};

// Scores of the units of one KV head: the largest share that one of its query heads gives them.
// Compares what is left after each entry of the walk on the way.
std::vector<double> shares_of(const std::string& name, const Guided& guided, int32_t batch,
                              int32_t kv_head, Totals& totals) {
  const art::DecodeParams& cache = guided.params.attention;
  const int64_t item = int64_t{batch} * cache.num_kv_heads + kv_head;
  const int32_t max_units = guided.params.max_units, length = guided.walk_lens[item];
  const int32_t* walk = guided.walk.data() + item * max_units;
  std::vector<double> shares(max_units, -INFINITY);
  for (int32_t g = 0; g < cache.group_size; ++g) {
    const int32_t head = kv_head * cache.group_size + g;
    const std::vector<double> units = exact_units(guided.params, batch, head);
    double total = cache.attn_sinks == nullptr ? -INFINITY : cache.attn_sinks[head];
    for (const double unit : units) total = log_add(total, unit);
    for (int32_t u = 0; u < max_units; ++u) shares[u] = std::max(shares[u], units[u] - total);
    const int64_t row = (int64_t{batch} * cache.num_q_heads + head) * max_units;
    double left = -INFINITY;
    for (int32_t i = length - 1; i >= 0; left = log_add(left, units[walk[i--]])) {
      if (left < total - kFarBelow) continue;
      const double got = guided.log_rest[row + i];
      totals.worst_mass = std::fmax(totals.worst_mass, std::abs(got - left) / kMassError);
      if (std::abs(got - left) <= kMassError) continue;
      fail(totals, name, "log_rest[%d, %d]: expected %.5f, got %.5f", head, i, left, got);
    }
  }
  return shares;
}

// One (sequence, KV head).
void compare_item(const std::string& name, const Guided& guided, int32_t batch, int32_t kv_head,
                  Totals& totals) {
  const int64_t item = int64_t{batch} * guided.params.attention.num_kv_heads + kv_head;
  const int64_t row = item * guided.params.max_units;
  const int32_t* walk = guided.walk.data() + row;
  const Ranks ranks(visible_of(guided.params.attention, batch));
  const int32_t pinned = static_cast<int32_t>(ranks.pinned.size());
  const int32_t length = pinned + static_cast<int32_t>(ranks.ranked.size());
  if (guided.walk_lens[item] != length || guided.num_pinned[item] != pinned) {
    return fail(totals, name, "item %d: expected %d units, %d of them pinned, got %d and %d",
                static_cast<int>(item), length, pinned, guided.walk_lens[item],
                guided.num_pinned[item]);
  }
  std::vector<int32_t> rest(walk + pinned, walk + length);
  std::sort(rest.begin(), rest.end());
  if (!std::equal(ranks.pinned.begin(), ranks.pinned.end(), walk) || rest != ranks.ranked) {
    return fail(totals, name, "item %d: the walk has other units than are visible",
                static_cast<int>(item));
  }
  const std::vector<double> shares = shares_of(name, guided, batch, kv_head, totals);
  double best = -INFINITY;
  for (const int32_t unit : ranks.ranked) best = std::max(best, shares[unit]);
  // Units of one bucket are not ranked among each other.
  const double slack = art::kBucketSteps * art::kNatsPerStep + 2 * kMassError;
  for (int32_t i = 0; i < length; ++i) {
    const double got = guided.log_mass[row + i], exact = shares[walk[i]];
    totals.worst_mass = std::fmax(totals.worst_mass, std::abs(got - exact) / kMassError);
    if (std::abs(got - exact) > kMassError) {
      return fail(totals, name, "log_mass[%d, %d]: expected %.5f, got %.5f", static_cast<int>(item),
                  i, exact, got);
    }
    if (i <= pinned || exact < best - kFarBelow || shares[walk[i - 1]] >= exact - slack) continue;
    return fail(totals, name, "item %d: entry %d has %.4f less mass than the next",
                static_cast<int>(item), i - 1, exact - shares[walk[i - 1]]);
  }
}

void check_walk(const std::string& name, const Problem& problem, const Codes& codes,
                const Guided& guided, Totals& totals) {
  Guided shared(problem, codes);
  shared.run(2);
  if (shared.walk != guided.walk || !same_bits(shared.log_mass, guided.log_mass) ||
      !same_bits(shared.log_rest, guided.log_rest)) {
    fail(totals, name, "two threads make another walk than one");
  }
  for (int32_t b = 0; b < problem.params.batch; ++b) {
    for (int32_t h = 0; h < problem.params.num_kv_heads; ++h) {
      compare_item(name, guided, b, h, totals);
    }
  }
}

}  // namespace

void check_guided(const std::string& name, const Case& what, DType dtype, Totals& totals) {
  for (uint32_t seed = 1; seed <= kMostDraws; ++seed) {
    Problem problem;
    Codes codes;
    build(what, dtype, seed, problem);
    build(problem, seed, codes);
    encode(problem, seed, codes);
    // Whether a case is drawn again depends on the walk, which is not the same on every target.
    if (seed == 1) add_to_digest(codes.memory, totals.digest);
    Guided guided(problem, codes);
    guided.run(1);
    DecodeParams params = problem.params;
    params.walk_order = WalkOrder::kExplicit;
    params.walk = guided.walk.data();
    params.walk_lens = guided.walk_lens.data();
    params.max_units = guided.params.max_units;
    params.pinned_units = guided.num_pinned.data();
    params.use_residual = what.residual > 0.0f;
    params.residual_limit = art::residual_limit(what.residual);
    params.log_rest = guided.log_rest.data();
    params.all_agree = what.all_agree;
    const Exact exact = exact_attention(params);
    if (exact.nearest < margin_of(dtype)) continue;
    if (exact_records(codes) != codes.memory) fail(totals, name, "other key codes");
    check_walk(name, problem, codes, guided, totals);
    return check_result(name, params, exact, totals);
  }
  fail(totals, name, "%u draws, and each has a decision near its threshold", kMostDraws);
}

}  // namespace checks
