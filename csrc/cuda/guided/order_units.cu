// From the log-sum-exp of units to the walk: one thread block for each (sequence, KV head). All of
// it is done in integers, so neither the number of threads nor their order changes a bit.
#include <algorithm>
#include <cstdint>

#include "cuda/guided/units.cuh"
#include "cuda/guided/workspace.h"
#include "cuda/sizes.h"

namespace art::cuda::guided {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxSharedUnits = 8192;  // longer orders go through global memory
constexpr int kMostHeads = 64;         // query heads that are added up together

struct Shared {
  uint32_t count[kWarps][kNumBuckets];  // units of a warp's part, then where the next of them goes
  unsigned long long mass[kMostHeads];
  int32_t largest[kMostHeads];
  int32_t total[kMostHeads];
  uint32_t powers[64];
  uint32_t before[kNumBuckets / 32];
  int32_t best;
};

// Eight units of one query head. What is not visible is whatever was in memory.
struct UnitVector {
  int16_t steps[kUnitsPerVector];

  __device__ static UnitVector load(const int16_t* lse, int32_t first_unit) {
    UnitVector result;
    const uint4 words = *reinterpret_cast<const uint4*>(lse + first_unit);
    memcpy(result.steps, &words, sizeof(words));
    return result;
  }
};

// The vectors of a head's units, and who takes which: warps share out heads, then parts of them.
template <class Each>
__device__ void for_each_vector(const GuidedUnits& units, int32_t heads, const Each& each) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t parts = heads < kWarps ? kWarps / heads : 1;
  const int32_t begin = units.begin / kUnitsPerVector;
  const int32_t end = (units.end + kUnitsPerVector - 1) / kUnitsPerVector;
  for (int32_t task = warp; task < heads * parts; task += kWarps) {
    const int32_t head = task % heads;
    each(head, begin + task / heads * 32 + lane, end, parts * 32);
  }
}

__device__ inline bool is_visible(const GuidedUnits& units, int32_t unit) {
  return unit >= units.begin && unit < units.end;
}

// The largest unit of each head, if it is larger than what shared.largest has.
__device__ void find_largest(const GuidedUnits& units, const int16_t* lse, int32_t stride,
                             int32_t heads, Shared& shared) {
  for_each_vector(units, heads, [&](int32_t head, int32_t first, int32_t end, int32_t step) {
    int32_t largest = kLeastSteps;
    for (int32_t v = first; v < end; v += step) {
      const auto vector = UnitVector::load(lse + int64_t{head} * stride, v * kUnitsPerVector);
#pragma unroll
      for (int i = 0; i < kUnitsPerVector; ++i) {
        if (!is_visible(units, v * kUnitsPerVector + i)) continue;
        largest = max(largest, static_cast<int32_t>(vector.steps[i]));
      }
    }
    largest = __reduce_max_sync(~0u, largest);
    if (threadIdx.x % 32 == 0) atomicMax(&shared.largest[head], largest);
  });
}

// What all units of each head weigh, relative to the largest.
__device__ void add_masses(const GuidedUnits& units, const int16_t* lse, int32_t stride,
                           int32_t heads, Shared& shared) {
  for_each_vector(units, heads, [&](int32_t head, int32_t first, int32_t end, int32_t step) {
    const int32_t largest = shared.largest[head];
    unsigned long long mass = 0;
    for (int32_t v = first; v < end; v += step) {
      const auto vector = UnitVector::load(lse + int64_t{head} * stride, v * kUnitsPerVector);
#pragma unroll
      for (int i = 0; i < kUnitsPerVector; ++i) {
        if (!is_visible(units, v * kUnitsPerVector + i)) continue;
        // mass_below(), with its table where all lanes can read it at once.
        const uint32_t below = largest - vector.steps[i];
        if (below < 32 * 64) mass += shared.powers[below % 64] >> below / 64;
      }
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      mass += __shfl_xor_sync(~0u, mass, distance);
    }
    if (threadIdx.x % 32 == 0) atomicAdd(&shared.mass[head], mass);
  });
}

