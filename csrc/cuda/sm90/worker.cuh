// The warps of a cluster that compute steps and send the results to the warps that fold.
#pragma once

#include "cuda/sm90/exchange.cuh"
#include "cuda/sm90/stages.cuh"

namespace art::cuda::sm90 {

template <int kDim, int kHeadTiles>
class Worker {
  using Shared = ExchangeShared<kDim, kHeadTiles>;

 public:
  __device__ Worker(const DecodeParams& params, const ClusterPlan& plan, const Exchange& exchange,
                    Shared& shared)
      : plan_(plan),
        exchange_(exchange),
        shared_(shared),
        pairs_((params.group_size + 1) / 2),
        needs_verdicts_(may_stop(params)),
        lane_(threadIdx.x % 32) {
    const int32_t rank = lane_ / kFolders;
    const FolderShare folder(plan, rank, lane_ % kFolders);
    waits_ = rank < plan.blocks() && folder.has_work(num_slices(kDim), may_stop(params));
  }

  // Until the stages end or the item does; returns the number of results that were sent.
  template <class Consumer>
  __device__ int32_t run(Consumer& consumer, const Item& item) const {
    int32_t sent = 0;
    while (true) {
      Partial<kDim, kHeadTiles> partial;
      int32_t tokens;
      const int32_t step = consumer.next(item, [&] { return shared_.stop != 0; }, partial, tokens);
      if (step < 0) return sent;
      if (!may_send(step)) continue;
      send_result(step, partial);
      ++sent;
    }
  }

 private:
  // Waits until the ring slot of a step is free in every thread block: what was there is folded,
  // and known not to be the end. Each lane looks at one folding warp.
  __device__ bool may_send(int32_t step) const {
    const CudaExchange& sizes = plan_.layout.sizes;
    const int32_t needed = sizes.batch_of(step) + 1 - sizes.ring_batches();
    while (true) {
      const bool is_folded = !waits_ || shared_.folded[lane_] >= needed;
      const bool is_known =
          !needs_verdicts_ || shared_.known[lane_ & (plan_.blocks() - 1)] >= needed;
      const bool is_free = __all_sync(~0u, is_folded && is_known);
      if (__any_sync(~0u, shared_.stop != 0)) return false;
      if (is_free) return true;
      __nanosleep(32);
    }
  }

  __device__ void send_result(int32_t step, const Partial<kDim, kHeadTiles>& partial) const {
    constexpr int kSlices = num_slices(kDim);
    const CudaExchange& sizes = plan_.layout.sizes;
    const int32_t blocks = plan_.blocks(), row = lane_ / 4;
    Barrier& full = shared_.full[sizes.ring_place(sizes.batch_of(step))];
#pragma unroll
    for (int ht = 0; ht < kHeadTiles; ++ht) {
      const int pair = kLanePairs * ht + lane_ % 4;
      if (pair >= pairs_) continue;
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
        const int32_t block = slice & (blocks - 1);
        const float (&v)[4] = partial.values[ht][slice];
        send(remote_address(exchange_.values(step, slice >> plan_.blocks_log2, row, pair), block),
             make_float4(v[0], v[1], v[2], v[3]), remote_address(&full, block));
      }
      // Every row of lanes has the states: one sends to each thread block that has slices.
      if (row < blocks && row < kSlices) {
        const SoftmaxState &low = partial.softmax[ht][0], &high = partial.softmax[ht][1];
        send(remote_address(exchange_.states(step, pair), row),
             make_float4(low.max, low.sum, high.max, high.sum), remote_address(&full, row));
      }
    }
  }

  const ClusterPlan& plan_;
  const Exchange& exchange_;
  Shared& shared_;
  const int32_t pairs_;
  const bool needs_verdicts_;
  const int lane_;
  bool waits_;  // for the folding warp that this lane looks at
};

}  // namespace art::cuda::sm90
