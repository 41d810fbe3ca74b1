// From the log-sum-exp of units to their shares: the largest over the query heads, relative to all
// units and the sink of the head.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/guided/order_crew.cuh"
#include "cuda/guided/units.cuh"
#include "cuda/guided/workspace.h"

namespace art::cuda::guided {

// Eight units of one query head. What is not visible is whatever was in memory.
struct UnitVector {
  int16_t steps[kUnitsPerVector];

  __device__ static UnitVector load(const int16_t* lse, int32_t vector) {
    UnitVector result;
    const uint4 words = *reinterpret_cast<const uint4*>(lse + vector * kUnitsPerVector);
    memcpy(result.steps, &words, sizeof(words));
    return result;
  }
};

// One bit for each visible unit of a vector that has any.
__device__ inline uint32_t visible_units(const GuidedUnits& units, int32_t vector) {
  const int32_t unit = vector * kUnitsPerVector;
  const uint32_t before = max(units.begin - unit, 0);
  const uint32_t behind = max(unit + kUnitsPerVector - units.end, 0);
  return 0xffu << before & 0xffu >> behind;
}

// A task's units, by one warp: several vectors are on their way at a time.
template <class State>
__device__ void add_task(const GuidedUnits& units, const BlockUnits& mine, const Heads& heads,
                         int32_t task, State& state) {
  constexpr int kAtOnce = 2;
  const int32_t lane = threadIdx.x % 32, step = heads.parts * 32;
  const int32_t head = task % heads.count, part = task / heads.count;
  const int16_t* lse = heads.lse_of(head);
  for (int32_t v = mine.first_vector + part * 32 + lane; v < mine.end_vector; v += kAtOnce * step) {
    UnitVector vectors[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (v + i * step < mine.end_vector) vectors[i] = UnitVector::load(lse, v + i * step);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (v + i * step >= mine.end_vector) break;
      const uint32_t visible = visible_units(units, v + i * step);
#pragma unroll
      for (int j = 0; j < kUnitsPerVector; ++j) {
        if (visible >> j & 1) state.add(vectors[i].steps[j]);
      }
    }
  }
}

struct LargestUnit {
  int32_t largest = kLeastSteps;

  __device__ void add(int16_t steps) { largest = max(largest, static_cast<int32_t>(steps)); }
};

struct UnitMasses {
  const uint32_t* powers;
  int32_t largest;
  uint64_t mass = 0;

