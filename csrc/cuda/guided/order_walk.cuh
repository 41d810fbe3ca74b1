// From the shares of units to the walk: pinned units, then the others by buckets, each in the order
// of units.
#pragma once

#include <cstdint>

#include "cuda/guided/order_crew.cuh"
#include "cuda/guided/order_totals.cuh"

namespace art::cuda::guided {

// The unpinned units of one warp.
struct WarpUnits {
  int32_t begin;
  int32_t end;

  __device__ explicit WarpUnits(const BlockUnits& mine) {
    const int32_t warp = threadIdx.x / 32;
    begin = min(mine.free_begin + warp * mine.warp_share, mine.free_end);
    end = min(begin + mine.warp_share, mine.free_end);
  }
};

// The best unit of all that are not pinned.
__device__ inline int32_t best_of(const Crew& crew) {
  int32_t best = INT32_MIN;
#pragma unroll 1
  for (int32_t i = threadIdx.x % 32; i < num_warps() << crew.blocks_log2; i += 32) {
    best = max(best, crew.slots[i & (crew.blocks() - 1)].best[i >> crew.blocks_log2]);
  }
  return __reduce_max_sync(~0u, best);
}

// How many units each warp has in each bucket.
__device__ inline void count_units(const BlockUnits& mine, const int32_t* scores, int32_t best,
                                   uint32_t (*count)[kNumBuckets]) {
  const WarpUnits units(mine);
  uint32_t* of_warp = count[threadIdx.x / 32];
#pragma unroll 2
  for (int32_t u = units.begin + static_cast<int32_t>(threadIdx.x % 32); u < units.end; u += 32) {
    atomicAdd(&of_warp[bucket_of(scores[u - mine.origin()], best)], 1u);
  }
}

// From counts to how many units of the thread block come before a warp's in each bucket. Tells
// everybody how many they are in all.
__device__ inline void send_counts(uint32_t (*count)[kNumBuckets], const Crew& crew) {
  const int32_t tid = static_cast<int32_t>(threadIdx.x);
  if (tid >= kNumBuckets / 4) return;
  uint4 sum = {0, 0, 0, 0};
#pragma unroll 1
  for (int32_t first = 0; first < num_warps(); first += kLeastOrderWarps) {
    uint4* const place = reinterpret_cast<uint4*>(count[first]) + tid;
    uint4 more[kLeastOrderWarps];
#pragma unroll
    for (int w = 0; w < kLeastOrderWarps; ++w) more[w] = place[w * kNumBuckets / 4];
#pragma unroll
    for (int w = 0; w < kLeastOrderWarps; ++w) {
      place[w * kNumBuckets / 4] = sum;
      sum.x += more[w].x, sum.y += more[w].y, sum.z += more[w].z, sum.w += more[w].w;
    }
  }
  uint4* slot = reinterpret_cast<uint4*>(crew.slots[crew.rank].count) + tid;
  if (!crew.is_cluster()) {
    *slot = sum;
    return;
  }
#pragma unroll 1
  for (int32_t to = 0; to < crew.blocks(); ++to) crew.send_to(to, Meeting::kCount, slot, sum);
}

// Adds up over the lanes before this one.
__device__ inline uint32_t sum_before(uint32_t sum) {
  const int32_t lane = threadIdx.x % 32;
  uint32_t until = sum;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t before = __shfl_up_sync(~0u, until, distance);
    if (lane >= distance) until += before;
  }
  return until - sum;
}

// Where the buckets begin, by one warp: eight of them a lane.
__device__ inline void place_buckets(int32_t num_pinned, const Crew& crew) {
  constexpr int kEach = kNumBuckets / 32;
  const int32_t first = static_cast<int32_t>(threadIdx.x % 32) * kEach;
  const uint32_t* own = crew.slots[crew.rank].count + first;
  uint32_t before[kEach] = {}, all[kEach] = {}, own_sum = 0, all_sum = 0;
#pragma unroll 1
  for (int32_t rank = 0; rank < crew.blocks(); ++rank) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const uint32_t count = crew.slots[rank].count[first + i];
      if (rank < crew.rank) before[i] += count;
      if (rank == crew.rank) own_sum += count;
      all[i] += count, all_sum += count;
    }
  }
  uint32_t here = sum_before(own_sum), position = num_pinned + sum_before(all_sum);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    crew.shared.first[first + i] = here;
    crew.shared.shift[first + i] = position + before[i] - here;
    here += own[i], position += all[i];
  }
}

