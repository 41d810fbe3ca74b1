// The thread blocks of a team that compute steps: consuming warps leave their results in shared
// memory, and one thread passes them on, since waiting for global memory would keep a warp from its
// next step.
#pragma once

#include "cuda/sm90/kernel.cuh"
#include "cuda/sm90/ring.cuh"
#include "cuda/sm90/stages.cuh"

namespace art::cuda::sm90 {

template <class T, int kDim, int kHeadTiles>
struct WorkerShared {
  static constexpr int kConsumers = num_stages(kDim, kHeadTiles);  // warps
  Stages<kDim, kConsumers> stages;
  // A step's result as it will lie in the ring, one for each consuming warp.
  float4 results[kConsumers][slot_pieces(kDim, 4 * kHeadTiles)];
  int32_t result_step[kConsumers];  // -1: nothing follows
  Barrier result_full[kConsumers], result_empty[kConsumers];
  QueryTile<T, kDim, kHeadTiles> query;
  Item item;

  __device__ void init() {
    stages.init();
    for (int i = 0; i < kConsumers; ++i) {
      result_full[i].init(1);
      result_empty[i].init(1);
    }
  }
};

template <class T, int kDim, int kHeadTiles>
class Worker {
  using Shared = WorkerShared<T, kDim, kHeadTiles>;

 public:
  __device__ Worker(const DecodeParams& params, const TeamSpace& space, const Maps& maps,
                    Shared& shared)
      : params_(params),
        space_(space),
        shared_(shared),
        producer_(params, maps, shared.stages),
        consumer_(params, shared.stages, shared.query),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        pairs_(head_pairs(params.group_size)) {}

  // All items of a team, one after the other.
  template <int kThreads>
  __device__ void run(const ListedWalks& walks, int32_t team) {
    const int32_t num_items = params_.batch * params_.num_kv_heads;
    for (int32_t index = team; index < num_items; index += space_.num_teams) {
      // In shared memory, because the consuming warps have no registers to spare for it.
      if (threadIdx.x == 0) shared_.item = find_item(params_, walks, index);
      __syncthreads();
      const Item& item = shared_.item;
      shared_.query.load(params_, item.batch, item.kv_head * params_.group_size, params_.group_size,
                         threadIdx.x, kThreads);
      __syncthreads();
      if (warp_ == kThreads / 32 - 1) produce(item, index);
      if (warp_ == kThreads / 32 - 2 && lane_ == 0) pass_on(index);
      if (warp_ < Shared::kConsumers) consume(item);
      __syncthreads();
    }
  }

 private:
  // A step that was claimed, and where the boxes of its first tiles are: those of tile
  // lane / kBoxes in lane `lane`.
  struct Claim {
    int32_t step;
    Box box;
  };

  __device__ int32_t ask(int32_t index) const {
    return lane_ == 0 ? atomicAdd(&space_.state[index].next_step, 1) : 0;
  }
  __device__ Claim claim(const Item& item, int32_t answer) const {
    const int32_t step = __shfl_sync(~0u, answer, 0);
    return {step, find_box(params_, item, step, lane_ / kBoxes, lane_ % kBoxes)};
  }

  // Claims run ahead, because the answers and then the page ids take their time.
  __device__ void produce(const Item& item, int32_t index) {
    constexpr int kAhead = 3;
    int32_t answers[kAhead];
    Claim now = claim(item, ask(index));
    for (int i = 0; i < kAhead; ++i) answers[i] = ask(index);
    Claim next = claim(item, answers[0]);
    for (int stage = 0; now.step < item.steps.num_steps; stage = (stage + 1) % Shared::kConsumers) {
      if (!copy_step(item, index, now, stage)) break;
      now = next;
#pragma unroll
      for (int i = 0; i + 1 < kAhead; ++i) answers[i] = answers[i + 1];
      answers[kAhead - 1] = ask(index);
      next = claim(item, answers[0]);
    }
    producer_.finish();
  }

  // False: the item is finished.
  __device__ bool copy_step(const Item& item, int32_t index, const Claim& claim, int stage) {
    constexpr int kFound = 32 / kBoxes;
    const int32_t num_tiles = tiles_per_step(params_);
    for (int32_t i = 0; i < num_tiles; ++i) {
      Box box;
      if (i < kFound) {
        const int from = i * kBoxes + lane_ % kBoxes;
        box = {__shfl_sync(~0u, claim.box.token, from), __shfl_sync(~0u, claim.box.page, from),
               __shfl_sync(~0u, claim.box.visible, from)};
      } else {
        box = find_box(params_, item, claim.step, i, lane_ % kBoxes);
      }
      const int32_t folded = load_relaxed(&space_.state[index].folded_steps);
      producer_.wait_for(stage);
      if (__any_sync(~0u, folded >= kStopped)) return false;
      producer_.fill(stage, item, claim.step, box);
    }
    return true;
  }

