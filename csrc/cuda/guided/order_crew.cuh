// The thread blocks that order the units of one item: one, or from sm_90 on a cluster of up to
// eight, each with neighbouring units. What they find is sent to all of them, and everybody draws
// the same conclusions. All of it is integers, so that neither their number nor the order of
// arrival changes a bit.
#pragma once

#include <cstdint>

#include "core/unit_order.h"
#include "cuda/guided/workspace.h"
#include "cuda/sm90/async.cuh"

namespace art::cuda::guided {

constexpr int kLeastOrderWarps = 2;  // and multiples of these
constexpr int kMaxOrderWarps = 16;
constexpr int kMostHeads = 64;  // query heads that are added up together

__device__ inline int32_t num_warps() { return static_cast<int32_t>(blockDim.x / 32); }

// The units of one thread block: whole vectors, but for what is not visible.
struct BlockUnits {
  int32_t first_vector;
  int32_t end_vector;
  int32_t free_begin;  // not pinned: [free_begin, free_end)
  int32_t free_end;
  int32_t warp_share;  // of those, a warp's: neighbours, so that warps and lanes are in their order

  __device__ BlockUnits(const GuidedUnits& units, int32_t rank, int32_t blocks_log2) {
    const int32_t begin = units.begin / kUnitsPerVector;
    const int32_t end = (units.end + kUnitsPerVector - 1) / kUnitsPerVector;
    const int32_t share = (end - begin + (1 << blocks_log2) - 1) >> blocks_log2;
    first_vector = min(begin + rank * share, end);
    end_vector = min(first_vector + share, end);
    free_begin = max(units.sink_end, origin());
    free_end = max(min(units.recent_begin, end_vector * kUnitsPerVector), free_begin);
    warp_share = (num_free() + 32 * num_warps() - 1) / (32 * num_warps()) * 32;
  }
  __device__ int32_t origin() const { return first_vector * kUnitsPerVector; }
  __device__ int32_t num_free() const { return free_end - free_begin; }
};

// Query heads that are added up together. Where there are fewer of them than warps, each warp takes
// a part of a head's units.
struct Heads {
  int32_t first;
  int32_t count;
  int32_t parts_log2;

  __device__ Heads(const GuidedParams& guided, int32_t first, int32_t parts_log2)
      : first(first),
        count(min(guided.attention.group_size - first, kMostHeads)),
        parts_log2(parts_log2) {}

  __device__ int32_t tasks() const { return count << parts_log2; }
};

// What a thread block tells all of its crew, itself too. A task is a part of a head's units:
// head << parts_log2 | part.
struct Slots {
  uint64_t mass[kMostHeads];    // by task
  int32_t largest[kMostHeads];  // by task
  int32_t best[kMaxOrderWarps];
  uint32_t count[kNumBuckets];  // unpinned units
};

enum class Meeting { kLargest, kMass, kBest, kCount, kRest };
constexpr int kMeetings = 5;

// What is the same for all threads is here, for they have no registers to spare.
struct alignas(16) OrderShared {
  GuidedUnits units;
  BlockUnits mine;
  uint32_t first[kNumBuckets];  // where the units of a bucket begin among those of the thread block
  uint32_t shift[kNumBuckets];  // from there to their position in the walk
  uint32_t powers[64];
  int32_t total[kMostHeads];
  sm90::Barrier meetings[kMeetings];
};

// Over a warp, in three pieces: what one instruction adds up has 32 bits.
__device__ inline uint64_t sum_of_warp(uint64_t mass) {
  constexpr int kBits = 22;  // the sum of a warp's pieces has 27
  constexpr uint32_t kMask = (1u << kBits) - 1;
  const uint32_t low = __reduce_add_sync(~0u, static_cast<uint32_t>(mass) & kMask);
  const uint32_t middle = __reduce_add_sync(~0u, static_cast<uint32_t>(mass >> kBits) & kMask);
  const uint32_t high = __reduce_add_sync(~0u, static_cast<uint32_t>(mass >> 2 * kBits));
  return low + (uint64_t{middle} << kBits) + (uint64_t{high} << 2 * kBits);
}

struct Crew {
  int32_t rank;
  int32_t blocks_log2;
  OrderShared& shared;
  Slots* slots;  // [blocks]: what each has sent

  __device__ Crew(int32_t blocks_log2, OrderShared& shared, Slots* slots)
      : rank(0), blocks_log2(blocks_log2), shared(shared), slots(slots) {
    if (is_cluster()) rank = sm90::cluster_rank();
  }

  __device__ int32_t blocks() const { return 1 << blocks_log2; }
  __device__ bool is_cluster() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    return blocks_log2 > 0;
#else
    return false;
#endif
  }

  // By one thread, before the others arrive: each meeting takes place once, and then everything has
  // been sent. `tasks`: of all heads.
  __device__ void init(int32_t tasks, int32_t warps) const {
    if (!is_cluster()) return;
    const int32_t bytes[kMeetings] = {4 * tasks, 8 * tasks, 4 * warps, 4 * kNumBuckets, 8 * tasks};
#pragma unroll
    for (int i = 0; i < kMeetings; ++i) {
      shared.meetings[i].init(1);
      shared.meetings[i].arrive_and_expect(bytes[i] << blocks_log2);
    }
    sm90::fence_barrier_init();
  }
  // Before anything is sent.
  __device__ void arrive() const {
    if (is_cluster()) sm90::cluster_arrive_relaxed();
  }
  __device__ void wait_for_all() const {
    if (is_cluster()) sm90::cluster_wait();
  }

  // A warp's word, to all.
  template <class T>
  __device__ void send(Meeting meeting, T& slot, T value) const {
    const int32_t lane = threadIdx.x % 32;
    if (!is_cluster()) {
      if (lane == 0) slot = value;
    } else if (lane < blocks()) {
      send_to(lane, meeting, &slot, value);
    }
  }
  template <class T>
  __device__ void send_to(int32_t to, Meeting meeting, const void* slot, T value) const {
    sm90::send(sm90::remote_address(slot, to), value,
               sm90::remote_address(&shared.meetings[static_cast<int>(meeting)], to));
  }
  // Waits for what all have sent. Of the own thread block, only that has happened in a cluster.
  __device__ void meet(Meeting meeting) const {
    if (is_cluster()) {
      shared.meetings[static_cast<int>(meeting)].wait(0);
    } else {
      __syncthreads();
    }
  }
  // Also for everything that the own thread block has done.
  __device__ void meet_together(Meeting meeting) const {
    if (is_cluster()) shared.meetings[static_cast<int>(meeting)].wait(0);
    __syncthreads();
  }
  // For everything that all have done, in global memory too.
  __device__ void finish_together() const {
    __syncwarp();
    if (is_cluster()) {
      sm90::cluster_arrive();
      sm90::cluster_wait();
    } else {
      __syncthreads();
    }
  }
};

}  // namespace art::cuda::guided
