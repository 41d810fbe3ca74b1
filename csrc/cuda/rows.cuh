// Which rows of the cache a thread block reads, and in which order: shared by all kernels.
#pragma once

#include <cstdint>

#include "core/item.h"
#include "core/params.h"

namespace art::cuda {

__device__ inline float warp_sum(float x) {
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
  return x;
}

__device__ inline float warp_max(float x) {
  for (int lane = 16; lane > 0; lane /= 2) {
    const float y = __shfl_xor_sync(~0u, x, lane);
    x = x > y ? x : y;
  }
  return x;
}

// The token at a walk slot, or -1 where it is not visible.
__device__ inline int32_t token_at(const DecodeParams& params, const Item& item, int32_t slot) {
  const int32_t unit = item.walk.unit_at(slot / params.unit_size);
  const int32_t token = unit * params.unit_size + slot % params.unit_size;
  return token >= item.visible.begin && token < item.visible.end ? token : -1;
}

// A page id outside the cache would read foreign memory; it is undefined, but stays inside.
__device__ inline int64_t page_inside(const DecodeParams& params, int64_t page) {
  return page < 0 ? 0 : (page < params.num_pages ? page : params.num_pages - 1);
}

__device__ inline int64_t page_of(const DecodeParams& params, const Item& item, int32_t token) {
  return page_inside(params, item.block_table[token / params.page_size]);
}

__device__ inline int64_t row_offset(const PagedCache& cache, int64_t page, int32_t in_page,
                                     int32_t head) {
  return page * cache.page_stride + in_page * cache.token_stride + head * cache.head_stride;
}

// The visible units of an explicit walk. The list is used in place where nothing is dropped.
template <int kThreads>
__device__ Walk visible_walk(const DecodeParams& params, int64_t index, TokenRange visible,
                             int32_t* kept) {
  const int32_t* units = params.walk + index * params.max_units;
  const int32_t listed = params.walk_lens[index];
  const int32_t len = listed < 0 ? 0 : (listed < params.max_units ? listed : params.max_units);
  const int32_t pinned = num_pinned_of(params, index);
  const int32_t unit_size = params.unit_size;
  __shared__ Walk walk;
  bool all_visible = true;
  for (int32_t i = threadIdx.x; i < len; i += kThreads) {
    all_visible = all_visible && unit_tokens(units[i], unit_size, visible).size() > 0;
  }
  if (__syncthreads_and(all_visible)) {
    return {WalkOrder::kExplicit, 0, len, 0, pinned < len ? pinned : len, units};
  }
  if (threadIdx.x < 32) {
    const uint32_t lane = threadIdx.x, below = (1u << lane) - 1;
    int32_t count = 0, kept_pinned = 0;
    for (int32_t base = 0; base < len; base += 32) {
      const int32_t i = base + static_cast<int32_t>(lane);
      const bool keep = i < len && unit_tokens(units[i], unit_size, visible).size() > 0;
      const uint32_t kept_mask = __ballot_sync(~0u, keep);
      if (keep) kept[count + __popc(kept_mask & below)] = units[i];
      count += __popc(kept_mask);
      kept_pinned += __popc(__ballot_sync(~0u, keep && i < pinned));
    }
    if (lane == 0) walk = {WalkOrder::kExplicit, 0, count, 0, kept_pinned, kept};
  }
  __syncthreads();
  return walk;
}

}  // namespace art::cuda
