// The warp of a thread block that waits for results and forms the scalars of folding them.
#pragma once

#include "core/item.h"
#include "cuda/sm90/exchange.cuh"

namespace art::cuda::sm90 {

template <int kDim, int kHeadTiles>
class Weigher {
  using Shared = ExchangeShared<kDim, kHeadTiles>;
  static constexpr int kSlices = num_slices(kDim);

 public:
  __device__ Weigher(const ClusterPlan& plan, const Exchange& exchange, Shared& shared,
                     const Item& item, int32_t rank)
      : plan_(plan),
        sizes_(plan.layout.sizes),
        exchange_(exchange),
        shared_(shared),
        num_steps_(item.steps.num_steps),
        lane_(threadIdx.x % 32),
        row_(lane_ / 4),
        num_batches_(sizes_.num_batches(num_steps_)),
        step_bytes_(exchange.step_bytes((kSlices - rank + plan.blocks() - 1) >> plan.blocks_log2)) {
  }

  // All batches, or until the item ends.
  __device__ void run() {
    if (lane_ == 0) {
      for (int32_t batch = 0; batch < sizes_.ring_batches(); ++batch) expect(batch);
    }
    for (; batch_ < num_batches_; ++batch_) {
      Barrier& full = shared_.full[sizes_.ring_place(batch_)];
      while (!__all_sync(~0u, full.is_over(sizes_.ring_parity(batch_)))) {
        if (__any_sync(~0u, shared_.stop != 0)) return;
      }
      if (lane_ == 0) expect(batch_ + sizes_.ring_batches());
      StepTable<kHeadTiles>& table = shared_.tables[sizes_.ring_place(batch_)];
#pragma unroll
      for (int ht = 0; ht < kHeadTiles; ++ht) {
        if (2 * plan_.layout.pairs <= kLanePairs) {
          weigh<1>(ht, table);
        } else {
          weigh<2>(ht, table);
        }
      }
      __syncwarp();
      if (lane_ == 0) shared_.weighed[sizes_.ring_place(batch_)].arrive();
    }
  }

  // Waits for what is still on its way to this thread block; when all others are done.
  __device__ void drain(int num_warps) const {
    if (shared_.stop == 0) return;
    const int32_t end = batch_ + sizes_.ring_batches();
    for (int32_t batch = batch_; batch < num_batches_ && batch < end; ++batch) {
      const int32_t step = (batch << sizes_.batch_log2) + lane_, turn = step >> plan_.blocks_log2;
      const int32_t block = step & (plan_.blocks() - 1);
      const bool comes =
          lane_ < steps_of(batch) && shared_.sent_steps[block][turn % num_warps] > turn / num_warps;
      const int32_t missing = steps_of(batch) - __popc(__ballot_sync(~0u, comes));
      Barrier& full = shared_.full[sizes_.ring_place(batch)];
      if (lane_ == 0 && missing > 0) full.complete(missing * step_bytes_);
      full.wait(sizes_.ring_parity(batch));
    }
  }

 private:
  __device__ int32_t steps_of(int32_t batch) const { return sizes_.steps_in(batch, num_steps_); }
  __device__ void expect(int32_t batch) const {
    if (batch >= num_batches_) return;
    shared_.full[sizes_.ring_place(batch)].arrive_and_expect(steps_of(batch) * step_bytes_);
  }

  // Each row of lanes forms the scalars of its step; a lane those of one pair of heads, or of one
  // head where four lanes are enough for all. Rows past the end of the batch change nothing.
  template <int kHeads>
  __device__ void weigh(int ht, StepTable<kHeadTiles>& table) {
    using Scalars = HeadScalars<kHeads>;
    const int pair = kLanePairs * ht + kHeads * (lane_ % 4) / 2;
    const bool exists = row_ < steps_of(batch_) && pair < plan_.layout.pairs;
    const float4* tile = exchange_.states((batch_ << sizes_.batch_log2) + row_, kLanePairs * ht);
    Scalars sent = {};
    if (exists) sent = own<kHeads>(tile);
    Scalars factors, sums, after;
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      const float incoming = exists ? sent.of[head].x : -INFINITY;
      const float before = states_[ht][head].max;
      float max = incoming;
#pragma unroll
      for (int other = 4; other <= 16; other *= 2) {
        const float earlier = __shfl_up_sync(~0u, max, other);
        if (lane_ >= other) max = fmaxf(max, earlier);
      }
      max = fmaxf(max, before);
      const float last = __shfl_up_sync(~0u, max, 4);
      // We don't want (-inf) - (-inf), since that would give NaN.
      const float reference = max == -INFINITY ? 0.0f : max;
      const float running = expf((row_ == 0 ? before : last) - reference);
      const float factor = expf(incoming - reference);
      factors.of[head] = make_float2(running, factor);
      sums.of[head] = make_float2(running, sent.of[head].y * factor);
      after.of[head] = make_float2(max, states_[ht][head].sum);
    }
    own<kHeads>(table.factors[ht][row_]) = factors;
    own<kHeads>(table.sums[ht][row_]) = sums;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kBatchSteps; ++i) {
      const Scalars part = own<kHeads>(table.sums[ht][i]);
#pragma unroll
      for (int head = 0; head < kHeads; ++head) {
        float& sum = after.of[head].y;
        if (i <= row_) sum = fmaf(sum, part.of[head].x, part.of[head].y);
      }
    }
    own<kHeads>(table.states[ht][row_]) = after;
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      states_[ht][head] = {__shfl_sync(~0u, after.of[head].x, 28 + lane_ % 4),
                           __shfl_sync(~0u, after.of[head].y, 28 + lane_ % 4)};
    }
  }

  // What a lane has of a row of pairs.
  template <int kHeads>
  struct alignas(8 * kHeads) HeadScalars {
    float2 of[kHeads];
  };
  template <int kHeads>
  __device__ HeadScalars<kHeads>& own(float4* pairs) const {
    return reinterpret_cast<HeadScalars<kHeads>*>(pairs)[lane_ % 4];
  }
  template <int kHeads>
  __device__ const HeadScalars<kHeads>& own(const float4* pairs) const {
    return reinterpret_cast<const HeadScalars<kHeads>*>(pairs)[lane_ % 4];
  }

  const ClusterPlan& plan_;
  const CudaExchange& sizes_;
  const Exchange& exchange_;
  Shared& shared_;
  const int32_t num_steps_;
  const int lane_, row_;
  const int32_t num_batches_;
  const uint32_t step_bytes_;           // of one step's result for this thread block
  int32_t batch_ = 0;                   // the next one to be waited for
  SoftmaxState states_[kHeadTiles][2];  // of the lane's heads, after the batch before
};

}  // namespace art::cuda::sm90
