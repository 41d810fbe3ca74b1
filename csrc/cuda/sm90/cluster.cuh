// A cluster of thread blocks per item: for batches that do not fill the device. How their results
// come together is told in exchange.cuh. What a step's result is, and how it is folded and judged,
// does not depend on who computed it: neither bits nor decisions depend on the size of the cluster.
#pragma once

#include "cuda/sm90/folder.cuh"
#include "cuda/sm90/judge.cuh"
#include "cuda/sm90/kernel.cuh"
#include "cuda/sm90/weigher.cuh"
#include "cuda/sm90/worker.cuh"

namespace art::cuda::sm90 {

constexpr int kMaxSharedBytes = 227 << 10;  // of a thread block

template <class T, int kDim, int kHeadTiles>
struct ClusterShared {
  static constexpr int kWorkers = num_cluster_workers(kDim);
  static constexpr int kStages = num_cluster_stages(kDim);
  static constexpr int kProducers = num_cluster_producers(kDim);
  static_assert(kWorkers <= kMaxComputingWarps && kWorkers % kProducers == 0);
  Stages<kDim, kStages> stages;
  QueryTile<T, kDim, kHeadTiles> query;
  Item item;
  ExchangeShared<kDim, kHeadTiles> exchange;
};

// What is left of the shared memory for an ExchangeLayout.
template <class T, int kDim, int kHeadTiles>
constexpr int kExchangeBytes =
    (kMaxSharedBytes - kSharedAlignment - int{sizeof(ClusterShared<T, kDim, kHeadTiles>)}) / 16 *
    16;

// The computing warps, the folding ones, one that judges, one that weighs steps, and the producing
// ones. Every fourth warp shares a scheduler. In clusters of eight without a criterion nobody
// judges and one warp folds; the one that weighs, which then has the most to do, is not on its
// scheduler.
template <int kDim>
constexpr int kClusterThreads =
    32 * (num_cluster_workers(kDim) + kFolders + 2 + num_cluster_producers(kDim));

template <class T, int kDim, int kHeadTiles, bool kRests>
__global__ void __launch_bounds__(kClusterThreads<kDim>, 1)
    cluster_kernel(const __grid_constant__ DecodeParams params,
                   const __grid_constant__ ListedWalks walks, const __grid_constant__ Maps maps,
                   const __grid_constant__ ClusterPlan plan) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  __trap();
#else
  using Shared = ClusterShared<T, kDim, kHeadTiles>;
  constexpr int kWorkers = Shared::kWorkers, kJudge = kWorkers + kFolders;
  constexpr int kWeigher = kJudge + 1, kFirstProducer = kJudge + 2;
  extern __shared__ unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared*>(aligned(memory));
  const Exchange exchange(plan, reinterpret_cast<unsigned char*>(&shared + 1));
  const int32_t rank = cluster_rank(), index = blockIdx.x >> plan.blocks_log2;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // Several warps get ready side by side; each of these takes a good part of a microsecond.
  if (warp == kWeigher) {
    shared.exchange.init();
    fence_barrier_init();
  } else if (warp == kFirstProducer && lane == 0) {
    shared.stages.init();
    fence_barrier_init();
    prefetch_map(&maps.key);
    prefetch_map(&maps.value);
  }
  wait_for_kernel_before();
  if (warp == kJudge) {
    // In shared memory, because the computing warps have no registers to spare for it.
    if (lane == 0) shared.item = find_item(params, walks, index);
  } else if (warp < kJudge) {
    const int32_t batch = index / params.num_kv_heads, kv_head = index % params.num_kv_heads;
    shared.query.load(params, batch, kv_head * params.group_size, params.group_size, threadIdx.x,
                      32 * kJudge);
  }
  __syncthreads();
  const Item& item = shared.item;
  cluster_arrive_relaxed();
  // Own tiles can be on their way before the others have started.
  if (warp >= kFirstProducer) {
    const int number = warp - kFirstProducer;
    if (number < plan.producers) {
      produce(params, maps, item, shared.stages, plan.producers, number, rank, plan.blocks(),
              [&] { return shared.exchange.stop != 0; });
    }
    __syncwarp();
    cluster_wait();
    cluster_arrive();
    cluster_wait();
    return;
  }
  cluster_wait();

  if (warp < kWorkers) {
    Worker<kDim, kHeadTiles> worker(params, plan, exchange, shared.exchange);
    Consumer<T, kDim, kHeadTiles, kWorkers, Shared::kStages> consumer(params, shared.stages,
                                                                      shared.query);
    const int32_t sent = worker.run(consumer, item);
    if (lane < plan.blocks()) {
      send_word(remote_address(&shared.exchange.sent_steps[rank][warp], lane), sent);
    }
    __syncwarp();
    cluster_arrive();
    cluster_wait();
  } else if (warp < kJudge) {
    Folder<T, kDim, kHeadTiles, kRests> folder(params, walks, plan, exchange, shared.exchange, item,
                                               rank, warp - kWorkers);
    if (folder.has_work()) folder.run();
    __syncwarp();
    cluster_arrive();
    if (folder.has_work()) folder.write_result();
    __syncwarp();
    cluster_wait();
  } else if (warp == kJudge) {
    Judge<kDim, kHeadTiles, kRests> judge(params, plan, exchange, shared.exchange, item, rank);
    if (may_stop(params)) judge.run();
    __syncwarp();
    cluster_arrive();
    if (rank == 0) judge.write_result(index);
    __syncwarp();
    cluster_wait();
    if (may_stop(params)) judge.drain();
  } else {
    Weigher<kDim, kHeadTiles> weigher(plan, exchange, shared.exchange, item, rank);
    if (rank < num_slices(kDim)) weigher.run();
    __syncwarp();
    cluster_arrive();
    cluster_wait();
    if (rank < num_slices(kDim)) weigher.drain(kWorkers);
  }
#endif
}

template <class T, int kDim, int kHeadTiles, bool kRests>
cudaError_t run_cluster(const DecodeParams& params, const ListedWalks& walks, const Maps& maps,
                        const ClusterPlan& plan, cudaStream_t stream, int* blocks) {
  const auto kernel = cluster_kernel<T, kDim, kHeadTiles, kRests>;
  cudaLaunchAttribute attributes[2] = {{}, early_start()};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = plan.blocks();
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(params.batch) * params.num_kv_heads * plan.blocks());
  config.blockDim = dim3(kClusterThreads<kDim>);
  config.dynamicSmemBytes = kMaxSharedBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  if (blocks == nullptr) return cudaLaunchKernelEx(&config, kernel, params, walks, maps, plan);
  config.numAttrs = 1;
  bool can_run;
  *blocks = 0;
  const cudaError_t error = prepare(kernel, kMaxSharedBytes, &can_run);
  if (!can_run) return error;
  return cudaOccupancyMaxActiveClusters(blocks, kernel, &config);
}

}  // namespace art::cuda::sm90