// Log-sum-exp of all units, and of the sink, of some query heads.
__device__ void find_totals(const GuidedParams& guided, const Target& target,
                            const GuidedUnits& units, const int16_t* lse, int32_t stride,
                            int32_t first_head, int32_t heads, Shared& shared) {
  const float* sinks = guided.attention.attn_sinks;
  const int tid = threadIdx.x;
  int32_t sink = kLeastSteps;
  if (tid < heads) {
    const int32_t head = target.kv_head * guided.attention.group_size + first_head + tid;
    if (sinks != nullptr) sink = quantise_steps(sinks[head] * kStepsPerNat);
    shared.largest[tid] = sink;
    shared.mass[tid] = 0;
  }
  __syncthreads();
  find_largest(units, lse, stride, heads, shared);
  __syncthreads();
  add_masses(units, lse, stride, heads, shared);
  __syncthreads();
  if (tid < heads) {
    const int32_t largest = shared.largest[tid];
    uint64_t mass = shared.mass[tid];
    if (sinks != nullptr) mass += mass_below(largest - sink);
    shared.total[tid] = largest + steps_of_mass(mass);
  }
  __syncthreads();
}

// The largest share of each unit over some query heads; keeps what other heads have found.
__device__ void share_of_units(const GuidedUnits& units, const int16_t* lse, int32_t stride,
                               int32_t heads, bool is_first, const Shared& shared,
                               int32_t* scores) {
  const int32_t begin = units.begin / kUnitsPerVector;
  const int32_t end = (units.end + kUnitsPerVector - 1) / kUnitsPerVector;
  for (int32_t v = begin + static_cast<int32_t>(threadIdx.x); v < end; v += kThreads) {
    int32_t best[kUnitsPerVector];
#pragma unroll
    for (int i = 0; i < kUnitsPerVector; ++i) {
      const int32_t unit = v * kUnitsPerVector + i;
      best[i] = INT32_MIN;
      if (!is_first && is_visible(units, unit)) best[i] = scores[unit - units.begin];
    }
#pragma unroll 4
    for (int32_t head = 0; head < heads; ++head) {
      const auto vector = UnitVector::load(lse + int64_t{head} * stride, v * kUnitsPerVector);
#pragma unroll
      for (int i = 0; i < kUnitsPerVector; ++i) {
        best[i] = max(best[i], vector.steps[i] - shared.total[head]);
      }
    }
#pragma unroll
    for (int i = 0; i < kUnitsPerVector; ++i) {
      const int32_t unit = v * kUnitsPerVector + i;
      if (is_visible(units, unit)) scores[unit - units.begin] = best[i];
    }
  }
}

// The unpinned units of one warp: neighbours, so that warps and lanes are in the order of units.
struct WarpUnits {
  int32_t begin;
  int32_t end;

  __device__ explicit WarpUnits(const GuidedUnits& units) {
    const int32_t all = units.recent_begin - units.sink_end;
    const int32_t share = (all + kThreads - 1) / kThreads * 32;
    const int32_t first = static_cast<int32_t>(threadIdx.x) / 32 * share;
    begin = units.sink_end + (first < all ? first : all);
    end = units.sink_end + (first + share < all ? first + share : all);
  }
};

// How many units each warp has in each bucket.
__device__ void count_units(const GuidedUnits& units, const int32_t* scores, Shared& shared) {
  const WarpUnits mine(units);
  uint32_t* count = shared.count[threadIdx.x / 32];
  for (int32_t u = mine.begin + static_cast<int32_t>(threadIdx.x % 32); u < mine.end; u += 32) {
    atomicAdd(&count[bucket_of(scores[u - units.begin], shared.best)], 1u);
  }
}

// From counts to the position of each warp's first unit in each bucket: by bucket, then by warp.
__device__ void place_buckets(int32_t first_position, Shared& shared) {
  const int tid = threadIdx.x, lane = tid % 32;
  uint32_t sum = 0, until = 0;
  if (tid < kNumBuckets) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared.count[w][tid];
    until = sum;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const uint32_t before = __shfl_up_sync(~0u, until, distance);
      if (lane >= distance) until += before;
    }
    if (lane == 31) shared.before[tid / 32] = until;
  }
  __syncthreads();
  if (tid < kNumBuckets) {
    uint32_t next = first_position + until - sum;
    for (int w = 0; w < tid / 32; ++w) next += shared.before[w];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const uint32_t count = shared.count[w][tid];
      shared.count[w][tid] = next;
      next += count;
    }
  }
  __syncthreads();
}