  __device__ void consume(const Item& item) {
    Partial<kDim, kHeadTiles> partial;
    int32_t step = 0, tokens;
    while (step >= 0) {
      step = consumer_.next(item, [] { return false; }, partial, tokens);
      shared_.result_empty[warp_].wait(result_rounds_ ^ 1);
      result_rounds_ ^= 1;
      if (step >= 0) store(partial);
      __syncwarp();
      if (lane_ != 0) continue;
      shared_.result_step[warp_] = step;
      shared_.result_full[warp_].arrive();
    }
  }

  __device__ void store(const Partial<kDim, kHeadTiles>& partial) {
    float4* values = shared_.results[warp_] + lane_ / 4 * pairs_;
    float4* states = shared_.results[warp_] + value_pieces(kDim, pairs_);
#pragma unroll
    for (int ht = 0; ht < kHeadTiles; ++ht) {
      const int pair = 4 * ht + lane_ % 4;
      if (pair >= pairs_) continue;
#pragma unroll
      for (int i = 0; i < kDim / 16; ++i) {
        const float (&v)[4] = partial.values[ht][i];
        values[i * 8 * pairs_ + pair] = make_float4(v[0], v[1], v[2], v[3]);
      }
      const SoftmaxState &low = partial.softmax[ht][0], &high = partial.softmax[ht][1];
      if (lane_ < 4) states[pair] = make_float4(low.max, low.sum, high.max, high.sum);
    }
    // The copy engine reads them.
    fence_copy_engine_shared();
  }

  // ---- one thread

  // Passes results on in the order of the consuming warps. While one is on its way the next may
  // follow.
  __device__ void pass_on(int32_t index) {
    const Ring ring(space_, index, slot_pieces(kDim, pairs_));
    int32_t free_steps = ring.num_steps, sent_step = -1;
    int sent_warp = 0, num_ended = 0;
    for (int warp = 0; num_ended < Shared::kConsumers; warp = (warp + 1) % Shared::kConsumers) {
      Barrier& full = shared_.result_full[warp];
      const uint32_t round = result_rounds_ >> warp & 1;
      if (sent_step >= 0 && !full.is_over(round)) {
        wait_for_stores<0>();
        announce(ring, sent_step, sent_warp);
      }
      full.wait(round);
      result_rounds_ ^= 1u << warp;
      const int32_t step = shared_.result_step[warp];
      if (step < 0 || !wait_for_slot(index, step, free_steps)) {
        num_ended += step < 0;
        shared_.result_empty[warp].arrive();
        continue;
      }
      store_bytes(ring.slot(step), shared_.results[warp], ring.pieces * sizeof(float4));
      if (sent_step >= 0) {
        wait_for_stores<1>();
        announce(ring, sent_step, sent_warp);
      }
      sent_step = step;
      sent_warp = warp;
    }
    if (sent_step < 0) return;
    wait_for_stores<0>();
    announce(ring, sent_step, sent_warp);
  }

  __device__ void announce(const Ring& ring, int32_t& step, int warp) {
    store_release(ring.flag(step), step + 1);
    step = -1;
    shared_.result_empty[warp].arrive();
  }

  // A slot is free when the step that used it last has been folded. False: the item is finished.
  __device__ bool wait_for_slot(int32_t index, int32_t step, int32_t& free_steps) const {
    while (step >= free_steps) {
      const int32_t folded = load_relaxed(&space_.state[index].folded_steps);
      if (folded >= kStopped) return false;
      free_steps = folded + space_.ring_steps;
    }
    return true;
  }

  const DecodeParams& params_;
  const TeamSpace& space_;
  Shared& shared_;
  Producer<kDim, Shared::kConsumers> producer_;
  Consumer<T, kDim, kHeadTiles, Shared::kConsumers> consumer_;
  const int warp_, lane_, pairs_;
  uint32_t result_rounds_ = 0;  // of this warp's result; for the passing thread a bit for each warp
};

}  // namespace art::cuda::sm90
