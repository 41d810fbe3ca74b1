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
      for (int ht = 0; ht < kHeadTiles; ++ht) weigh(ht, table);
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

  // Each row of lanes forms the scalars of its step, for the heads of one pair. Rows past the end
  // of the batch change nothing.
  __device__ void weigh(int ht, StepTable<kHeadTiles>& table) {
    const int pair = kLanePairs * ht + lane_ % 4;
    const bool exists = row_ < steps_of(batch_) && pair < plan_.layout.pairs;
    const float4 sent = exists ? *exchange_.states((batch_ << sizes_.batch_log2) + row_, pair)
                               : make_float4(-INFINITY, 0.0f, -INFINITY, 0.0f);
    const SoftmaxState incoming[2] = {{sent.x, sent.y}, {sent.z, sent.w}};
    SoftmaxState after[2];
    FoldFactors factors[2];
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const float before = states_[ht][column].max;
      float max = incoming[column].max;
#pragma unroll
      for (int other = 4; other <= 16; other *= 2) {
        const float earlier = __shfl_up_sync(~0u, max, other);
        if (lane_ >= other) max = fmaxf(max, earlier);
      }
      max = fmaxf(max, before);
      const float last = __shfl_up_sync(~0u, max, 4);
      // We don't want (-inf) - (-inf), since that would give NaN.
      const float reference = max == -INFINITY ? 0.0f : max;
      factors[column] = {expf((row_ == 0 ? before : last) - reference),
                         expf(incoming[column].max - reference)};
      after[column] = {max, states_[ht][column].sum};
    }
    table.factors[ht][row_][lane_ % 4] = make_float4(factors[0].running, factors[0].incoming,
                                                     factors[1].running, factors[1].incoming);
    table.sums[ht][row_][lane_ % 4] =
        make_float4(factors[0].running, incoming[0].sum * factors[0].incoming, factors[1].running,
                    incoming[1].sum * factors[1].incoming);
    __syncwarp();
    float before[2] = {};
#pragma unroll
    for (int i = 0; i < kBatchSteps; ++i) {
      const float4 part = table.sums[ht][i][lane_ % 4];
      if (i > row_) continue;
      before[0] = after[0].sum, before[1] = after[1].sum;
      after[0].sum = fmaf(after[0].sum, part.x, part.y);
      after[1].sum = fmaf(after[1].sum, part.z, part.w);
    }
    table.states[ht][row_][lane_ % 4] =
        make_float4(after[0].max, after[0].sum, after[1].max, after[1].sum);
    __syncwarp();  // all rows have read the factors that make room for the earlier mass
    float4& sums = table.sums[ht][row_][lane_ % 4];
    sums.x = before[0] * factors[0].running, sums.z = before[1] * factors[1].running;
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      states_[ht][column] = {__shfl_sync(~0u, after[column].max, 28 + lane_ % 4),
                             __shfl_sync(~0u, after[column].sum, 28 + lane_ % 4)};
    }
  }

  const ClusterPlan& plan_;
  const CudaExchange& sizes_;
  const Exchange& exchange_;
  Shared& shared_;
  const int32_t num_steps_;
  const int lane_, row_;
  const int32_t num_batches_;
  const uint32_t step_bytes_;  // of one step's result for this thread block
  int32_t batch_ = 0;          // the next one to be waited for
  SoftmaxState states_[kHeadTiles][2];
};

}  // namespace art::cuda::sm90
