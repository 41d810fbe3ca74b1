// From the log-sum-exp of units to their shares: the largest over the query heads, relative to all
// units and the sink of the head. The code runs once, and much of its time goes into fetching it:
// loops are not unrolled unless that overlaps loads.
#pragma once

#include <cstdint>

#include "cuda/guided/order_crew.cuh"
#include "cuda/guided/units.cuh"
#include "cuda/guided/workspace.h"

namespace art::cuda::guided {

// What is ordered.
struct OrderItem {
  const GuidedParams& guided;
  const Workspace& space;
  int32_t index;
  const int16_t* lse;  // [group_size, unit_stride]

  __device__ OrderItem(const GuidedParams& guided, const Workspace& space, int32_t index)
      : guided(guided),
        space(space),
        index(index),
        lse(space.unit_lse + int64_t{index} * guided.attention.group_size * space.unit_stride) {}

  // Of a query head of the group.
  __device__ const int16_t* lse_of(int32_t head) const {
    return lse + int64_t{head} * space.unit_stride;
  }
};

// Eight units of one query head, two in a word. What is not visible is whatever was in memory.
struct UnitVector {
  uint32_t words[kUnitsPerVector / 2];

  // `head`: of the group. All heads of an item are fewer than 2^32 vectors.
  __device__ static UnitVector load(const OrderItem& item, uint32_t head, uint32_t vector) {
    const uint32_t stride = static_cast<uint32_t>(item.space.unit_stride) / kUnitsPerVector;
    const uint4 words = reinterpret_cast<const uint4*>(item.lse)[head * stride + vector];
    return {{words.x, words.y, words.z, words.w}};
  }
  __device__ int32_t operator[](int i) const {
    return static_cast<int16_t>(words[i / 2] >> i % 2 * 16);
  }
  // Makes the others the least.
  __device__ void keep(uint32_t visible) {
    constexpr uint32_t kLeast = static_cast<uint16_t>(kLeastSteps);
#pragma unroll
    for (int i = 0; i < kUnitsPerVector / 2; ++i) {
      if (!(visible >> 2 * i & 1)) words[i] = (words[i] & 0xffff0000) | kLeast;
      if (!(visible >> 2 * i & 2)) words[i] = (words[i] & 0xffff) | kLeast << 16;
    }
  }
};

constexpr uint32_t kAllVisible = (1u << kUnitsPerVector) - 1;

// One bit for each visible unit of a vector that has any.
__device__ inline uint32_t visible_units(const GuidedUnits& units, int32_t vector) {
  const int32_t unit = vector * kUnitsPerVector;
  const uint32_t before = max(units.begin - unit, 0);
  const uint32_t behind = max(unit + kUnitsPerVector - units.end, 0);
  return kAllVisible << before & kAllVisible >> behind;
}

// A task's units, by one warp. The next ones are on their way while some are added.
template <class State>
__device__ void add_task(const OrderItem& item, const GuidedUnits& units, const BlockUnits& mine,
                         const Heads& heads, int32_t task, State& state) {
  const int32_t step = 32 << heads.parts_log2, end = mine.end_vector;
  const int32_t part = task & ((1 << heads.parts_log2) - 1), lane = threadIdx.x % 32;
  const uint32_t head = heads.first + (task >> heads.parts_log2);
  int32_t v = mine.first_vector + part * 32 + lane;
  UnitVector next;
  if (v < end) next = UnitVector::load(item, head, v);
#pragma unroll 1
  for (; v < end; v += step) {
    UnitVector vector = next;
    if (v + step < end) next = UnitVector::load(item, head, v + step);
    const uint32_t visible = visible_units(units, v);
    if (visible != kAllVisible) vector.keep(visible);
    state.add(vector, kUnitsPerVector - __popc(visible));
  }
}

struct LargestUnit {
  uint32_t pair = 0x10001u * static_cast<uint16_t>(kLeastSteps);

  __device__ void add(const UnitVector& vector, int32_t) {
#pragma unroll
    for (const uint32_t word : vector.words) pair = __vmaxs2(pair, word);
  }
  __device__ int32_t of_warp() const {
    const int32_t low = static_cast<int16_t>(pair), high = static_cast<int16_t>(pair >> 16);
    return __reduce_max_sync(~0u, max(low, high));
  }
};

struct UnitMasses {
  const uint32_t* powers;
  int32_t largest;
  uint64_t mass = 0;

