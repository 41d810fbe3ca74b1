// Which rows of the cache a thread block reads, in which order, and what is left after them: shared
// by all kernels.
#pragma once

#include <cstdint>

#include "core/item.h"
#include "core/params.h"
#include "core/termination.h"

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

// What is kept of an explicit walk that lists units which are not visible.
struct KeptUnits {
  int32_t* units;    // [max_units]
  int32_t* entries;  // [max_units], where they were in the walk; null if nobody asks
};

// The visible units of an explicit walk. The list is used in place where nothing is dropped.
template <int kThreads>
__device__ Walk visible_walk(const DecodeParams& params, int64_t index, TokenRange visible,
                             const KeptUnits& kept) {
  const int32_t pinned = num_pinned_of(params, index), unit_size = params.unit_size;
  const Walk whole = walk_in_place(params, index, pinned);
  if (params.walk_is_visible) return whole;
  const int32_t* units = whole.units;
  const int32_t len = whole.num_units;
  __shared__ Walk walk;
  bool all_visible = true;
#pragma unroll 4
  for (int32_t i = threadIdx.x; i < len; i += kThreads) {  // no load waits for the one before it
    all_visible &= unit_tokens(units[i], unit_size, visible).size() > 0;
  }
  if (__syncthreads_and(all_visible)) return whole;
  if (threadIdx.x < 32) {
    const uint32_t lane = threadIdx.x, below = (1u << lane) - 1;
    int32_t count = 0, kept_pinned = 0;
    for (int32_t base = 0; base < len; base += 32) {
      const int32_t i = base + static_cast<int32_t>(lane);
      const bool keep = i < len && unit_tokens(units[i], unit_size, visible).size() > 0;
      const uint32_t kept_mask = __ballot_sync(~0u, keep);
      const int32_t place = count + __popc(kept_mask & below);
      if (keep) kept.units[place] = units[i];
      if (keep && kept.entries != nullptr) kept.entries[place] = i;
      count += __popc(kept_mask);
      kept_pinned += __popc(__ballot_sync(~0u, keep && i < pinned));
    }
    if (lane == 0) walk = {WalkOrder::kExplicit, 0, count, 0, kept_pinned, kept.units};
  }
  __syncthreads();
  return walk;
}

// The last entry that a step reads, in an explicit walk as it was given.
__device__ inline int32_t last_entry_of(const Item& item, int32_t step, const KeptUnits& kept) {
  const int32_t last = item.steps.positions(step).end - 1;
  return item.walk.units == kept.units ? kept.entries[last] : last;
}

// Whether head g of the group has little enough left after an entry.
__device__ inline bool is_head_covered(const DecodeParams& params, const Item& item, int32_t g,
                                       int32_t entry, const SoftmaxState& read) {
  const int32_t head = item.kv_head * params.group_size + g;
  const int64_t row = (int64_t{item.batch} * params.num_q_heads + head) * params.max_units;
  return is_covered(read, sink_of(params, item, g), params.log_rest[row + entry],
                    params.residual_limit);
}

}  // namespace art::cuda
