// What both schedules do at the start of a thread block and before a launch.
#pragma once

#include "core/item.h"
#include "cuda/sm90/launch.h"

namespace art::cuda::sm90 {

// Thread blocks on a multiprocessor, and the tiles that each holds: 64 to 96 KiB of them are enough
// to keep the memory busy, and a short look-ahead reads little in vain after a stop. Every stage
// belongs to one consuming warp, so that each barrier has one thread that waits for all its phases.
constexpr int num_blocks(int head_dim, int head_tiles) {
  if (head_dim <= 64) return head_tiles == 1 ? 3 : 2;
  return head_dim <= 128 || (head_dim <= 192 && head_tiles == 1) ? 2 : 1;
}
constexpr int num_stages(int head_dim, int head_tiles) {
  if (head_dim <= 64) return 4;
  if (head_dim <= 96) return head_tiles == 1 ? 4 : 3;
  if (head_dim <= 128) return head_tiles == 1 ? 3 : 2;
  if (head_dim <= 192) return head_tiles == 1 ? 2 : 3;
  return 3;
}

// One thread block of a cluster has a multiprocessor to itself, and 96 to 160 KiB of tiles. With
// seven warps more than stages, twelve warps may have 168 registers each, and sixteen 128.
constexpr int num_cluster_stages(int head_dim) {
  if (head_dim <= 64) return 8;
  return head_dim <= 128 ? 5 : head_dim <= 192 ? 3 : 2;
}

__device__ inline unsigned char* aligned(unsigned char* memory) {
  const auto address = reinterpret_cast<uintptr_t>(memory);
  return memory + (kSharedAlignment - address % kSharedAlignment) % kSharedAlignment;
}

__device__ inline Item find_item(const DecodeParams& params, const ListedWalks& walks,
                                 int32_t index) {
  const TokenRange visible = visible_of(params, index);
  if (walks.walks == nullptr) {
    return make_item(
        params, index, visible,
        built_in_walk(params.walk_order, visible, params.unit_size, num_pinned_of(params, index)));
  }
  const ListedWalk listed = walks.walks[index];
  const int64_t row = int64_t{index} * params.max_units;
  return make_item(params, index, visible,
                   {WalkOrder::kExplicit, 0, listed.num_units, 0, listed.num_pinned,
                    listed.in_place ? params.walk + row : walks.kept + row});
}

// Whether the kernel can run on this GPU; if so, it may have the shared memory from then on.
template <class Kernel>
cudaError_t prepare(Kernel kernel, int bytes, bool* can_run) {
  *can_run = false;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  // Compiled for an older architecture, the kernel is empty.
  if (error != cudaSuccess || attributes.ptxVersion < 90) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaErrorInvalidValue) {
    // More shared memory than a thread block may have on this GPU.
    cudaGetLastError();
    return cudaSuccess;
  }
  *can_run = error == cudaSuccess;
  return error;
}

}  // namespace art::cuda::sm90
