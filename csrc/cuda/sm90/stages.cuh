// How tiles come into shared memory and are taken out again: a producing warp fills stages through
// the copy engine, and each consuming warp empties its own.
#pragma once

#include "core/item.h"
#include "cuda/rows.cuh"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/tile.cuh"

namespace art::cuda::sm90 {

// One box of a tile; a lane of the producing warp holds it.
struct Box {
  int32_t token;    // the first one; -1: no box
  int32_t page;     // as the table has it
  int32_t in_page;  // place of the first token
  int32_t visible;  // tokens
};

__device__ inline Box find_box(const DecodeParams& params, const Maps& maps, const Item& item,
                               int32_t step, int32_t tile_in_step, int32_t box) {
  constexpr Box kNone = {-1, 0, 0, 0};
  if (step >= item.steps.num_steps) return kNone;
  const auto positions = item.steps.positions(step);
  const int32_t slot =
      positions.begin * params.unit_size + tile_in_step * kTileTokens + box * kBoxTokens;
  if (slot >= positions.end * params.unit_size) return kNone;
  const int32_t position = maps.unit_size.quotient(slot);
  const int32_t token =
      item.walk.unit_at(position) * params.unit_size + slot - position * params.unit_size;
  const int32_t begin = token > item.visible.begin ? token : item.visible.begin;
  const int32_t end = token + kBoxTokens < item.visible.end ? token + kBoxTokens : item.visible.end;
  // A box without a visible token would ask for a page that may not exist.
  if (begin >= end) return kNone;
  const int32_t entry = maps.page_size.quotient(token);
  return {token, item.block_table[entry], token - entry * params.page_size, end - begin};
}

template <int kDim, int kStages>
struct Stages {
  unsigned char keys[kStages][TileShape<kDim>::kTileBytes];
  unsigned char values[kStages][TileShape<kDim>::kTileBytes];
  TileInfo info[kStages];
  Barrier full[kStages], empty[kStages];

  __device__ void init() {
    for (int i = 0; i < kStages; ++i) {
      full[i].init(1);
      empty[i].init(1);
    }
  }
};

// Stages as the producing warp sees them: it waits for one to be empty, fills it, and so on.
template <int kDim, int kStages>
class Producer {
 public:
  __device__ Producer(const DecodeParams& params, const Maps& maps, Stages<kDim, kStages>& stages)
      : params_(params), maps_(maps), stages_(stages), policy_(read_once_policy()) {}

  __device__ void wait_for(int stage) { stages_.empty[stage].wait(rounds_ >> stage & 1 ^ 1); }

  // Fills a stage that wait_for() found empty. Called by the whole warp: lanes 0 to 3 hold the
  // tile's boxes.
  __device__ void fill(int stage, const Item& item, int32_t step, const Box& box) {
    rounds_ ^= 1u << stage;
    const int lane = threadIdx.x % 32;
    int32_t tokens = lane < kBoxes ? box.visible : 0;
    tokens += __shfl_xor_sync(~0u, tokens, 1);
    tokens += __shfl_xor_sync(~0u, tokens, 2);
    const bool exists = lane < kBoxes && box.token >= 0;
    const uint32_t boxes = __popc(__ballot_sync(~0u, exists));
    TileInfo& info = stages_.info[stage];
    if (lane < kBoxes) info.box_token[lane] = box.token;
    if (lane == 0) {
      info.step = step;
      info.visible = item.visible;
      info.tokens = tokens;
    }
    __syncwarp();
    Barrier& full = stages_.full[stage];
    if (lane == 0) full.arrive_and_expect(boxes * 2 * TileShape<kDim>::kBoxBytes);
    __syncwarp();
    if (!exists) return;
    const int32_t page = page_inside(params_, box.page);
    const uint32_t at = lane * TileShape<kDim>::kBoxBytes;
    copy_box(stages_.keys[stage] + at, &maps_.key, full, box.in_page,
             params_.key.head_stride == 0 ? 0 : item.kv_head, page, policy_);
    copy_box(stages_.values[stage] + at, &maps_.value, full, box.in_page,
             params_.value.head_stride == 0 ? 0 : item.kv_head, page, policy_);
  }

  // Tells the consumers of every `producers`-th stage that nothing follows.
  __device__ void finish(int first_stage, int producers) {
    for (int stage = first_stage; stage < kStages; stage += producers) {
      wait_for(stage);
      rounds_ ^= 1u << stage;
      if (threadIdx.x % 32 != 0) continue;
      stages_.info[stage].step = -1;
      stages_.full[stage].arrive();
    }
  }

