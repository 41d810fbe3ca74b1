#include "cuda/listed_walks.h"

#include "core/item.h"
#include "cuda/early_start.h"
#include "cuda/rows.cuh"

namespace art::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) list_kernel(const __grid_constant__ DecodeParams params,
                                                        const __grid_constant__ ListedWalks walks) {
  let_next_kernel_start();
  const int32_t index = blockIdx.x;
  const int64_t first = int64_t{index} * params.max_units;
  const KeptUnits kept = {walks.kept + first,
                          walks.entries == nullptr ? nullptr : walks.entries + first};
  const Walk walk = visible_walk<kThreads>(params, index, visible_of(params, index), kept);
  if (threadIdx.x == 0) {
    walks.walks[index] = {walk.num_units, walk.num_pinned, walk.units != kept.units};
  }
}

}  // namespace

cudaError_t list_walks(const DecodeParams& params, const ListedWalks& walks, cudaStream_t stream) {
  const unsigned items = static_cast<unsigned>(params.batch) * params.num_kv_heads;
  list_kernel<<<items, kThreads, 0, stream>>>(params, walks);
  return cudaGetLastError();
}

}  // namespace art::cuda
