// Several thread blocks per item: for batches that do not fill the device. Workers claim steps of
// their item and leave each step's result in a ring in global memory (in practice in the
// second-level cache); one thread block per item folds the ring in walk order and decides whether
// to stop. What a step's result is, and how it is folded, does not depend on who computed it, so
// neither bits nor decisions depend on the number of workers.
//
// Nobody waits for a thread block that has not started: workers claim steps as they come, and a
// team's thread blocks have consecutive numbers, the folding one first. Thread blocks start in the
// order of their numbers, so of all that have started at most one team is without a worker.
#pragma once

#include "cuda/sm90/folder.cuh"
#include "cuda/sm90/worker.cuh"

namespace art::cuda::sm90 {

// Four warps that compute or fold, and two that serve them.
constexpr int kTeamThreads = 32 * 6;

template <class T, int kDim, int kHeadTiles>
__device__ void fold_items(const DecodeParams& params, const ListedWalks& walks,
                           const TeamSpace& space, int32_t team,
                           FolderShared<kDim, kHeadTiles>& shared) {
  if (threadIdx.x == 0) {
    shared.init();
    fence_barrier_init();
  }
  __syncthreads();
  const int warp = threadIdx.x / 32;
  Fetcher<kDim, kHeadTiles> fetcher(params, space, shared);
  Weigher<kDim, kHeadTiles> weigher(params, shared);
  Folder<T, kDim, kHeadTiles> folder(params, space, shared);
  const int32_t num_items = params.batch * params.num_kv_heads;
  auto batches = batches_of<FolderShared<kDim, kHeadTiles>>(
      slot_pieces(kDim, head_pairs_of<kHeadTiles>(params.group_size)));
  for (int32_t index = team; index < num_items; index += space.num_teams) {
    const Item item = find_item(params, walks, index);
    if (warp < kFolders) folder.run(item, index, batches);
    if (warp == kFolders) weigher.run(item, batches);
    if (warp == kFolders + 1) fetcher.run(item.steps.num_steps, index, batches);
  }
}

template <class T, int kDim, int kHeadTiles>
__device__ void compute_items(const DecodeParams& params, const ListedWalks& walks,
                              const Maps& maps, const TeamSpace& space, int32_t team,
                              WorkerShared<T, kDim, kHeadTiles>& shared) {
  static_assert(32 * (WorkerShared<T, kDim, kHeadTiles>::kConsumers + 2) <= kTeamThreads);
  if (threadIdx.x == 0) {
    prefetch_map(&maps.key);
    prefetch_map(&maps.value);
    shared.stages.init();
    fence_barrier_init();
  }
  // Their initialisation is seen after the first barrier of run().
  Worker<T, kDim, kHeadTiles>(params, space, maps, shared).template run<kTeamThreads>(walks, team);
}

template <class T, int kDim, int kHeadTiles>
__global__ void __launch_bounds__(kTeamThreads, num_team_blocks(kDim, kHeadTiles))
    team_kernel(const __grid_constant__ DecodeParams params,
                const __grid_constant__ ListedWalks walks, const __grid_constant__ Maps maps,
                const __grid_constant__ TeamSpace space) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  __trap();
#else
  extern __shared__ unsigned char memory[];
  const int32_t team = blockIdx.x / (space.workers + 1), rank = blockIdx.x % (space.workers + 1);
  if (rank == 0) {
    auto& shared = *reinterpret_cast<FolderShared<kDim, kHeadTiles>*>(aligned(memory));
    fold_items<T, kDim, kHeadTiles>(params, walks, space, team, shared);
  } else {
    auto& shared = *reinterpret_cast<WorkerShared<T, kDim, kHeadTiles>*>(aligned(memory));
    compute_items<T, kDim, kHeadTiles>(params, walks, maps, space, team, shared);
  }
#endif
}

template <class T, int kDim, int kHeadTiles>
cudaError_t run_team(const DecodeParams& params, const ListedWalks& walks, const Maps& maps,
                     const TeamSpace& space, cudaStream_t stream, int* blocks) {
  constexpr int kWorkerBytes = sizeof(WorkerShared<T, kDim, kHeadTiles>);
  constexpr int kFolderBytes = sizeof(FolderShared<kDim, kHeadTiles>);
  constexpr int kBytes =
      (kWorkerBytes > kFolderBytes ? kWorkerBytes : kFolderBytes) + kSharedAlignment;
  const auto kernel = team_kernel<T, kDim, kHeadTiles>;
  if (blocks != nullptr) return prepare(kernel, kTeamThreads, kBytes, blocks);
  const unsigned grid = space.num_teams * (space.workers + 1);
  kernel<<<grid, kTeamThreads, kBytes, stream>>>(params, walks, maps, space);
  return cudaGetLastError();
}

}  // namespace art::cuda::sm90
