// What the thread blocks of a cluster send one another, and where it lies in shared memory.
//
// The steps of an item are dealt out to the thread blocks in turn. The result of a step is cut into
// slices of 16 channels (the rows of one tile of the second product, for all heads of the group);
// every thread block folds its own slices of all steps, so the work of folding is shared too. Each
// slice's part of the inner products goes to the thread block whose turn it is to judge the batch,
// and with that of slice 0 whether a head has little left to read. Its verdict, a bit for each step
// and rule, goes to all, and each finds out where reading stops.
//
// Results and moments travel as asynchronous stores that complete a barrier of the receiver. All
// else (how far slices are folded, that the item has ended) are single words whose arrival orders
// nothing, for releases to a cluster cost a barrier over the whole device. That is enough: a word
// that frees ring slots follows, in its warp, loads whose values were already used, so no store
// that waits for it can overtake them; and a verdict or stop carries all it says in the word.
#pragma once

#include "cuda/sm90/async.cuh"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/tile.cuh"

namespace art::cuda::sm90 {

// The layout of a thread block's room, with its addresses.
class Exchange {
 public:
  __device__ Exchange(const ClusterPlan& plan, unsigned char* room)
      : layout_(plan.layout),
        blocks_log2_(plan.blocks_log2),
        ring_(reinterpret_cast<float4*>(room)) {}

  // Of one lane: row `row` of 8, and the pair of heads.
  __device__ float4* values(int32_t step, int32_t local_slice, int row, int pair) const {
    return ring_ + layout_.sizes.slot_of(step) * layout_.value_pieces() +
           (8 * local_slice + row) * layout_.pairs + pair;
  }
  // Those of the later steps of a batch follow.
  __device__ float4* states(int32_t step, int pair) const {
    return ring_ + layout_.num_slots() * layout_.value_pieces() + pair * layout_.state_pieces() +
           layout_.sizes.slot_of(step);
  }
  // {aa, ad, dd, scale} of head 2 * pair + head, for step `in_batch` of the batch. In slice 0 the
  // scale is negative where the head has little enough left after the step.
  __device__ float4* moments(int32_t batch, int32_t slice, int head, int in_batch, int pair) const {
    const CudaExchange& sizes = layout_.sizes;
    float4* inbox = ring_ + layout_.ring_pieces() + inbox_place_of(batch) * layout_.inbox_pieces();
    return inbox + (((2 * slice + head) << sizes.batch_log2) + in_batch) * layout_.pairs + pair;
  }

  // The thread block whose turn it is to judge a batch, and where its moments lie there.
  __device__ int32_t judge_of(int32_t batch) const { return batch & (blocks() - 1); }
  __device__ int32_t inbox_place_of(int32_t batch) const {
    return batch >> blocks_log2_ & (layout_.sizes.inbox_batches() - 1);
  }
  __device__ uint32_t inbox_parity(int32_t batch) const {
    return batch >> (blocks_log2_ + layout_.sizes.inbox_log2) & 1;
  }

  // Bytes of one step's result for a thread block with `slices` slices, and of the moments of a
  // step in one slice.
  __device__ uint32_t step_bytes(int32_t slices) const {
    return 16 * layout_.pairs * (8 * slices + 1);
  }
  __device__ uint32_t moment_bytes() const { return 32 * layout_.pairs; }

 private:
  __device__ int32_t blocks() const { return 1 << blocks_log2_; }

  const ExchangeLayout& layout_;
  const int32_t& blocks_log2_;
  float4* const ring_;
};

constexpr int kMaxRingBatches = 8;
constexpr int kBatchSteps = 8;  // at most
static_assert(kMaxRingBatches == 1 << kMaxRingLog2 && kBatchSteps == 1 << kMaxBatchLog2);
constexpr int kMaxFolders = kMaxClusterBlocks * kFolders;
constexpr int kMaxComputingWarps = 5;

// The word that tells of a batch: a bit for each step that is unstable, and above these one for
// each that is not covered; below the batch's number, which only has to differ from that of other
// batches in the ring.
constexpr int kVerdictBits = 2 * kBatchSteps;
__device__ inline uint32_t verdict_on(int32_t batch, uint32_t verdict) {
  return static_cast<uint32_t>(batch + 1) << kVerdictBits | verdict;
}

// Batches that may wait for their verdict: as many as there is room for snapshots.
constexpr int max_pending_log2(int head_dim, int head_tiles) {
  return head_dim * head_tiles <= 128 ? 3 : 2;
}

// Scalars of a batch's steps, of a pair of heads each.
template <int kHeadTiles>
struct StepTable {
  float4 factors[kHeadTiles][kBatchSteps][kLanePairs];  // {running, incoming} of both heads
  float4 sums[kHeadTiles][kBatchSteps][kLanePairs];     // {earlier mass, mass} of both heads
  float4 states[kHeadTiles][kBatchSteps][kLanePairs];   // {max, sum} of both, after the step
};

// What a warp keeps of its values before a batch, until the verdict on it is known.
template <int kDim, int kHeadTiles>
struct Snapshot {
  static constexpr int kOwn = slices_of_block(num_slices(kDim), 2 * kFolders);
  float4 values[kOwn][kHeadTiles][32];
};

template <int kDim, int kHeadTiles>
struct ExchangeShared {
  static constexpr int kMaxPending = 1 << max_pending_log2(kDim, kHeadTiles);
  // Of warps with the same slices the first one keeps snapshots.
  static constexpr int kMaxLocal = slices_of_block(num_slices(kDim), 2);
  static constexpr int kKeepers = kMaxLocal < kFolders ? kMaxLocal : kFolders;

  Barrier full[kMaxRingBatches];     // results of a batch are here
  Barrier weighed[kMaxRingBatches];  // and so are its scalars
  Barrier moments[kMaxPending];      // moments of a batch that is judged here are here
  // Written from afar. Batches that a warp has folded: [rank * kFolders + warp]; and, of a thread
  // block, batches on which it knows the verdict.
  volatile int32_t folded[kMaxFolders];
  volatile int32_t known[kMaxClusterBlocks];
  // As verdict_on() makes them.
  volatile uint32_t verdicts[kMaxRingBatches];
  volatile int32_t stop;  // the last step that counts, plus one; 0: not known yet, or all count
  // When a thread block is done: results that each of its warps has sent, and the first batch
  // whose moments a folding warp has not.
  volatile int32_t sent_steps[kMaxClusterBlocks][kMaxComputingWarps];
  volatile int32_t sent_moments[kMaxFolders];

  // A batch's scalars are free again with its results.
  StepTable<kHeadTiles> tables[kMaxRingBatches];
  // What the output of a warp's slice was before each step, [step][row][pair]; the steps lie such
  // that lanes of different steps meet different banks.
  float4 before[kFolders][kBatchSteps][8 * kLanePairs + 4];
  Snapshot<kDim, kHeadTiles> snapshots[kKeepers][kMaxPending];

  // By a warp.
  __device__ void init() {
    static_assert(kMaxRingBatches <= 32 && kMaxPending <= 32 && kMaxClusterBlocks <= 32);
    const int lane = threadIdx.x % 32;
    if (lane < kMaxRingBatches) {
      full[lane].init(1);
      weighed[lane].init(1);
      verdicts[lane] = 0;
    }
    if (lane < kMaxPending) moments[lane].init(1);
    if (lane < kMaxClusterBlocks) known[lane] = 0;
    for (int i = lane; i < kMaxFolders; i += 32) folded[i] = 0;
    if (lane == 0) stop = 0;
  }
};

}  // namespace art::cuda::sm90
