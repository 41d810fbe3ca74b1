// Rests and results of an item.
#pragma once

#include "core/item.h"
#include "core/online_softmax.h"
#include "core/termination.h"
#include "cuda/listed_walks.h"
#include "cuda/rows.cuh"

namespace art::cuda::sm90 {

// What a head of the group leaves after a step. NaN, which is never little enough, where the step
// completes no block or there is no such head.
__device__ inline float log_rest_after(const DecodeParams& params, const ListedWalks& walks,
                                       const Item& item, int32_t step, int32_t g) {
  if (g >= params.group_size || !item.steps.completes_block(step)) return NAN;
  const int64_t index = int64_t{item.batch} * params.num_kv_heads + item.kv_head;
  const int64_t first_unit = index * params.max_units;
  const KeptUnits kept = {walks.kept + first_unit, walks.entries + first_unit};
  const int64_t row = (index * params.group_size + g) * params.max_units;
  return params.log_rest[row + last_entry_of(item, step, kept)];
}

// What an element of the accumulator is divided by; infinite where nothing was read, for that is
// defined as zero and not 0 / 0.
__device__ inline float denominator_of(const SoftmaxState& state, const float* sink) {
  return state.sum == 0.0f ? INFINITY : state.sum + sink_mass(state, sink);
}

// Visible tokens in the first `num_units` units of an item's walk. Called by a warp.
__device__ inline int32_t tokens_in(const DecodeParams& params, const Item& item,
                                    int32_t num_units) {
  const Walk& walk = item.walk;
  if (num_units == 0) return 0;
  const int32_t first = item.visible.begin / params.unit_size;
  const int32_t last = (item.visible.end - 1) / params.unit_size;
  // All units are full, but for the first and the last one of the sequence.
  const auto missing = [&](int32_t unit) {
    return params.unit_size - unit_tokens(unit, params.unit_size, item.visible).size();
  };
  int32_t lacking = 0;
  if (walk.order == WalkOrder::kExplicit) {
    for (int32_t i = threadIdx.x % 32; i < num_units; i += 32) lacking += missing(walk.units[i]);
    lacking = __reduce_add_sync(~0u, lacking);
  } else {
    // The walk has the first unit at one end or after the sinks, and the last one likewise.
    const int32_t places[3] = {0, walk.num_units - 1, walk.sink_units};
    bool found_first = false, found_last = false;
    for (const int32_t place : places) {
      if (place >= num_units) continue;
      found_first = found_first || walk.unit_at(place) == first;
      found_last = found_last || walk.unit_at(place) == last;
    }
    if (found_first) lacking += missing(first);
    if (found_last && last != first) lacking += missing(last);
  }
  return num_units * params.unit_size - lacking;
}

}  // namespace art::cuda::sm90
