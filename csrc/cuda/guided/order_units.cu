// From the log-sum-exp of units to the walk: one thread block for each (sequence, KV head). All of
// it is done in integers, so neither the number of threads nor their order changes a bit.
#include <cstdint>
#include <cstring>

#include "cuda/guided/units.cuh"
#include "cuda/guided/workspace.h"
#include "cuda/sizes.h"

namespace art::cuda::guided {
namespace {

// Few units leave many threads without any, and more thread blocks fit without these.
constexpr int kFewWarps = 8;
constexpr int kManyWarps = 16;
constexpr int32_t kManyUnits = 1024;
constexpr int kMaxSharedUnits = 8192;  // longer orders go through global memory
constexpr int kMostHeads = 64;         // query heads that are added up together

template <int kWarps>
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

__device__ inline bool is_visible(const GuidedUnits& units, int32_t unit) {
  return unit >= units.begin && unit < units.end;
}

// The vectors of a head's units, and who takes which: warps share out heads, then parts of them.
// Several are on their way at a time. each(head) begins a head and returns what
// takes its units; finish(head, it) ends it.
template <int kWarps, class Each, class Finish>
__device__ void for_each_vector(const GuidedUnits& units, const int16_t* lse, int32_t stride,
                                int32_t heads, const Each& each, const Finish& finish) {
  constexpr int kAtOnce = kWarps > kFewWarps ? 4 : 2;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t parts = heads < kWarps ? kWarps / heads : 1;
  const int32_t begin = units.begin / kUnitsPerVector;
  const int32_t end = (units.end + kUnitsPerVector - 1) / kUnitsPerVector;
  for (int32_t task = warp; task < heads * parts; task += kWarps) {
    const int32_t head = task % heads, step = parts * 32;
    const int16_t* of_head = lse + int64_t{head} * stride;
    auto state = each(head);
    for (int32_t v = begin + task / heads * 32 + lane; v < end; v += kAtOnce * step) {
      UnitVector vectors[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (v + i * step < end)
          vectors[i] = UnitVector::load(of_head, (v + i * step) * kUnitsPerVector);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int32_t unit = (v + i * step) * kUnitsPerVector;
        const bool is_inside = unit >= units.begin && unit + kUnitsPerVector <= units.end;
#pragma unroll
        for (int j = 0; j < kUnitsPerVector; ++j) {
          if (is_inside || is_visible(units, unit + j)) state.add(vectors[i].steps[j]);
        }
      }
    }
    finish(head, state);
  }
}

struct LargestUnit {
  int32_t largest = kLeastSteps;

  __device__ void add(int16_t steps) { largest = max(largest, static_cast<int32_t>(steps)); }
};

// The largest unit of each head, if it is larger than what shared.largest has.
template <int kWarps>
__device__ void find_largest(const GuidedUnits& units, const int16_t* lse, int32_t stride,
                             int32_t heads, Shared<kWarps>& shared) {
  for_each_vector<kWarps>(
      units, lse, stride, heads, [&](int32_t) { return LargestUnit(); },
      [&](int32_t head, const LargestUnit& state) {
        const int32_t largest = __reduce_max_sync(~0u, state.largest);
        if (threadIdx.x % 32 == 0) atomicMax(&shared.largest[head], largest);
      });
}

struct UnitMasses {
  const uint32_t* powers;
  int32_t largest;
  unsigned long long mass = 0;