// Puts every unit behind those of its bucket that come before it.
__device__ void place_units(const GuidedUnits& units, const int32_t* scores, int32_t* order,
                            Shared& shared) {
  const WarpUnits mine(units);
  const int lane = threadIdx.x % 32;
  uint32_t* next = shared.count[threadIdx.x / 32];
  for (int32_t first = mine.begin; first < mine.end; first += 32) {
    const int32_t unit = first + lane;
    const bool is_mine = unit < mine.end;
    const int32_t bucket =
        is_mine ? bucket_of(scores[unit - units.begin], shared.best) : kNumBuckets;
    const uint32_t alike = __match_any_sync(~0u, bucket);
    const uint32_t rank = __popc(alike & ((1u << lane) - 1));
    const uint32_t position = is_mine ? next[bucket] : 0;
    __syncwarp();  // all have read where the next goes
    if (is_mine) {
      order[position + rank] = unit;
      if (rank == 0) next[bucket] = position + __popc(alike);
    }
    __syncwarp();
  }
}

// Pinned units, then the others by buckets.
__device__ void order_units(const GuidedUnits& units, const int32_t* scores, int32_t* order,
                            Shared& shared) {
  const int tid = threadIdx.x;
  const int32_t sinks = units.sink_end - units.begin, pinned = units.num_pinned();
  for (int32_t i = tid; i < pinned; i += kThreads) {
    order[i] = i < sinks ? units.begin + i : units.recent_begin + (i - sinks);
  }
  int32_t best = INT32_MIN;
  for (int32_t u = units.sink_end + tid; u < units.recent_begin; u += kThreads) {
    best = max(best, scores[u - units.begin]);
  }
  best = __reduce_max_sync(~0u, best);
  if (tid % 32 == 0) atomicMax(&shared.best, best);
  __syncthreads();
  count_units(units, scores, shared);
  __syncthreads();
  place_buckets(pinned, shared);
  place_units(units, scores, order, shared);
  __syncthreads();
}

__device__ void write_walk(const GuidedParams& guided, const Target& target,
                           const GuidedUnits& units, const int32_t* scores, const int32_t* order) {
  const int64_t first = int64_t{target.index} * guided.max_units;
  const int32_t num_units = units.num_units();
  for (int32_t i = threadIdx.x; i < guided.max_units; i += kThreads) {
    const int32_t unit = i < num_units ? order[i] : -1;
    guided.walk[first + i] = unit;
    guided.log_mass[first + i] =
        i < num_units ? static_cast<float>(scores[unit - units.begin]) * kNatsPerStep : -INFINITY;
  }
  if (threadIdx.x == 0) {
    guided.walk_lens[target.index] = num_units;
    guided.num_pinned[target.index] = units.num_pinned();
  }
}

// What one query head has left after each entry of the walk, by one warp: from the last entry to
// the first, kEach neighbours a lane at a time.
__device__ void write_rest_of_head(const GuidedUnits& units, const int16_t* lse, int32_t largest,
                                   const int32_t* order, const uint32_t* powers, int32_t max_units,
                                   float* log_rest) {
  constexpr int kEach = 8;
  const int lane = threadIdx.x % 32;
  const int32_t num_units = units.num_units();
  uint64_t after = 0;  // the mass of all that this pass has behind it
  for (int32_t first = max_units / (32 * kEach) * (32 * kEach); first >= 0; first -= 32 * kEach) {
    const int32_t begin = first + lane * kEach;
    uint64_t from[kEach];  // the mass of this entry and of the lane's after it
    uint64_t sum = 0;
#pragma unroll
    for (int i = kEach - 1; i >= 0; --i) {
      if (begin + i < num_units) {
        const uint32_t below = largest - lse[order[begin + i]];
        if (below < 32 * 64) sum += powers[below % 64] >> below / 64;
      }
      from[i] = sum;
    }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const uint64_t more = __shfl_down_sync(~0u, sum, distance);
      if (lane + distance < 32) sum += more;
    }
    const uint64_t next_lanes = __shfl_down_sync(~0u, sum, 1);
    const uint64_t behind = after + (lane == 31 ? 0 : next_lanes);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (begin + i >= max_units) break;
      const uint64_t left = behind + (i + 1 < kEach ? from[i + 1] : 0);
      log_rest[begin + i] = begin + i < num_units ? log_of_rest(left, largest) : -INFINITY;
    }
    after += __shfl_sync(~0u, sum, 0);
  }
}