  // mass_below(), without a branch, and with its table where all lanes can read it at once.
  __device__ uint32_t mass_of(int32_t steps) const {
    const uint32_t below = largest - steps;
    return __funnelshift_rc(powers[below % 64], 0, below / 64);  // nothing from 32 on
  }
  __device__ void add(int32_t steps) { mass += mass_of(steps); }
  __device__ void add(const UnitVector& vector, int32_t num_hidden) {
#pragma unroll
    for (int i = 0; i < kUnitsPerVector; ++i) add(vector[i]);
    if (num_hidden > 0) mass -= uint64_t{mass_of(kLeastSteps)} * num_hidden;
  }
};

// The largest unit of each task, for all to know.
__device__ inline void send_largest(const OrderItem& item, const GuidedUnits& units,
                                    const BlockUnits& mine, const Heads& heads, const Crew& crew) {
#pragma unroll 1
  for (int32_t task = threadIdx.x / 32; task < heads.tasks(); task += num_warps()) {
    LargestUnit state;
    add_task(item, units, mine, heads, task, state);
    crew.send(Meeting::kLargest, crew.slots[crew.rank].largest[task], state.of_warp());
  }
}

// The largest unit of a head.
__device__ inline int32_t largest_of(const Heads& heads, const Crew& crew, int32_t head) {
  int32_t largest = kLeastSteps;
#pragma unroll 1
  for (int32_t i = threadIdx.x % 32; i < crew.blocks() << heads.parts_log2; i += 32) {
    const Slots& slots = crew.slots[i & (crew.blocks() - 1)];
    largest = max(largest, slots.largest[(head << heads.parts_log2) + (i >> crew.blocks_log2)]);
  }
  return __reduce_max_sync(~0u, largest);
}

// steps_of_mass(), by a guess that is off by one at most: a logarithm of 31 to 32 has an error of
// 2^-18, and 64 times as many steps. `powers`: in shared memory.
__device__ inline int32_t guess_steps_of_mass(uint64_t mass, const uint32_t* powers) {
  const ScaledMass scaled(mass);
  const float guess = 64.0f * (__log2f(static_cast<float>(scaled.scaled)) - 31.0f);
  int32_t reached = min(max(static_cast<int32_t>(guess), 1), 63);
  const bool is_reached = scaled.reaches(powers[64 - reached]);
  const bool is_next = scaled.reaches(powers[63 - reached]);
  reached += is_next ? 1 : is_reached ? 0 : -1;
  return scaled.steps(reached);
}

// Log-sum-exp of all units, and of the sink, of each head.
__device__ inline void find_totals(const OrderItem& item, const GuidedUnits& units,
                                   const BlockUnits& mine, const Heads& heads, const Crew& crew) {
  const DecodeParams& params = item.guided.attention;
  const bool has_sinks = params.attn_sinks != nullptr;
  const auto sink_of = [&](int32_t head) {
    if (!has_sinks) return kLeastSteps;
    const int32_t first = item.index % params.num_kv_heads * params.group_size + heads.first;
    return int32_t{quantise_steps(params.attn_sinks[first + head] * kStepsPerNat)};
  };
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  send_largest(item, units, mine, heads, crew);
  crew.meet(Meeting::kLargest);
#pragma unroll 1
  for (int32_t task = warp; task < heads.tasks(); task += num_warps()) {
    const int32_t head = task >> heads.parts_log2;
    UnitMasses state = {crew.shared.powers, max(largest_of(heads, crew, head), sink_of(head))};
    add_task(item, units, mine, heads, task, state);
    crew.send(Meeting::kMass, crew.slots[crew.rank].mass[task], sum_of_warp(state.mass));
  }
  crew.meet(Meeting::kMass);
#pragma unroll 1
  for (int32_t head = warp; head < heads.count; head += num_warps()) {
    const int32_t sink = sink_of(head), largest = max(largest_of(heads, crew, head), sink);
    UnitMasses masses = {crew.shared.powers, largest};
    if (lane == 0 && has_sinks) masses.add(sink);
#pragma unroll 1
    for (int32_t i = lane; i < crew.blocks() << heads.parts_log2; i += 32) {
      const Slots& slots = crew.slots[i & (crew.blocks() - 1)];
      masses.mass += slots.mass[(head << heads.parts_log2) + (i >> crew.blocks_log2)];
    }
    const int32_t steps = guess_steps_of_mass(sum_of_warp(masses.mass), crew.shared.powers);
    if (lane == 0) crew.shared.total[head] = largest + steps;
  }
  __syncthreads();
}

// The largest share of each unit over some query heads; keeps what other heads have found. Scores
// are numbered from mine.origin() on. Returns the best of the thread's units that are not pinned.
__device__ inline int32_t share_of_units(const OrderItem& item, const BlockUnits& mine,
                                         const Heads& heads, const int32_t* totals,
                                         int32_t* scores) {
  constexpr int kAtOnce = 4;  // heads
  int32_t most = INT32_MIN;
#pragma unroll 1
  for (int32_t v = mine.first_vector + static_cast<int32_t>(threadIdx.x); v < mine.end_vector;
       v += static_cast<int32_t>(blockDim.x)) {
    const int32_t unit = v * kUnitsPerVector;
    int32_t* own = scores + (unit - mine.origin());
    int32_t best[kUnitsPerVector];
#pragma unroll
    for (int i = 0; i < kUnitsPerVector; ++i) best[i] = heads.first == 0 ? INT32_MIN : own[i];
#pragma unroll 1
    for (int32_t head = 0; head < heads.count; head += kAtOnce) {
      UnitVector vectors[kAtOnce];
      // More heads than there are: once more the last one, which changes nothing.
      const auto at = [&](int i) { return min(head + i, heads.count - 1); };
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        vectors[i] = UnitVector::load(item, heads.first + at(i), v);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int32_t total = totals[at(i)];
#pragma unroll
        for (int j = 0; j < kUnitsPerVector; ++j) best[j] = max(best[j], vectors[i][j] - total);
      }
    }
    reinterpret_cast<int4*>(own)[0] = make_int4(best[0], best[1], best[2], best[3]);
    reinterpret_cast<int4*>(own)[1] = make_int4(best[4], best[5], best[6], best[7]);
    const int32_t before = mine.free_begin - unit, until = mine.free_end - unit;
#pragma unroll
    for (int i = 0; i < kUnitsPerVector; ++i) {
      most = max(most, (i >= before) & (i < until) ? best[i] : INT32_MIN);
    }
  }
  return most;
}

}  // namespace art::cuda::guided
