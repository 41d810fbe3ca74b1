// What each query head has left after each entry of the walk.
#pragma once

#include <cstdint>

#include "cuda/guided/order_crew.cuh"
#include "cuda/guided/order_totals.cuh"

namespace art::cuda::guided {

// Neighbouring entries of the walk, for a task of one thread block of the crew.
struct Entries {
  int32_t begin;
  int32_t end;

  __device__ Entries(int32_t num_units, const Heads& heads, const Crew& crew, int32_t task) {
    const int32_t tasks_log2 = heads.parts_log2 + crew.blocks_log2;
    const int32_t share = ((num_units >> (tasks_log2 + 5)) + 1) * 32;
    const int32_t part = task & ((1 << heads.parts_log2) - 1);
    begin = min(((crew.rank << heads.parts_log2) + part) * share, num_units);
    end = min(begin + share, num_units);
  }
};

// What they weigh, by one warp.
__device__ inline uint64_t mass_of_entries(const Entries& entries, const int32_t* walk,
                                           const int16_t* lse, UnitMasses masses) {
  constexpr int kAtOnce = 4;
  const int32_t lane = threadIdx.x % 32;
#pragma unroll 1
  for (int32_t first = entries.begin + lane; first < entries.end; first += 32 * kAtOnce) {
    int16_t steps[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + 32 * i < entries.end) steps[i] = lse[walk[first + 32 * i]];
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + 32 * i < entries.end) masses.add(int32_t{steps[i]});
    }
  }
  return sum_of_warp(masses.mass);
}

// What comes after the entries of a task, by one warp: the sum of later tasks.
__device__ inline uint64_t mass_after(const Heads& heads, const Crew& crew, int32_t task) {
  const int32_t first = task >> heads.parts_log2 << heads.parts_log2;
  const int32_t own = (crew.rank << heads.parts_log2) + (task - first);
  uint64_t mass = 0;
#pragma unroll 1
  for (int32_t i = threadIdx.x % 32; i < crew.blocks() << heads.parts_log2; i += 32) {
    const int32_t rank = i & (crew.blocks() - 1), part = i >> crew.blocks_log2;
    if ((rank << heads.parts_log2) + part > own) mass += crew.slots[rank].mass[first + part];
  }
  return sum_of_warp(mass);
}

// What a head has left after each of them, by one warp: from the last to the first. The next ones
// are on their way while some are added up.
__device__ inline void write_rest_of(const Entries& entries, const int32_t* walk,
                                     const int16_t* lse, int32_t largest, const uint32_t* powers,
                                     uint64_t after, float* log_rest) {
  const int32_t lane = threadIdx.x % 32, length = entries.end - entries.begin;
  const auto steps_of = [&](uint64_t mass) { return guess_steps_of_mass(mass, powers); };
  int32_t entry = entries.begin + (length + 31) / 32 * 32 - 32 + lane;
  int16_t next = 0;
  if (entry < entries.end && length > 0) next = lse[walk[entry]];
#pragma unroll 1
  for (; entry - lane >= entries.begin; entry -= 32) {
    const int16_t steps = next;
    if (entry - lane > entries.begin) next = lse[walk[entry - 32]];
    UnitMasses masses = {powers, largest};
    if (entry < entries.end) masses.add(int32_t{steps});
    uint64_t from = masses.mass;  // of this entry and of those after it
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const uint64_t more = __shfl_down_sync(~0u, from, distance);
      if (lane + distance < 32) from += more;
    }
    if (entry < entries.end) {
      log_rest[entry] = log_of_rest(after + (from - masses.mass), largest, steps_of);
    }
    after += __shfl_sync(~0u, from, 0);
  }
}

// Of some query heads, whose largest units are known to all. The walk has to be written.
__device__ inline void write_rest(const OrderItem& item, int32_t num_units, const Heads& heads,
                                  const Crew& crew) {
  const GuidedParams& guided = item.guided;
  const int32_t* walk = guided.walk + int64_t{item.index} * guided.max_units;
  const auto rest_of = [&](int32_t head) {
    const int64_t row = int64_t{item.index} * guided.attention.group_size + heads.first + head;
    return guided.log_rest + row * guided.max_units;
  };
#pragma unroll 1
  for (int32_t task = threadIdx.x / 32; task < heads.tasks(); task += num_warps()) {
    const int32_t head = task >> heads.parts_log2;
    const UnitMasses none = {crew.shared.powers, largest_of(heads, crew, head)};
    const uint64_t mass = mass_of_entries(Entries(num_units, heads, crew, task), walk,
                                          item.lse_of(heads.first + head), none);
    crew.send(Meeting::kRest, crew.slots[crew.rank].mass[task], mass);
  }
  crew.meet(Meeting::kRest);
#pragma unroll 1
  for (int32_t task = threadIdx.x / 32; task < heads.tasks(); task += num_warps()) {
    const int32_t head = task >> heads.parts_log2;
    const uint64_t after = mass_after(heads, crew, task);
    write_rest_of(Entries(num_units, heads, crew, task), walk, item.lse_of(heads.first + head),
                  largest_of(heads, crew, head), crew.shared.powers, after, rest_of(head));
  }
#pragma unroll 1
  for (int32_t head = crew.rank; head < heads.count; head += crew.blocks()) {
    float* log_rest = rest_of(head);
    for (int32_t i = num_units + static_cast<int32_t>(threadIdx.x); i < guided.max_units;
         i += static_cast<int32_t>(blockDim.x)) {
      log_rest[i] = -INFINITY;
    }
  }
}

}  // namespace art::cuda::guided