// Puts every unit behind those of its bucket that come before it in the thread block.
__device__ inline void place_units(const BlockUnits& mine, const int32_t* scores, int32_t best,
                                   uint32_t (*count)[kNumBuckets], const Crew& crew,
                                   int32_t* order) {
  const WarpUnits units(mine);
  const int lane = threadIdx.x % 32;
  uint32_t* next = count[threadIdx.x / 32];
#pragma unroll 1
  for (int32_t first = units.begin; first < units.end; first += 32) {
    const int32_t unit = first + lane;
    const bool is_mine = unit < units.end;
    const int32_t bucket = is_mine ? bucket_of(scores[unit - mine.origin()], best) : kNumBuckets;
    const uint32_t alike = __match_any_sync(~0u, bucket);
    const uint32_t rank = __popc(alike & ((1u << lane) - 1));
    const uint32_t place = is_mine ? next[bucket] : 0;
    __syncwarp();  // all have read where the next goes
    if (is_mine) {
      order[crew.shared.first[bucket] + place + rank] = unit;
      if (rank == 0) next[bucket] = place + __popc(alike);
    }
    __syncwarp();
  }
}

// The thread block's units at their positions in the walk. Those of a bucket are neighbours there
// too.
__device__ inline void write_walk(const OrderItem& item, const GuidedUnits& units,
                                  const BlockUnits& mine, const int32_t* scores,
                                  const int32_t* order, int32_t best, const Crew& crew) {
  const GuidedParams& guided = item.guided;
  const int64_t row = int64_t{item.index} * guided.max_units;
  int32_t* walk = guided.walk + row;
  float* log_mass = guided.log_mass + row;
  const int32_t tid = static_cast<int32_t>(threadIdx.x), threads = static_cast<int32_t>(blockDim.x);
  const auto write = [&](int32_t position, int32_t unit, int32_t score) {
    walk[position] = unit;
    log_mass[position] = static_cast<float>(score) * kNatsPerStep;
  };
#pragma unroll 1
  for (int32_t i = tid; i < mine.num_free(); i += threads) {
    const int32_t unit = order[i], score = scores[unit - mine.origin()];
    write(i + crew.shared.shift[bucket_of(score, best)], unit, score);
  }
  const int32_t sinks = units.sink_end - units.begin, pinned = units.num_pinned();
#pragma unroll 1
  for (int32_t i = tid; i < pinned; i += threads) {
    const int32_t unit = i < sinks ? units.begin + i : units.recent_begin + (i - sinks);
    const int32_t vector = unit / kUnitsPerVector;
    if (vector >= mine.first_vector && vector < mine.end_vector) {
      write(i, unit, scores[unit - mine.origin()]);
    }
  }
}

// What follows the last entry.
__device__ inline void write_end(const OrderItem& item, const GuidedUnits& units,
                                 const Crew& crew) {
  const GuidedParams& guided = item.guided;
  const int64_t row = int64_t{item.index} * guided.max_units;
  const int32_t threads = static_cast<int32_t>(blockDim.x) << crew.blocks_log2;
  const int32_t tid = crew.rank * static_cast<int32_t>(blockDim.x) + threadIdx.x;
#pragma unroll 1
  for (int32_t i = units.num_units() + tid; i < guided.max_units; i += threads) {
    guided.walk[row + i] = -1;
    guided.log_mass[row + i] = -INFINITY;
  }
  if (tid == 0) {
    guided.walk_lens[item.index] = units.num_units();
    guided.num_pinned[item.index] = units.num_pinned();
  }
}

}  // namespace art::cuda::guided
