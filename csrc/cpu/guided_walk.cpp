#include "cpu/guided_walk.h"

#include <algorithm>
#include <cmath>

#include "cpu/arena.h"
#include "cpu/kernels.h"

namespace art::cpu {
namespace {

GuidedScratch take_guided_scratch(const GuidedParams& params, Arena& arena) {
  const DecodeParams& attention = params.attention;
  const size_t heads = round_up(attention.group_size, kHeadsPerPass);
  const size_t fields = round_up(4 * CodeLayout(attention.head_dim).steps, kRowAlignment);
  const size_t units = attention.group_size * size_t(round_up(params.max_units, kTilePadding));
  GuidedScratch scratch = {};
  scratch.tile = take_scratch(attention, arena);
  scratch.code_query = arena.take<float>(heads * kPlaces * fields);
  scratch.scaled = arena.take<float>(heads * kPlaces * fields);
  scratch.unit_max = arena.take<float>(units);
  scratch.unit_sum = arena.take<float>(units);
  scratch.unit_lse = arena.take<int16_t>(units);
  return scratch;
}

// Log-sum-exp of all units of one query head, and of its sink, in steps.
int32_t total_steps(const int16_t* unit_lse, int32_t num_units, const float* sink) {
  const int16_t sink_steps = sink == nullptr ? kLeastSteps : quantise_steps(*sink * kStepsPerNat);
  int16_t largest = sink_steps;  // a plain loop becomes vectors, std::max_element does not
  for (int32_t u = 0; u < num_units; ++u) largest = std::max(largest, unit_lse[u]);
  uint64_t mass = sink == nullptr ? 0 : mass_below(largest - sink_steps);
  for (int32_t u = 0; u < num_units; ++u) mass += mass_below(largest - unit_lse[u]);
  return largest + steps_of_mass(mass);
}

// The largest share of each unit over the query heads, in steps.
void share_of_units(const DecodeParams& params, const Item& item, const int16_t* unit_lse,
                    int32_t unit_stride, int32_t* scores) {
  const int32_t num_units = item.walk.num_units;
  for (int32_t g = 0; g < params.group_size; ++g) {
    const int16_t* of_head = unit_lse + int64_t{g} * unit_stride;
    const int32_t total = total_steps(of_head, num_units, sink_of(params, item, g));
    for (int32_t u = 0; u < num_units; ++u) {
      const int32_t score = of_head[u] - total;
      scores[u] = g == 0 ? score : std::max(scores[u], score);
    }
  }
}

// What is left after each entry of the walk, for one query head.
void rest_of_walk(const GuidedUnits& units, const int16_t* unit_lse, const int32_t* walk,
                  int32_t max_units, float* log_rest) {
  const int32_t num_units = units.num_units();
  std::fill(log_rest + num_units, log_rest + max_units, -INFINITY);
  int16_t largest = kLeastSteps;
  for (int32_t u = 0; u < num_units; ++u) largest = std::max(largest, unit_lse[u]);
  uint64_t mass = 0;
  for (int32_t i = num_units - 1; i >= 0; --i) {
    log_rest[i] = log_of_rest(mass, largest, steps_of_mass);
    mass += mass_below(largest - unit_lse[walk[i] - units.begin]);
  }
}

// A counting sort: stable, in two passes.
void order_units(const GuidedUnits& units, const int32_t* scores, int32_t* walk, float* log_mass) {
  const auto put = [&](int32_t position, int32_t unit) {
    walk[position] = unit;
    log_mass[position] = static_cast<float>(scores[unit - units.begin]) * kNatsPerStep;
  };
  int32_t next = 0;
  for (int32_t u = units.begin; u < units.sink_end; ++u) put(next++, u);
  for (int32_t u = units.recent_begin; u < units.end; ++u) put(next++, u);
  if (units.sink_end == units.recent_begin) return;
  const int32_t *first = scores + (units.sink_end - units.begin),
                *last = scores + (units.recent_begin - units.begin);
  const int32_t best = *std::max_element(first, last);
  int32_t place[kNumBuckets + 1] = {next};
  for (const int32_t* score = first; score < last; ++score) ++place[bucket_of(*score, best) + 1];
  for (int32_t i = 0; i < kNumBuckets; ++i) place[i + 1] += place[i];
  for (int32_t u = units.sink_end; u < units.recent_begin; ++u) {
    put(place[bucket_of(scores[u - units.begin], best)]++, u);
  }
}

}  // namespace

size_t guided_bytes(const GuidedParams& params) {
  Arena arena(nullptr);
  take_guided_scratch(params, arena);
  arena.take<int32_t>(params.max_units);
  return arena.used();
}

int64_t guided_workers(const GuidedParams& params, int64_t num_threads) {
  kernels(params.attention.dtype);  // a name in ART_CPU that is wrong is an error here
  const int64_t items = int64_t{params.attention.batch} * params.attention.num_kv_heads;
  int64_t units = 0;
  for (int64_t index = 0; index < items; ++index) {
    units += GuidedUnits(visible_of(params.attention, index)).num_units();
  }
  // Waking a thread costs about 5 us, as much as 16 units.
  constexpr int64_t kUnitsPerWorker = 64;
  return std::max<int64_t>(1, std::min({num_threads, items, units / kUnitsPerWorker}));
}

void guide_item(const GuidedParams& params, int64_t index, void* memory) {
  const DecodeParams& attention = params.attention;
  const TokenRange visible = visible_of(attention, index);
  const GuidedUnits units(visible);
  const Item item =
      make_item(attention, index, visible,
                built_in_walk(WalkOrder::kOldestFirst, visible, kUnitTokens, /*num_pinned=*/0));
  int32_t* walk = params.walk + index * params.max_units;
  float* log_mass = params.log_mass + index * params.max_units;
  Arena arena(memory);
  GuidedScratch scratch = take_guided_scratch(params, arena);
  // Units are kept by groups, the first of which may begin before what is visible.
  const int16_t* unit_lse = scratch.unit_lse + units.begin % kGroupUnits;
  int32_t* scores = arena.take<int32_t>(params.max_units);
  const int64_t stride = round_up(params.max_units, kTilePadding);
  if (units.num_units() > 0) {
    kernels(attention.dtype).score_units(params, item, scratch);
    share_of_units(attention, item, unit_lse, stride, scores);
    order_units(units, scores, walk, log_mass);
  }
  std::fill(walk + units.num_units(), walk + params.max_units, -1);
  std::fill(log_mass + units.num_units(), log_mass + params.max_units, -INFINITY);
  for (int32_t g = 0; params.log_rest != nullptr && g < attention.group_size; ++g) {
    const int64_t row = (index * attention.group_size + g) * params.max_units;
    rest_of_walk(units, unit_lse + g * stride, walk, params.max_units, params.log_rest + row);
  }
  params.walk_lens[index] = units.num_units();
  params.num_pinned[index] = units.num_pinned();
}

}  // namespace art::cpu
