// What the thread blocks of a cluster send one another, and where it lies in shared memory.
//
// The steps of an item are dealt out to the thread blocks in turn. The result of a step is cut into
// slices of 16 channels (the rows of one tile of the second product, for all heads of the group);
// every thread block folds its own slices of all steps, so the work of folding is shared too. Each
// slice's part of the inner products goes to the first thread block, where one warp decides.
//
// Results and moments travel as asynchronous stores that complete a barrier of the receiver. All
// else (how far slices are folded, that the item has ended) are single words whose arrival orders
// nothing, for releases to a cluster cost a barrier over the whole device.
#pragma once

#include "cuda/sm90/async.cuh"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/tile.cuh"

namespace art::cuda::sm90 {

// The layout of a thread block's room, with its addresses.
class Exchange {
 public:
  __device__ Exchange(const ExchangeLayout& layout, unsigned char* room)
      : layout_(layout), ring_(reinterpret_cast<float4*>(room)) {}

  // Of one lane: row `row` of 8, and the pair of heads.
  __device__ float4* values(int32_t step, int32_t local_slice, int row, int pair) const {
    return slot(step) + (8 * local_slice + row) * layout_.pairs + pair;
  }
  __device__ float4* states(int32_t step, int pair) const {
    return slot(step) + 8 * layout_.local * layout_.pairs + pair;
  }
  // {aa, ad, dd, scale} of head 2 * pair + head, for step `in_batch` of the batch.
  __device__ float4* moments(int32_t batch, int32_t slice, int head, int in_batch, int pair) const {
    const int32_t steps = layout_.sizes.batch_steps;
    const int32_t box = batch & (layout_.sizes.pending - 1);
    return ring_ + layout_.sizes.ring_steps * layout_.slot_pieces() + box * layout_.inbox_pieces() +
           ((2 * slice + head) * steps + in_batch) * layout_.pairs + pair;
  }

  // Bytes of one step's result for a thread block with `slices` slices, and of the moments of a
  // step in one slice.
  __device__ uint32_t step_bytes(int32_t slices) const {
    return 16 * layout_.pairs * (8 * slices + 1);
  }
  __device__ uint32_t moment_bytes() const { return 32 * layout_.pairs; }

 private:
  __device__ float4* slot(int32_t step) const {
    return ring_ + (step & (layout_.sizes.ring_steps - 1)) * layout_.slot_pieces();
  }

  const ExchangeLayout& layout_;
  float4* const ring_;
};

// What a warp that folds keeps of the state before a batch, until the verdict on it is known.
template <int kDim, int kHeadTiles>
struct Snapshot {
  static constexpr int kOwn = slices_of_block(num_slices(kDim), 2 * kFolders);
  float4 values[kOwn][kHeadTiles][32];
  float4 states[kHeadTiles][kLanePairs];
};

// Scalars of the steps of a batch, by lane: step lane / 4, heads of pair lane % 4.
template <int kHeadTiles>
struct StepTable {
  float4 factors[kHeadTiles][32];  // {running, incoming} of both heads
  float4 weights[kHeadTiles][32];  // {change, share} of both heads
  float2 masses[kHeadTiles][32];
};

constexpr int kMaxPending = 2;
constexpr int kMaxRingBatches = 8;
constexpr int kMaxFolders = 16;  // with slices, in a cluster

template <int kDim, int kHeadTiles>
struct ExchangeShared {
  Barrier full[kMaxRingBatches];  // results of a batch are here
  Barrier judged[kMaxPending];    // moments of a batch are here; of the first thread block
  Barrier decided[kMaxPending];   // reading goes on after a batch
  // Written from afar. Batches whose ring slots are free again, by the first slice of the warp.
  volatile int32_t freed[kMaxFolders];
  volatile int32_t stop;  // the last step that counts, plus one; 0: not known yet, or all count
  // When a thread block is done: results that each of its warps has sent, and batches whose
  // moments.
  volatile int32_t sent_steps[kMaxClusterBlocks][kMaxClusterBlocks];
  volatile int32_t sent_moments[kMaxFolders];

  StepTable<kHeadTiles> tables[kFolders];
  Snapshot<kDim, kHeadTiles> snapshots[kFolders][kMaxPending];

  // By one thread.
  __device__ void init() {
    for (Barrier& barrier : full) barrier.init(1);
    for (Barrier& barrier : judged) barrier.init(1);
    for (Barrier& barrier : decided) barrier.init(1);
    for (volatile int32_t& batches : freed) batches = 0;
    stop = 0;
  }
};

}  // namespace art::cuda::sm90
