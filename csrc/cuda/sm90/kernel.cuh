// What both schedules do at the start of a thread block and before a launch.
#pragma once

#include "core/item.h"
#include "cuda/early_start.h"
#include "cuda/sm90/launch.h"

namespace art::cuda::sm90 {

// Thread blocks on a multiprocessor, and the tiles that each holds: 64 to 96 KiB of them are enough
// to keep the memory busy, and a short look-ahead reads little in vain after a stop. Every stage
// belongs to one consuming warp, so that each barrier has one warp that waits for all its phases.
constexpr int num_blocks(int head_dim, int head_tiles) {
  return head_dim <= 64 && head_tiles == 1 ? 3 : 2;
}
constexpr int num_stages(int head_dim, int head_tiles) {
  if (head_dim <= 64) return 4;
  if (head_dim <= 96) return head_tiles == 1 ? 4 : 3;
  return head_dim <= 128 && head_tiles == 1 ? 3 : 2;
}

// One thread block of a cluster has a multiprocessor to itself, and 80 to 144 KiB of tiles: more of
// them would only read further past a stop. With the seven other warps these are twelve at most, so
// that each may have 168 registers.
constexpr int num_cluster_workers(int head_dim) {
  if (head_dim <= 64) return 4;
  if (head_dim <= 96) return 5;
  return head_dim <= 128 ? 4 : head_dim <= 192 ? 3 : 2;
}
// With two producing warps, each must have computing warps of its own: when it ends, nobody empties
// their stages any more.
constexpr int num_cluster_producers(int head_dim) {
  return num_cluster_workers(head_dim) == 4 ? 2 : 1;
}
constexpr int num_cluster_stages(int head_dim) {
  return num_cluster_workers(head_dim) * (head_dim <= 64 ? 2 : 1);
}

__device__ inline unsigned char* aligned(unsigned char* memory) {
  const auto address = reinterpret_cast<uintptr_t>(memory);
  return memory + (kSharedAlignment - address % kSharedAlignment) % kSharedAlignment;
}

__device__ inline Item find_item(const DecodeParams& params, const ListedWalks& walks,
                                 int32_t index) {
  const TokenRange visible = visible_of(params, index);
  const int64_t row = int64_t{index} * params.max_units;
  if (walks.walks == nullptr) {
    const int32_t pinned = num_pinned_of(params, index);
    return make_item(params, index, visible,
                     params.walk_order == WalkOrder::kExplicit
                         ? walk_in_place(params, index, pinned)
                         : built_in_walk(params.walk_order, visible, params.unit_size, pinned));
  }
  const ListedWalk listed = walks.walks[index];
  return make_item(params, index, visible,
                   {WalkOrder::kExplicit, 0, listed.num_units, 0, listed.num_pinned,
                    listed.in_place ? params.walk + row : walks.kept + row});
}

// Sequences of different length are started longest first, or the last to start would keep the
// device half idle. Comparing all with all is only worth it for a few; of many, the last are a
// small part.
constexpr int kMaxSorted = 256;

// The item that thread block `position` computes. Called by the whole thread block; `lengths` is
// room for kMaxSorted of them, free again afterwards, `found` is not before the next barrier.
__device__ inline int32_t item_at(const DecodeParams& params, int32_t position, int32_t* lengths,
                                  int32_t& found) {
  const bool per_head = params.seq_lens_head_stride != 0;
  const int32_t per_row = per_head ? 1 : params.num_kv_heads;
  const int32_t rows = params.batch * (params.num_kv_heads / per_row);
  if (rows > kMaxSorted) return position;
  bool equal = true;
  const int32_t first = visible_of(params, 0).size();
  for (int32_t row = threadIdx.x; row < rows; row += blockDim.x) {
    lengths[row] = visible_of(params, row * per_row).size();
    equal = equal && lengths[row] == first;
  }
  if (__syncthreads_and(equal)) return position;
  const int32_t place = position / per_row;
  for (int32_t row = threadIdx.x; row < rows; row += blockDim.x) {
    const int32_t length = lengths[row];
    int32_t before = 0;
    for (int32_t other = 0; other < rows; ++other) {
      before += lengths[other] > length || (lengths[other] == length && other < row);
    }
    if (before == place) found = row;
  }
  __syncthreads();
  return found * per_row + position % per_row;
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
