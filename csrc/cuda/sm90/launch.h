// Entry points of the kernels for sm_90 and newer, and what the host gives them.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "core/macros.h"
#include "core/params.h"
#include "cuda/listed_walks.h"

namespace art::cuda::sm90 {

constexpr int kMaxGroup = 16;           // query heads per KV head
constexpr int kSharedAlignment = 1024;  // of tiles, for the copy engine's exchange of pieces

struct Maps {
  CUtensorMap key;
  CUtensorMap value;
};

// Progress of an item that a team computes. Zero before the launch.
struct alignas(32) TeamState {
  int32_t next_step;     // the first one that no worker has claimed
  int32_t folded_steps;  // ring slots before it are free again
};

// Several thread blocks per item: one that folds and `workers` that compute steps for it. Where
// there are more items than teams, a team takes every num_teams-th item.
struct TeamSpace {
  int32_t num_teams;
  int32_t workers;      // of each team
  int32_t claim_steps;  // that a worker claims at once
  int32_t ring_steps;   // a power of two
  TeamState* state;     // [items]
  int32_t* written;     // [items, ring_steps]: number of the step in a slot, plus one; zero before
                        // the launch
  float4* slots;        // [items, ring_steps, slot_pieces()]
};

// A step's result for all heads, in pieces of 16 bytes: [head_dim / 16][8][head pairs] of values,
// then [head pairs] of two softmax states. Pairs are rounded up to a power of two.
ART_HD constexpr int head_pairs(int group_size) {
  int pairs = 1;
  while (2 * pairs < group_size) pairs *= 2;
  return pairs;
}
// With two head tiles there are always eight.
template <int kHeadTiles>
ART_HD constexpr int head_pairs_of(int group_size) {
  return kHeadTiles == 2 ? 8 : head_pairs(group_size);
}
ART_HD constexpr int value_pieces(int head_dim, int pairs) { return head_dim / 16 * 8 * pairs; }
ART_HD constexpr int slot_pieces(int head_dim, int pairs) {
  return value_pieces(head_dim, pairs) + pairs;
}

// With `blocks`, an entry prepares its kernel on the current device and tells how many thread
// blocks fit on one multiprocessor (0: none), instead of launching.
struct Entries {
  // Null where there is no such kernel.
  cudaError_t (*solo)(const DecodeParams&, const ListedWalks&, const Maps&, cudaStream_t,
                      int* blocks);
  cudaError_t (*team)(const DecodeParams&, const ListedWalks&, const Maps&, const TeamSpace&,
                      cudaStream_t, int* blocks);
  int stages;  // tiles that a worker holds
};

// For 8 or 16 query heads; defined in one file per dtype and head size.
template <DType kDType, int kDim>
Entries entries(int32_t group_size);

}  // namespace art::cuda::sm90
