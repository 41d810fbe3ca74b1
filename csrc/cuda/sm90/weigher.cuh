// The warp of a thread block that waits for results and forms the scalars of folding them.
#pragma once

#include <cfloat>

#include "core/item.h"
#include "cuda/exponential.cuh"
#include "cuda/sm90/exchange.cuh"

namespace art::cuda::sm90 {

// A chain over all steps of an item, and so what bounds a cluster whose thread blocks have little
// to do: each lane has one head and takes the steps of a batch by itself. That is fewer
// instructions than to share them out and to exchange what the lanes find.
template <int kDim, int kHeadTiles>
class Weigher {
  using Shared = ExchangeShared<kDim, kHeadTiles>;
  static constexpr int kSlices = num_slices(kDim);
  static_assert(2 * kLanePairs * kHeadTiles <= 32);

 public:
  __device__ Weigher(const ClusterPlan& plan, const Exchange& exchange, Shared& shared,
                     const Item& item, int32_t rank)
      : plan_(plan),
        sizes_(plan.layout.sizes),
        exchange_(exchange),
        shared_(shared),
        num_steps_(item.steps.num_steps),
        lane_(threadIdx.x % 32),
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
        __nanosleep(plan_.pause_ns);
      }
      if (lane_ < 2 * plan_.layout.pairs) weigh();
      __syncwarp();
      if (lane_ == 0) {
        shared_.weighed[sizes_.ring_place(batch_)].arrive();
        expect(batch_ + sizes_.ring_batches());
      }
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

  // The scalars of the batch at hand for the lane's head. Steps past its end change nothing.
  __device__ void weigh() {
    const int32_t pair = lane_ / 2;
    const float2* states =
        reinterpret_cast<const float2*>(exchange_.states(batch_ << sizes_.batch_log2, pair)) +
        lane_ % 2;
    StepTable<kHeadTiles>& table = shared_.tables[sizes_.ring_place(batch_)];
    const int32_t count = steps_of(batch_);
    float2 sent[kBatchSteps];
    if (count == kBatchSteps) {
#pragma unroll
      for (int i = 0; i < kBatchSteps; ++i) sent[i] = states[2 * i];
    } else {
#pragma unroll
      for (int i = 0; i < kBatchSteps; ++i) {
        sent[i] = i < count ? states[2 * i] : make_float2(-INFINITY, 0.0f);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatchSteps; ++i) {
      const float before = state_.max;
      state_.max = fmaxf(before, sent[i].x);
      // We don't want (-inf) - (-inf), since that would give NaN.
      const float reference = fmaxf(state_.max, -FLT_MAX);
      const FoldFactors factors = {exp2_approximate((before - reference) * kLog2e),
                                   exp2_approximate((sent[i].x - reference) * kLog2e)};
      const float earlier = state_.sum * factors.running, mass = sent[i].y * factors.incoming;
      state_.sum = fmaf(state_.sum, factors.running, mass);
      at(table.factors, i, pair) = make_float2(factors.running, factors.incoming);
      at(table.sums, i, pair) = make_float2(earlier, mass);
      at(table.states, i, pair) = make_float2(state_.max, state_.sum);
    }
  }

  // The lane's half of what the table has of a step.
  __device__ float2& at(float4 (&rows)[kHeadTiles][kBatchSteps][kLanePairs], int step,
                        int32_t pair) const {
    float4& both = rows[pair / kLanePairs][step][pair % kLanePairs];
    return reinterpret_cast<float2*>(&both)[lane_ % 2];
  }

  const ClusterPlan& plan_;
  const CudaExchange& sizes_;
  const Exchange& exchange_;
  Shared& shared_;
  const int32_t num_steps_;
  const int lane_;
  const int32_t num_batches_;
  const uint32_t step_bytes_;  // of one step's result for this thread block
  int32_t batch_ = 0;          // the next one to be waited for
  SoftmaxState state_;         // of the lane's head
};

}  // namespace art::cuda::sm90
