// From the log-sum-exp of units to the walk: one thread block for each (sequence, KV head), or a
// cluster of them. All of it is done in integers, so neither their number nor their order changes a
// bit.
#include <cstdint>

#include "core/schedule.h"
#include "cuda/decode_attention.h"
#include "cuda/device.h"
#include "cuda/early_start.h"
#include "cuda/guided/order_crew.cuh"
#include "cuda/guided/order_rest.cuh"
#include "cuda/guided/order_totals.cuh"
#include "cuda/guided/order_walk.cuh"
#include "cuda/guided/units.cuh"
#include "cuda/guided/workspace.h"
#include "cuda/sizes.h"

namespace art::cuda::guided {
namespace {

constexpr int32_t kMaxSharedUnits = 8192;  // of a thread block; more go through global memory

constexpr int kCrewSizes = 3;  // above one: 2, 4 and 8 thread blocks

// What a thread block has in shared memory.
struct OrderLayout {
  int32_t warps;
  int32_t blocks_log2;
  int32_t parts_log2;    // see Heads
  int32_t shared_units;  // 0: scores and order are in global memory

  ART_HD size_t slots_at() const { return sizeof(OrderShared); }
  ART_HD size_t counts_at() const { return slots_at() + (sizeof(Slots) << blocks_log2); }
  ART_HD size_t units_at() const {
    return counts_at() + size_t{sizeof(uint32_t)} * kNumBuckets * warps;
  }
  ART_HD size_t bytes() const { return units_at() + size_t{2 * sizeof(int32_t)} * shared_units; }
};
static_assert(sizeof(OrderShared) % 16 == 0 && sizeof(Slots) % 16 == 0);

// The totals of all heads, and the shares; returns the thread's best.
__device__ int32_t score_units(const OrderItem& item, const GuidedUnits& units,
                               const BlockUnits& mine, int32_t parts_log2, const Crew& crew,
                               int32_t* scores) {
  int32_t best = INT32_MIN;
#pragma unroll 1
  for (int32_t first = 0; first < item.guided.attention.group_size; first += kMostHeads) {
    const Heads heads(item.guided, first, parts_log2);
    find_totals(item, units, mine, heads, crew);
    best = share_of_units(item, mine, heads, crew.shared.total, scores);
  }
  return best;
}

__device__ void write_rests(const OrderItem& item, const GuidedUnits& units, const BlockUnits& mine,
                            int32_t parts_log2, const Crew& crew) {
  const int32_t group_size = item.guided.attention.group_size;
#pragma unroll 1
  for (int32_t first = 0; first < group_size; first += kMostHeads) {
    crew.finish_together();  // all of the walk is there, and nobody needs the slots any more
    const Heads heads(item.guided, first, parts_log2);
    if (group_size > kMostHeads) {
      send_largest(item, units, mine, heads, crew);
      __syncthreads();
    }
    write_rest(item, units.num_units(), heads, crew);
  }
}

template <bool kInSharedMemory>
__global__ void __launch_bounds__(32 * kMaxOrderWarps, 2)
    order_kernel(const __grid_constant__ GuidedParams guided,
                 const __grid_constant__ Workspace space,
                 const __grid_constant__ OrderLayout layout) {
  extern __shared__ __align__(16) unsigned char memory[];
  OrderShared& shared = *reinterpret_cast<OrderShared*>(memory);
  const Crew crew(layout.blocks_log2, shared, reinterpret_cast<Slots*>(memory + layout.slots_at()));
  const auto count = reinterpret_cast<uint32_t (*)[kNumBuckets]>(memory + layout.counts_at());
  const int tid = threadIdx.x;
  const OrderItem item(guided, space, static_cast<int32_t>(blockIdx.x >> layout.blocks_log2));
  if (tid == 0) {
    crew.init(Heads(guided, 0, layout.parts_log2).tasks(), num_warps());
    shared.units = GuidedUnits(visible_of(guided.attention, item.index));
    shared.mine = BlockUnits(shared.units, crew.rank, crew.blocks_log2);
  }
  if (tid < 64) shared.powers[tid] = power_of_fraction(tid);
#pragma unroll 1
  for (int i = tid; i < kNumBuckets / 4 * num_warps(); i += blockDim.x) {
    reinterpret_cast<uint4*>(count)[i] = {0, 0, 0, 0};
  }
  __syncthreads();
  crew.arrive();
  const GuidedUnits& units = shared.units;
  const BlockUnits& mine = shared.mine;
  crew.wait_for_all();
  wait_for_kernel_before();
  let_next_kernel_start();

  int32_t* scores = reinterpret_cast<int32_t*>(memory + layout.units_at());
  int32_t* order = scores + layout.shared_units;
  if constexpr (!kInSharedMemory) {
    scores = space.order + int64_t{item.index} * 2 * space.unit_stride +
             (mine.first_vector - units.begin / kUnitsPerVector) * kUnitsPerVector;
    order = scores + space.unit_stride;
  }
  if (units.num_units() > 0) {
    int32_t best = score_units(item, units, mine, layout.parts_log2, crew, scores);
    best = __reduce_max_sync(~0u, best);
    crew.send(Meeting::kBest, crew.slots[crew.rank].best[tid / 32], best);
    crew.meet_together(Meeting::kBest);
    best = best_of(crew);
    count_units(mine, scores, best, count);
    __syncthreads();
    send_counts(count, crew);
    crew.meet(Meeting::kCount);
    if (tid < 32) place_buckets(units.num_pinned(), crew);
    __syncthreads();
    place_units(mine, scores, best, count, crew, order);
    __syncthreads();
    write_walk(item, units, mine, scores, order, best, crew);
  }
  write_end(item, units, crew);
  if (guided.log_rest != nullptr) write_rests(item, units, mine, layout.parts_log2, crew);
}

cudaLaunchConfig_t configure(const OrderLayout& layout, int64_t items, cudaStream_t stream,
                             cudaLaunchAttribute& cluster) {
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = 1u << layout.blocks_log2;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(items) << layout.blocks_log2);
  config.blockDim = dim3(32 * layout.warps);
  config.dynamicSmemBytes = layout.bytes();
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return config;
}

struct Device {
  int32_t multiprocessors;
  int32_t max_clusters[kCrewSizes];  // of 2, 4 and 8 thread blocks that are resident at once
};

// Lets a kernel have the shared memory that the largest thread blocks need, and counts clusters.
template <bool kInSharedMemory>
cudaError_t prepare(int32_t blocks_log2, int* clusters) {
  const auto kernel = order_kernel<kInSharedMemory>;
  const OrderLayout largest = {kMaxOrderWarps, blocks_log2, 0,
                               kInSharedMemory ? kMaxSharedUnits : 0};
  *clusters = 0;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(largest.bytes()));
  }
  // Compiled for an older architecture, the kernel knows no clusters.
  if (error != cudaSuccess || blocks_log2 == 0 || attributes.ptxVersion < 90) return error;
  cudaLaunchAttribute cluster = {};
  const cudaLaunchConfig_t config = configure(largest, 1, nullptr, cluster);
  return cudaOccupancyMaxActiveClusters(clusters, kernel, &config);
}

