// The thread blocks of a team that compute steps: consuming warps, a producing one, and one that
// watches how far the item has been folded.
#pragma once

#include "cuda/sm90/kernel.cuh"
#include "cuda/sm90/ring.cuh"
#include "cuda/sm90/stages.cuh"

namespace art::cuda::sm90 {

template <class T, int kDim, int kHeadTiles>
struct WorkerShared {
  static constexpr int kConsumers = num_team_stages(kDim, kHeadTiles);  // warps
  Stages<kDim, kConsumers> stages;
  // A step's result as it will lie in the ring, one for each consuming warp.
  float4 results[kConsumers][slot_pieces(kDim, 4 * kHeadTiles)];
  QueryTile<T, kDim, kHeadTiles> query;
  Item item;
  // Of the item at hand.
  volatile int32_t folded_steps;  // kept up to date by the watching warp
  int32_t ended;                  // consuming warps that have nothing left to do
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
        lane_(threadIdx.x % 32) {}

  // All items of a team, one after the other.
  template <int kThreads>
  __device__ void run(const ListedWalks& walks, int32_t team) {
    const int32_t num_items = params_.batch * params_.num_kv_heads;
    for (int32_t index = team; index < num_items; index += space_.num_teams) {
      // In shared memory, because the consuming warps have no registers to spare for it.
      if (threadIdx.x == 0) {
        shared_.item = find_item(params_, walks, index);
        shared_.folded_steps = 0;
        shared_.ended = 0;
      }
      __syncthreads();
      const Item& item = shared_.item;
      shared_.query.load(params_, item.batch, item.kv_head * params_.group_size, params_.group_size,
                         threadIdx.x, kThreads);
      __syncthreads();
      if (warp_ < Shared::kConsumers) consume(item, index);
      if (warp_ == kThreads / 32 - 2) watch(index);
      if (warp_ == kThreads / 32 - 1) produce(item, index);
      __syncthreads();
    }
  }

 private:
  // Steps that were claimed together, and where their tiles are: lane l holds box l % kBoxes of
  // tile l / kBoxes.
  struct Claim {
    int32_t first_step;
    Box box;
  };
  static constexpr int kFound = 32 / kBoxes;

  __device__ int32_t ask(int32_t index) const {
    return lane_ == 0 ? atomicAdd(&space_.state[index].next_step, space_.claim_steps) : 0;
  }
  __device__ Claim claim(const Item& item, int32_t answer, int32_t per_step) const {
    const int32_t first = __shfl_sync(~0u, answer, 0), tile = lane_ / kBoxes;
    return {first,
            find_box(params_, item, first + tile / per_step, tile % per_step, lane_ % kBoxes)};
  }

  // Two claims ahead, because the answers and then the page ids take their time: what one round
  // asks for is looked at in the next.
  __device__ void produce(const Item& item, int32_t index) {
    const int32_t per_step = tiles_per_step(params_);
    int32_t first = ask(index), second = ask(index), answer = ask(index);
    Claim now = claim(item, first, per_step), next = claim(item, second, per_step);
    int stage = 0;
    while (now.first_step < item.steps.num_steps && !is_stopped()) {
      for (int32_t i = 0; i < space_.claim_steps; ++i) {
        const int32_t step = now.first_step + i;
        if (step >= item.steps.num_steps || is_stopped()) break;
        copy_step(item, now, i, per_step, stage);
        stage = (stage + 1) % Shared::kConsumers;
      }
      now = next;
      next = claim(item, answer, per_step);
      answer = ask(index);
    }
    producer_.finish();
  }

  __device__ bool is_stopped() const { return __any_sync(~0u, shared_.folded_steps >= kStopped); }

  __device__ void copy_step(const Item& item, const Claim& claim, int32_t in_claim,
                            int32_t per_step, int stage) {
    const int32_t step = claim.first_step + in_claim;
    for (int32_t i = 0; i < per_step; ++i) {
      const int32_t tile = in_claim * per_step + i;
      Box box;
      if (tile < kFound) {
        const int from = tile * kBoxes + lane_ % kBoxes;
        box = {__shfl_sync(~0u, claim.box.token, from), __shfl_sync(~0u, claim.box.page, from),
               __shfl_sync(~0u, claim.box.visible, from)};
      } else {
        box = find_box(params_, item, step, i, lane_ % kBoxes);
      }
      producer_.wait_for(stage);
      producer_.fill(stage, item, step, box);
    }
  }

  __device__ void watch(int32_t index) {
    int32_t folded = 0;
    const volatile int32_t& ended = shared_.ended;
    while (folded < kStopped && ended < Shared::kConsumers) {
      folded = load_relaxed(&space_.state[index].folded_steps);
      if (lane_ == 0) shared_.folded_steps = folded;
    }
  }

  // While a result is on its way to the ring, the next tile is on its way here.
  __device__ void consume(const Item& item, int32_t index) {
    Partial<kDim, kHeadTiles> partial;
    int32_t tokens;
    while (true) {
      const int32_t step = consumer_.next(item, [] { return false; }, partial, tokens);
      if (step < 0) break;
      store(partial);
      __syncwarp();
      if (lane_ == 0) send(index, step);
      // Nobody writes the next result before this one has left.
      __syncwarp();
    }
    if (lane_ == 0) atomicAdd(&shared_.ended, 1);
  }

  __device__ void send(int32_t index, int32_t step) {
    const int pairs = head_pairs_of<kHeadTiles>(params_.group_size);
    const Ring ring(space_, index, slot_pieces(kDim, pairs));
    // A slot is free when the step that used it last has been folded.
    int32_t folded;
    while ((folded = shared_.folded_steps) + ring.num_steps <= step) {
    }
    if (folded >= kStopped) return;
    store_bytes(ring.slot(step), shared_.results[warp_], ring.pieces * sizeof(float4));
    wait_for_stores();
    store_release(ring.flag(step), step + 1);
  }

  __device__ void store(const Partial<kDim, kHeadTiles>& partial) {
    const int pairs = head_pairs_of<kHeadTiles>(params_.group_size);
    float4* values = shared_.results[warp_] + lane_ / 4 * pairs;
    float4* states = shared_.results[warp_] + value_pieces(kDim, pairs);
#pragma unroll
    for (int ht = 0; ht < kHeadTiles; ++ht) {
      const int pair = 4 * ht + lane_ % 4;
      if (pair >= pairs) continue;
#pragma unroll
      for (int i = 0; i < kDim / 16; ++i) {
        const float (&v)[4] = partial.values[ht][i];
        values[i * 8 * pairs + pair] = make_float4(v[0], v[1], v[2], v[3]);
      }
      const SoftmaxState &low = partial.softmax[ht][0], &high = partial.softmax[ht][1];
      if (lane_ < 4) states[pair] = make_float4(low.max, low.sum, high.max, high.sum);
    }
    // The copy engine reads them.
    fence_copy_engine_shared();
  }

  const DecodeParams& params_;
  const TeamSpace& space_;
  Shared& shared_;
  Producer<kDim, Shared::kConsumers> producer_;
  Consumer<T, kDim, kHeadTiles, Shared::kConsumers> consumer_;
  const int warp_, lane_;
};

}  // namespace art::cuda::sm90