 private:
  const DecodeParams& params_;
  const Maps& maps_;
  Stages<kDim, kStages>& stages_;
  const uint64_t policy_;
  uint32_t rounds_ = 0;  // a bit for each stage: how often it was filled, modulo two
};

// Fills the stages with steps first, first + stride, ... of an item, until it `is_finished()`. All
// tiles of a step go through one stage; steps take the stages in turn. Several producers, of number
// 0 and up, take the steps and with them the stages in turn: there are a multiple of stages.
template <int kDim, int kStages, class IsFinished>
__device__ void produce(const DecodeParams& params, const Maps& maps, const Item& shared_item,
                        Stages<kDim, kStages>& stages, int producers, int number, int32_t first,
                        int32_t stride, const IsFinished& is_finished) {
  constexpr int kFound = 32 / kBoxes;  // tiles whose boxes the warp finds at once
  // It looks at most of the item again and again, and has the registers.
  const Item item = shared_item;
  const int32_t per_step = maps.tiles_per_step.divisor;
  const int lane = threadIdx.x % 32;
  first += number * stride;
  stride *= producers;
  const auto find = [&](int32_t first_tile) {
    const int32_t tile = first_tile + lane / kBoxes, turn = maps.tiles_per_step.quotient(tile);
    return find_box(params, maps, item, first + turn * stride, tile - turn * per_step,
                    lane % kBoxes);
  };
  Producer<kDim, kStages> producer(params, maps, stages);
  Box found = {}, next = find(0);
  int32_t tile = 0;
  int stage = number;
  bool ends = false;
  for (int32_t step = first; step < item.steps.num_steps && !ends; step += stride) {
    for (int32_t i = 0; i < per_step && !ends; ++i, ++tile) {
      if (tile % kFound == 0) {
        found = next;
        // The page ids arrive while the stages are still full.
        next = find(tile + kFound);
      }
      const int from = tile % kFound * kBoxes + lane % kBoxes;
      const Box box = {__shfl_sync(~0u, found.token, from), __shfl_sync(~0u, found.page, from),
                       __shfl_sync(~0u, found.in_page, from),
                       __shfl_sync(~0u, found.visible, from)};
      producer.wait_for(stage);
      ends = __any_sync(~0u, is_finished());
      if (!ends) producer.fill(stage, item, step, box);
    }
    stage = stage + producers < kStages ? stage + producers : number;
  }
  producer.finish(number, producers);
}

// A consuming warp's view of its stages, of which every kWarps-th one is its own.
template <class T, int kDim, int kHeadTiles, int kWarps, int kStages>
class Consumer {
  static_assert(kStages % kWarps == 0);

 public:
  __device__ Consumer(const DecodeParams& params, Stages<kDim, kStages>& stages,
                      const QueryTile<T, kDim, kHeadTiles>& query)
      : stages_(stages),
        query_(query),
        attention_(params),
        num_tiles_(tiles_per_step(params)),
        stage_(threadIdx.x / 32) {}

  // Computes the next step. Returns its number; -1: there is none. Where `skips()` is true the
  // step is taken without looking at it.
  template <class Skips>
  __device__ int32_t next(const Item& item, const Skips& skips, Partial<kDim, kHeadTiles>& partial,
                          int32_t& tokens) {
    int32_t step = 0;
    tokens = 0;
    for (int32_t i = 0; i < num_tiles_ && step >= 0; ++i) {
      stages_.full[stage_].wait(rounds_ >> stage_ & 1);
      rounds_ ^= 1u << stage_;
      const TileInfo& info = stages_.info[stage_];
      step = info.step;
      // Asked once for all lanes: the answer may change at any time.
      if (step >= 0 && !__any_sync(~0u, skips())) {
        tokens += info.tokens;
        attention_.run(item.kv_head, query_, stages_.keys[stage_], stages_.values[stage_], info,
                       i == 0, partial);
      }
      __syncwarp();
      if (threadIdx.x % 32 == 0) stages_.empty[stage_].arrive();
    }
    if (kStages > kWarps) stage_ = stage_ + kWarps < kStages ? stage_ + kWarps : threadIdx.x / 32;
    return step;
  }

 private:
  Stages<kDim, kStages>& stages_;
  const QueryTile<T, kDim, kHeadTiles>& query_;
  const TileAttention<T, kDim, kHeadTiles> attention_;
  const int32_t num_tiles_;
  int stage_;
  uint32_t rounds_ = 0;  // a bit for each stage: how often it was emptied, modulo two
};

}  // namespace art::cuda::sm90