__device__ void write_rest(const GuidedParams& guided, const Target& target,
                           const GuidedUnits& units, const Workspace& space, const int32_t* order,
                           Shared& shared) {
  const int32_t group_size = guided.attention.group_size;
  for (int32_t first = 0; first < group_size; first += kMostHeads) {
    const int32_t left = group_size - first, heads = left < kMostHeads ? left : kMostHeads;
    const int64_t row = int64_t{target.index} * group_size + first;
    const int16_t* lse = space.unit_lse + row * space.unit_stride;
    __syncthreads();
    if (static_cast<int32_t>(threadIdx.x) < heads) shared.largest[threadIdx.x] = kLeastSteps;
    __syncthreads();
    find_largest(units, lse, space.unit_stride, heads, shared);
    __syncthreads();
    for (int32_t head = static_cast<int32_t>(threadIdx.x) / 32; head < heads; head += kWarps) {
      write_rest_of_head(units, lse + int64_t{head} * space.unit_stride, shared.largest[head],
                         order, shared.powers, guided.max_units,
                         guided.log_rest + (row + head) * guided.max_units);
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    order_kernel(const __grid_constant__ GuidedParams guided, const Workspace space) {
  __shared__ Shared shared;
  extern __shared__ __align__(16) unsigned char memory[];
  const int tid = threadIdx.x;
  const Target target(guided, static_cast<int32_t>(blockIdx.x));
  const GuidedUnits units(target.visible);
  int32_t* scores = space.order == nullptr
                        ? reinterpret_cast<int32_t*>(memory)
                        : space.order + int64_t{target.index} * 2 * guided.max_units;
  int32_t* order = scores + guided.max_units;
  for (int i = tid; i < kWarps * kNumBuckets; i += kThreads) (&shared.count[0][0])[i] = 0;
  if (tid < 64) shared.powers[tid] = power_of_fraction(tid);
  if (tid == 0) shared.best = INT32_MIN;
  __syncthreads();
  if (units.num_units() > 0) {
    const int32_t group_size = guided.attention.group_size;
    const int16_t* lse = space.unit_lse + int64_t{target.index} * group_size * space.unit_stride;
    for (int32_t first = 0; first < group_size; first += kMostHeads) {
      const int32_t left = group_size - first, heads = left < kMostHeads ? left : kMostHeads;
      const int16_t* of_heads = lse + int64_t{first} * space.unit_stride;
      find_totals(guided, target, units, of_heads, space.unit_stride, first, heads, shared);
      share_of_units(units, of_heads, space.unit_stride, heads, first == 0, shared, scores);
      __syncthreads();
    }
    order_units(units, scores, order, shared);
  }
  write_walk(guided, target, units, scores, order);
  if (guided.log_rest != nullptr) write_rest(guided, target, units, space, order, shared);
}

}  // namespace

bool orders_in_shared_memory(const GuidedParams& params) {
  return params.max_units <= kMaxSharedUnits;
}

cudaError_t order_units(const GuidedParams& params, const Workspace& space, cudaStream_t stream) {
  const size_t bytes = orders_in_shared_memory(params) ? 2 * sizeof(int32_t) * params.max_units : 0;
  constexpr size_t kDefaultBytes = 48 << 10;  // that need no permission
  if (bytes + sizeof(Shared) > kDefaultBytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(order_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(2 * sizeof(int32_t) * kMaxSharedUnits));
    if (error != cudaSuccess) return error;
  }
  const unsigned items = static_cast<unsigned>(num_items(params.attention));
  order_kernel<<<items, kThreads, bytes, stream>>>(params, space);
  return cudaGetLastError();
}

}  // namespace art::cuda::guided