// Asked once for each GPU.
cudaError_t look_at(Device* device) {
  static ResidencyCache<kCrewSizes> cache;
  *device = {};
  for (int i = 0; i < kCrewSizes; ++i) {
    Residency residency;
    const cudaError_t error = cache.get(
        i,
        [i](int* clusters) {
          int of_other = 0;
          const cudaError_t failure = prepare<false>(i + 1, &of_other);
          return failure == cudaSuccess ? prepare<true>(i + 1, clusters) : failure;
        },
        &residency);
    if (error != cudaSuccess) return error;
    device->multiprocessors = residency.multiprocessors;
    device->max_clusters[i] = newest_kernels() >= 90 ? residency.blocks : 0;
  }
  return cudaSuccess;
}

// num_splits other than 0 sets the thread blocks per item, rounded down to a cluster's size.
OrderLayout plan(const GuidedParams& params, int64_t num_splits, const Device& device) {
  const int64_t items = num_items(params.attention);
  OrderLayout layout = {};
  if (params.attention.group_size > kMostHeads) {
    layout.blocks_log2 = 0;  // a crew meets once
  } else if (num_splits == 0) {
    layout.blocks_log2 = order_crew_log2(items, params.max_units, device.max_clusters);
  } else {
    for (int i = 0; i < kCrewSizes; ++i) {
      if ((2 << i) <= num_splits && device.max_clusters[i] > 0) layout.blocks_log2 = i + 1;
    }
  }
  const int32_t vectors = (params.max_units + kUnitsPerVector - 1) / kUnitsPerVector;
  const int32_t share = ((vectors - 1) >> layout.blocks_log2) + 1;
  layout.warps = order_warps(items << layout.blocks_log2, int64_t{share} * kUnitsPerVector,
                             params.attention.group_size, device.multiprocessors);
  while (params.attention.group_size << (layout.parts_log2 + 1) <= layout.warps) {
    ++layout.parts_log2;
  }
  const int32_t units = share * kUnitsPerVector;
  layout.shared_units = units <= kMaxSharedUnits ? units : 0;
  return layout;
}

template <bool kInSharedMemory>
cudaError_t launch(const GuidedParams& params, const Workspace& space, const OrderLayout& layout,
                   bool has_clusters, cudaStream_t stream) {
  cudaLaunchAttribute attributes[2] = {{}, early_start()};
  cudaLaunchConfig_t config = configure(layout, num_items(params.attention), stream, attributes[0]);
  config.numAttrs = has_clusters ? 2 : 0;  // older GPUs know neither
  return cudaLaunchKernelEx(&config, order_kernel<kInSharedMemory>, params, space, layout);
}

}  // namespace

bool orders_in_shared_memory(const GuidedParams& params) {
  return params.max_units <= kMaxSharedUnits;
}

cudaError_t order_units(const GuidedParams& params, const Workspace& space, int64_t num_splits,
                        cudaStream_t stream) {
  Device device;
  const cudaError_t error = look_at(&device);
  if (error != cudaSuccess) return error;
  const OrderLayout layout = plan(params, num_splits, device);
  const bool has_clusters = device.max_clusters[0] > 0;
  return layout.shared_units > 0 ? launch<true>(params, space, layout, has_clusters, stream)
                                 : launch<false>(params, space, layout, has_clusters, stream);
}

}  // namespace art::cuda::guided
