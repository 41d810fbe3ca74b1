#include "cuda/guided/plain_scores.cuh"

#include <algorithm>

#include "cuda/device.h"
#include "cuda/early_start.h"
#include "cuda/sizes.h"

namespace art::cuda::guided {
namespace {

constexpr int kThreads = 256;

// Four at a time: left to itself the compiler wants five on sm_80, and spills.
__global__ void __launch_bounds__(kThreads, 4)
    plain_kernel(const __grid_constant__ GuidedParams guided, const Workspace space,
                 const int32_t blocks) {
  __shared__ PlainShared shared;
  let_next_kernel_start();
  const Target target(guided, static_cast<int32_t>(blockIdx.x) / blocks);
  const int32_t coded = target.num_groups(), all = coded + (target.has_tail() ? 1 : 0);
  for (int32_t i = static_cast<int32_t>(blockIdx.x) % blocks; i < all; i += blocks) {
    const int32_t group = i < coded ? target.groups.begin + i : target.visible.end / kGroupTokens;
    score_plainly(guided, target, group * kGroupTokens, /*is_coded=*/i < coded, space, shared);
  }
}

}  // namespace

cudaError_t score_plain(const GuidedParams& params, const Workspace& space, cudaStream_t stream) {
  static ResidencyCache<1> cache;
  Residency residency;
  const cudaError_t error = cache.get(
      0,
      [](int* blocks) {
        return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, plain_kernel, kThreads, 0);
      },
      &residency);
  if (error != cudaSuccess) return error;
  const int64_t items = num_items(params.attention);
  const int64_t groups = params.max_units / kGroupUnits + 1;
  const int64_t blocks = std::clamp<int64_t>(residency.total() / items, 1, groups);
  plain_kernel<<<static_cast<unsigned>(items * blocks), kThreads, 0, stream>>>(
      params, space, static_cast<int32_t>(blocks));
  return cudaGetLastError();
}

}  // namespace art::cuda::guided
