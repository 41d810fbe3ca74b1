// Entry points of the kernels for sm_90 and newer, and what the host gives them.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "core/divider.h"
#include "core/macros.h"
#include "core/params.h"
#include "core/schedule.h"
#include "cuda/listed_walks.h"

namespace art::cuda::sm90 {

constexpr int kMaxGroup = 16;           // query heads per KV head
constexpr int kTileTokens = 64;         // of a stage
constexpr int kSharedAlignment = 1024;  // of tiles, for the copy engine's exchange of pieces

ART_HD int32_t tiles_per_step(const DecodeParams& params) {
  return (params.block_size + kTileTokens - 1) / kTileTokens;
}

// Whether reading may stop before the walk ends.
ART_HD bool may_stop(const DecodeParams& params) {
  return params.use_stability || params.use_residual;
}

// What the producing warps need: the caches as the copy engine sees them, and divisors.
struct Maps {
  CUtensorMap key;
  CUtensorMap value;
  Divider page_size;
  Divider unit_size;
  Divider tiles_per_step;
};

// A cluster of thread blocks shares an item's steps and, by slices of 16 channels, their folding.
constexpr int kMaxClusterBlocks = 8;
constexpr int kFoldersLog2 = 2;
constexpr int kFolders = 1 << kFoldersLog2;  // warps of a thread block that fold
constexpr int kLanePairs = 4;                // head pairs of a head tile: pair 4 * tile + lane % 4

ART_HD constexpr int num_slices(int head_dim) { return head_dim / 16; }
ART_HD constexpr int slices_of_block(int slices, int blocks) {
  return (slices + blocks - 1) / blocks;
}

// What a thread block keeps of the results sent to it, in pieces of 16 bytes: a ring of steps, the
// values of each [local slice][row % 8][head pair] and the softmax states [head pair][step]; and an
// inbox of moments, [batch][slice][head of the pair][step][head pair].
struct ExchangeLayout {
  int32_t pairs;  // of heads
  int32_t local;  // slices that a thread block folds at most
  int32_t slices;
  CudaExchange sizes;

  ART_HD int32_t value_pieces() const { return 8 * local * pairs; }  // of a step
  ART_HD int32_t num_slots() const { return sizes.batch_steps() << sizes.ring_log2; }
  // Of a head pair; odd, so that pairs meet different banks.
  ART_HD int32_t state_pieces() const { return num_slots() + 1; }
  ART_HD int32_t ring_pieces() const {
    return num_slots() * value_pieces() + state_pieces() * pairs;
  }
  ART_HD int32_t inbox_pieces() const { return 2 * slices * sizes.batch_steps() * pairs; }
  ART_HD int32_t bytes() const {
    return 16 * (ring_pieces() + (inbox_pieces() << sizes.inbox_log2));
  }
};

struct ClusterPlan {
  int32_t blocks_log2;  // thread blocks per item: 2, 4 or 8
  // Folding warps of a thread block that have the same slices. All fold them; forming moments takes
  // longer, and they do that in turn.
  int32_t sharers_log2;
  int32_t producers;  // producing warps that have work, of those that a thread block has
  // How long folding, weighing and judging warps look away when there is nothing for them to do.
  uint32_t pause_ns;
  ExchangeLayout layout;

  ART_HD int32_t blocks() const { return 1 << blocks_log2; }
};

// One warp that folds: slices first, first + apart, ... of every step.
struct FolderShare {
  int32_t first;  // not below the number of slices: there is nothing for this warp
  int32_t apart_log2;
  int32_t turn;  // sends the moments of batches turn, turn + sharers, ...

  ART_HD FolderShare(const ClusterPlan& plan, int32_t rank, int32_t warp) {
    const int32_t owners_log2 = kFoldersLog2 - plan.sharers_log2;
    first = rank + ((warp & ((1 << owners_log2) - 1)) << plan.blocks_log2);
    apart_log2 = owners_log2 + plan.blocks_log2;
    turn = warp >> owners_log2;
  }
  // Without a criterion one warp for each slice is enough.
  ART_HD bool has_work(int32_t slices, bool sends) const {
    return first < slices && (sends || turn == 0);
  }
  ART_HD int32_t num_slices(int32_t slices) const {
    return (slices - first + (1 << apart_log2) - 1) >> apart_log2;
  }
};

// Entry points. With `blocks`, they prepare the kernel on the current device instead of launching
// it, and tell how many thread blocks fit on one multiprocessor, or how many clusters of
// plan.blocks on the device (0: it cannot run).
struct Entries {
  // Null where there is no such kernel; without clusters there is no other either.
  cudaError_t (*solo)(const DecodeParams&, const ListedWalks&, const Maps&, cudaStream_t,
                      int* blocks);
  cudaError_t (*cluster)(const DecodeParams&, const ListedWalks&, const Maps&, const ClusterPlan&,
                         cudaStream_t, int* blocks);
  int max_producers;     // producing warps of a thread block
  int exchange_bytes;    // room for an ExchangeLayout
  int max_pending_log2;  // of its sizes
};

// For 8 or 16 query heads, with or without ResidualMass; defined in one file per dtype and head
// size.
template <DType kDType, int kDim>
Entries entries(int32_t group_size, bool use_residual);

}  // namespace art::cuda::sm90