  // mass_below(), with its table where all lanes can read it at once.
  __device__ void add(int32_t steps) {
    const uint32_t below = largest - steps;
    if (below < 32 * 64) mass += powers[below % 64] >> below / 64;
  }
};

// The largest unit of each task, for all to know.
__device__ inline void send_largest(const GuidedUnits& units, const BlockUnits& mine,
                                    const Heads& heads, const Crew& crew) {
  for (int32_t task = threadIdx.x / 32; task < heads.tasks(); task += num_warps()) {
    LargestUnit state;
    add_task(units, mine, heads, task, state);
    const int32_t largest = __reduce_max_sync(~0u, state.largest);
    crew.send(Meeting::kLargest, crew.slots[crew.rank].largest[task], largest);
  }
}

// The largest unit of a head.
__device__ inline int32_t largest_of(const Heads& heads, const Crew& crew, int32_t head) {
  int32_t largest = kLeastSteps;
  for (int32_t i = threadIdx.x % 32; i < heads.parts << crew.blocks_log2; i += 32) {
    const int32_t part = i >> crew.blocks_log2;
    const Slots& slots = crew.slots[i & (crew.blocks() - 1)];
    largest = max(largest, slots.largest[head + heads.count * part]);
  }
  return __reduce_max_sync(~0u, largest);
}

// Steps of a sum of masses, by one warp.
__device__ inline int32_t warp_steps_of_mass(uint64_t mass, const uint32_t* powers) {
  const ScaledMass scaled(mass);
  const int32_t lane = threadIdx.x % 32;
  const uint32_t few = __ballot_sync(~0u, scaled.reaches(powers[lane + 32]));
  const uint32_t more = __ballot_sync(~0u, scaled.reaches(powers[lane]));
  return scaled.steps(__popc(few) + __popc(more));
}

// Log-sum-exp of all units, and of the sink, of each head.
__device__ inline void find_totals(const GuidedParams& guided, int32_t index,
                                   const GuidedUnits& units, const BlockUnits& mine,
                                   const Heads& heads, int32_t first_head, const Crew& crew) {
  const auto sink_of = [&](int32_t head) {
    const DecodeParams& params = guided.attention;
    if (params.attn_sinks == nullptr) return kLeastSteps;
    const int32_t first = index % params.num_kv_heads * params.group_size + first_head;
    return int32_t{quantise_steps(params.attn_sinks[first + head] * kStepsPerNat)};
  };
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  send_largest(units, mine, heads, crew);
  crew.meet(Meeting::kLargest);
  for (int32_t task = warp; task < heads.tasks(); task += num_warps()) {
    const int32_t head = task % heads.count;
    UnitMasses state = {crew.shared.powers, max(largest_of(heads, crew, head), sink_of(head))};
    add_task(units, mine, heads, task, state);
    crew.send(Meeting::kMass, crew.slots[crew.rank].mass[task], sum_of_warp(state.mass));
  }
  crew.meet(Meeting::kMass);
  for (int32_t head = warp; head < heads.count; head += num_warps()) {
    const int32_t sink = sink_of(head), largest = max(largest_of(heads, crew, head), sink);
    UnitMasses masses = {crew.shared.powers, largest};
    if (lane == 0 && guided.attention.attn_sinks != nullptr) masses.add(sink);
    for (int32_t i = lane; i < heads.parts << crew.blocks_log2; i += 32) {
      const int32_t part = i >> crew.blocks_log2;
      masses.mass += crew.slots[i & (crew.blocks() - 1)].mass[head + heads.count * part];
    }
    const int32_t steps = warp_steps_of_mass(sum_of_warp(masses.mass), crew.shared.powers);
    if (lane == 0) crew.shared.total[head] = largest + steps;
  }
  __syncthreads();
}

// The largest share of each unit over some query heads; keeps what other heads have found. Scores
// are numbered from mine.origin() on. Returns the best of the thread's units that are not pinned.
__device__ inline int32_t share_of_units(const BlockUnits& mine, const Heads& heads, bool is_first,
                                         const int32_t* totals, int32_t* scores) {
  int32_t most = INT32_MIN;
  for (int32_t v = mine.first_vector + static_cast<int32_t>(threadIdx.x); v < mine.end_vector;
       v += static_cast<int32_t>(blockDim.x)) {
    int32_t best[kUnitsPerVector];
    const int32_t unit = v * kUnitsPerVector;
    int4* own = reinterpret_cast<int4*>(scores + (unit - mine.origin()));
    if (is_first) {
#pragma unroll
      for (int i = 0; i < kUnitsPerVector; ++i) best[i] = INT32_MIN;
    } else {
      memcpy(best, own, sizeof(best));
    }
#pragma unroll 4
    for (int32_t head = 0; head < heads.count; ++head) {
      const auto vector = UnitVector::load(heads.lse_of(head), v);
      const int32_t total = totals[head];
#pragma unroll
      for (int i = 0; i < kUnitsPerVector; ++i) best[i] = max(best[i], vector.steps[i] - total);
    }
    own[0] = make_int4(best[0], best[1], best[2], best[3]);
    own[1] = make_int4(best[4], best[5], best[6], best[7]);
#pragma unroll
    for (int i = 0; i < kUnitsPerVector; ++i) {
      if (unit + i >= mine.free_begin && unit + i < mine.free_end) most = max(most, best[i]);
    }
  }
  return most;
}

}  // namespace art::cuda::guided
