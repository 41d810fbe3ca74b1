#include <cmath>
#include <cstring>

#include "checks.h"
#include "cpu/decode_attention.h"
#include "exact.h"

namespace checks {
namespace {

struct Result {
  std::vector<uint8_t> out;
  std::vector<float> lse;
  std::vector<int32_t> tokens_read, stop_block;

  bool operator==(const Result& other) const {
    return out == other.out && tokens_read == other.tokens_read && stop_block == other.stop_block &&
           std::memcmp(lse.data(), other.lse.data(), lse.size() * sizeof(float)) == 0;
  }
};

Result attend(DecodeParams params, int64_t num_threads, int64_t num_splits, Totals& totals) {
  const size_t heads = size_t(params.batch) * params.num_q_heads;
  const size_t items = size_t(params.batch) * params.num_kv_heads;
  Result result = {std::vector<uint8_t>(heads * params.value_dim * size_of(params.query_dtype)),
                   std::vector<float>(heads), std::vector<int32_t>(items),
                   std::vector<int32_t>(items)};
  params.out = result.out.data();
  params.lse = result.lse.data();
  params.tokens_read = result.tokens_read.data();
  params.stop_block = result.stop_block.data();
  const art::cpu::DecodePlan plan = art::cpu::plan_decode(params, num_threads, num_splits);
  const auto memory = allocate(plan.workspace_bytes);
  art::cpu::begin_decode(params, plan, memory.get());
  totals.shared_runs += plan.num_workers > 1 && plan.max_chunks > 1;
  on_threads(plan.num_workers, [&](int64_t worker) {
    art::cpu::run_decode_worker(params, plan, memory.get(), worker);
  });
  return result;
}

// Relative errors: of a result that is rounded to its type, and of the probabilities that multiply
// values, which may be rounded to a half type. Softmax sums are of the same probabilities.
struct Precision {
  double result;
  double weight;
};

Precision precision_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return {0x1p-24, 0.0};
    case DType::kFloat16:
      return {0x1p-11, 0x1p-12};
    default:
      return {0x1p-8, 0x1p-9};
  }
}

void compare(const std::string& name, const DecodeParams& params, const Exact& exact,
             const Result& result, Totals& totals) {
  for (size_t item = 0; item < exact.stop_block.size(); ++item) {
    ++totals.items;
    totals.early_stops += exact.stop_block[item] >= 0;
    if (result.stop_block[item] == exact.stop_block[item] &&
        result.tokens_read[item] == exact.tokens_read[item]) {
      continue;
    }
    return fail(totals, name, "item %zu: expected stop %d after %d tokens, got %d after %d", item,
                exact.stop_block[item], exact.tokens_read[item], result.stop_block[item],
                result.tokens_read[item]);
  }
  const Precision precision = precision_of(params.query_dtype);
  for (size_t row = 0; row < exact.lse.size(); ++row) {
    const size_t item = row / params.group_size;
    const int32_t tokens = exact.tokens_read[item];
    // Rounded terms make a logit, rounded logits probabilities, and their sums the output. Sums are
    // formed tile by tile, so that they gather few roundings.
    const double of_sums =
        precision.weight + 0x1p-24 * (8.0 + std::sqrt(tokens) + exact.magnitude[row]);
    for (int32_t d = 0; d < params.value_dim; ++d) {
      const size_t at = row * params.value_dim + d;
      const double got = read(params.query_dtype, result.out.data(), at);
      const double error = std::abs(got - exact.out[at]);
      const double rounding = precision.result * std::abs(exact.out[at]);
      const double allowed = rounding + of_sums * exact.largest_value[row];
      if (error > rounding) {
        totals.worst_out = std::fmax(totals.worst_out, (error - rounding) / (allowed - rounding));
      }
      if (error <= allowed) continue;
      return fail(totals, name, "out[%zu, %d]: expected %.9g, got %.9g, allowed error %.2g", row, d,
                  exact.out[at], got, allowed);
    }
    if (tokens == 0 && result.lse[row] == -INFINITY) continue;
    const double error = std::abs(result.lse[row] - exact.lse[row]);
    const double allowed = of_sums + 0x1p-24 * std::abs(exact.lse[row]);
    totals.worst_lse = std::fmax(totals.worst_lse, error / allowed);
    if (error <= allowed) continue;
    return fail(totals, name, "lse[%zu]: expected %.9g, got %.9g, allowed error %.2g", row,
                exact.lse[row], static_cast<double>(result.lse[row]), allowed);
  }
}

}  // namespace

void check_result(const std::string& name, const DecodeParams& params, const Exact& exact,
                  Totals& totals) {
  const Result one = attend(params, 1, 0, totals);
  compare(name, params, exact, one, totals);
  for (const int64_t splits : {0, 3, 7}) {
    for (const int64_t threads : {1, 2}) {
      if (attend(params, threads, splits, totals) == one) continue;
      fail(totals, name, "other bits with %d threads and %d splits", static_cast<int>(threads),
           static_cast<int>(splits));
    }
  }
}

void check_attention(const std::string& name, const Case& what, DType dtype, Totals& totals) {
  for (uint32_t seed = 1; seed <= kMostDraws; ++seed) {
    Problem problem;
    build(what, dtype, seed, problem);
    const Exact exact = exact_attention(problem.params);
    if (exact.nearest < margin_of(dtype)) continue;
    return check_result(name, problem.params, exact, totals);
  }
  fail(totals, name, "%u draws, and each has a decision near its threshold", kMostDraws);
}

}  // namespace checks