  // mass_below(), with its table where all lanes can read it at once.
  __device__ void add(int16_t steps) {
    const uint32_t below = largest - steps;
    if (below < 32 * 64) mass += powers[below % 64] >> below / 64;
  }
};

// What all units of each head weigh, relative to the largest.
template <int kWarps>
__device__ void add_masses(const GuidedUnits& units, const int16_t* lse, int32_t stride,
                           int32_t heads, Shared<kWarps>& shared) {
  for_each_vector<kWarps>(
      units, lse, stride, heads,
      [&](int32_t head) { return UnitMasses{shared.powers, shared.largest[head]}; },
      [&](int32_t head, const UnitMasses& state) {
        unsigned long long mass = state.mass;
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) {
          mass += __shfl_xor_sync(~0u, mass, distance);
        }
        if (threadIdx.x % 32 == 0) atomicAdd(&shared.mass[head], mass);
      });
}

// Log-sum-exp of all units, and of the sink, of some query heads.
template <int kWarps>
__device__ void find_totals(const GuidedParams& guided, const Target& target,
                            const GuidedUnits& units, const int16_t* lse, int32_t stride,
                            int32_t first_head, int32_t heads, Shared<kWarps>& shared) {
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
template <int kWarps>
__device__ void share_of_units(const GuidedUnits& units, const int16_t* lse, int32_t stride,
                               int32_t heads, bool is_first, const Shared<kWarps>& shared,
                               int32_t* scores) {
  const int32_t begin = units.begin / kUnitsPerVector;
  const int32_t end = (units.end + kUnitsPerVector - 1) / kUnitsPerVector;
  for (int32_t v = begin + static_cast<int32_t>(threadIdx.x); v < end; v += 32 * kWarps) {
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
template <int kWarps>
struct WarpUnits {
  int32_t begin;
  int32_t end;

  __device__ explicit WarpUnits(const GuidedUnits& units) {
    const int32_t all = units.recent_begin - units.sink_end;
    const int32_t share = (all + 32 * kWarps - 1) / (32 * kWarps) * 32;
    const int32_t first = static_cast<int32_t>(threadIdx.x) / 32 * share;
    begin = units.sink_end + (first < all ? first : all);
    end = units.sink_end + (first + share < all ? first + share : all);
  }
};

// How many units each warp has in each bucket.
template <int kWarps>
__device__ void count_units(const GuidedUnits& units, const int32_t* scores,
                            Shared<kWarps>& shared) {
  const WarpUnits<kWarps> mine(units);
  uint32_t* count = shared.count[threadIdx.x / 32];
  for (int32_t u = mine.begin + static_cast<int32_t>(threadIdx.x % 32); u < mine.end; u += 32) {
    atomicAdd(&count[bucket_of(scores[u - units.begin], shared.best)], 1u);
  }
}

// From counts to the position of each warp's first unit in each bucket: by bucket, then by warp.
template <int kWarps>
__device__ void place_buckets(int32_t first_position, Shared<kWarps>& shared) {
  const int tid = threadIdx.x, lane = tid % 32;
  uint32_t sum = 0, until = 0;
  if (tid < kNumBuckets) {
#pragma unroll 8
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
#pragma unroll 8
    for (int w = 0; w < kWarps; ++w) {
      const uint32_t count = shared.count[w][tid];
      shared.count[w][tid] = next;
      next += count;
    }
  }
  __syncthreads();
}

// Puts every unit behind those of its bucket that come before it.
template <int kWarps>
__device__ void place_units(const GuidedUnits& units, const int32_t* scores, int32_t* order,
                            Shared<kWarps>& shared) {
  const WarpUnits<kWarps> mine(units);
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
template <int kWarps>
__device__ void order_units(const GuidedUnits& units, const int32_t* scores, int32_t* order,
                            Shared<kWarps>& shared) {
  const int tid = threadIdx.x;
  const int32_t sinks = units.sink_end - units.begin, pinned = units.num_pinned();
  for (int32_t i = tid; i < pinned; i += 32 * kWarps) {
    order[i] = i < sinks ? units.begin + i : units.recent_begin + (i - sinks);
  }
  int32_t best = INT32_MIN;
  for (int32_t u = units.sink_end + tid; u < units.recent_begin; u += 32 * kWarps) {
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

template <int kWarps>
__device__ void write_walk(const GuidedParams& guided, const Target& target,
                           const GuidedUnits& units, const int32_t* scores, const int32_t* order) {
  const int64_t first = int64_t{target.index} * guided.max_units;
  const int32_t num_units = units.num_units();
  for (int32_t i = threadIdx.x; i < guided.max_units; i += 32 * kWarps) {
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
  constexpr int kEach = 4;
  const int lane = threadIdx.x % 32;
  const int32_t num_units = units.num_units();
  uint64_t after = 0;  // the mass of all that this pass has behind it
  for (int32_t first = max_units / (32 * kEach) * (32 * kEach); first >= 0; first -= 32 * kEach) {
    const int32_t begin = first + lane * kEach;
    uint64_t from[kEach];  // the mass of this entry and of the lane's after it
    UnitMasses masses = {powers, largest};
#pragma unroll
    for (int i = kEach - 1; i >= 0; --i) {
      if (begin + i < num_units) masses.add(lse[order[begin + i]]);
      from[i] = masses.mass;
    }
    uint64_t sum = masses.mass;
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

template <int kWarps>
__device__ void write_rest(const GuidedParams& guided, const Target& target,
                           const GuidedUnits& units, const Workspace& space, const int32_t* order,
                           Shared<kWarps>& shared) {
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

template <int kWarps>
__global__ void __launch_bounds__(32 * kWarps, kWarps == kFewWarps ? 3 : 1)
    order_kernel(const __grid_constant__ GuidedParams guided, const Workspace space) {
  __shared__ Shared<kWarps> shared;
  extern __shared__ __align__(16) unsigned char memory[];
  const int tid = threadIdx.x;
  const Target target(guided, static_cast<int32_t>(blockIdx.x));
  const GuidedUnits units(target.visible);
  int32_t* scores = space.order == nullptr
                        ? reinterpret_cast<int32_t*>(memory)
                        : space.order + int64_t{target.index} * 2 * guided.max_units;
  int32_t* order = scores + guided.max_units;
  for (int i = tid; i < kWarps * kNumBuckets; i += 32 * kWarps) (&shared.count[0][0])[i] = 0;
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
  write_walk<kWarps>(guided, target, units, scores, order);
  if (guided.log_rest != nullptr) write_rest(guided, target, units, space, order, shared);
}

}  // namespace

bool orders_in_shared_memory(const GuidedParams& params) {
  return params.max_units <= kMaxSharedUnits;
}

namespace {

template <int kWarps>
cudaError_t launch(const GuidedParams& params, const Workspace& space, cudaStream_t stream) {
  const size_t bytes = orders_in_shared_memory(params) ? 2 * sizeof(int32_t) * params.max_units : 0;
  constexpr size_t kDefaultBytes = 48 << 10;  // that need no permission
  if (bytes + sizeof(Shared<kWarps>) > kDefaultBytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(order_kernel<kWarps>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(2 * sizeof(int32_t) * kMaxSharedUnits));
    if (error != cudaSuccess) return error;
  }
  const unsigned items = static_cast<unsigned>(num_items(params.attention));
  order_kernel<kWarps><<<items, 32 * kWarps, bytes, stream>>>(params, space);
  return cudaGetLastError();
}

}  // namespace

cudaError_t order_units(const GuidedParams& params, const Workspace& space, cudaStream_t stream) {
  return params.max_units > kManyUnits ? launch<kManyWarps>(params, space, stream)
                                       : launch<kFewWarps>(params, space, stream);
}

}  // namespace art::cuda::guided
