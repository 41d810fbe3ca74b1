// The warp of a cluster that decides whether to go on reading.
#pragma once

#include "cuda/sm90/exchange.cuh"
#include "cuda/sm90/output.cuh"

namespace art::cuda::sm90 {

template <int kDim, int kHeadTiles>
class Decider {
  using Shared = ExchangeShared<kDim, kHeadTiles>;
  static constexpr int kSlices = num_slices(kDim);

 public:
  __device__ Decider(const DecodeParams& params, const ClusterPlan& plan, const Exchange& exchange,
                     Shared& shared, const Item& item)
      : params_(params),
        plan_(plan),
        sizes_(plan.layout.sizes),
        exchange_(exchange),
        shared_(shared),
        item_(item),
        lane_(threadIdx.x % 32),
        num_batches_(sizes_.num_batches(item.steps.num_steps)) {}

  __device__ void run() {
    if (lane_ == 0) {
      for (int32_t batch = 0; batch < sizes_.pending(); ++batch) expect(batch);
    }
    PatienceCounter patience;
    const int32_t starting = item_.steps.num_start_steps > 1 ? item_.steps.num_start_steps : 1;
    while (batch_ < num_batches_ && last_step_ < 0) {
      const int32_t first = batch_ << sizes_.batch_log2;
      const int32_t count = steps_of(batch_);
      judged(batch_).wait(sizes_.pending_parity(batch_));
      const uint32_t unstable = unstable_steps(count);
      for (int32_t i = starting > first ? starting - first : 0; i < count && last_step_ < 0; ++i) {
        if (patience.completes(!(unstable >> i & 1), params_.patience)) last_step_ = first + i;
      }
      if (lane_ == 0 && last_step_ < 0) expect(batch_ + sizes_.pending());
      __syncwarp();
      // Where the item ends is all that the others need to know: it orders nothing.
      if (lane_ < plan_.blocks()) {
        if (last_step_ >= 0) {
          send_word(remote_address(&shared_.stop, lane_), last_step_ + 1);
        } else {
          arrive_remotely(remote_address(&shared_.decided[sizes_.ring_place(batch_)], lane_));
        }
      }
      ++batch_;
    }
  }

  __device__ void write_result(int32_t index) const {
    const int32_t end = last_step_ >= 0 ? last_step_ + 1 : item_.steps.num_steps;
    const int32_t tokens =
        tokens_in(params_, item_, end == 0 ? 0 : item_.steps.positions(end - 1).end);
    if (lane_ != 0) return;
    params_.tokens_read[index] = tokens;
    params_.stop_block[index] = last_step_ >= 0 ? item_.steps.block_of(last_step_) : -1;
  }

  // Waits for the moments that are still on their way; when all others are done.
  __device__ void drain() const {
    if (last_step_ < 0) return;
    const int32_t rank = lane_ / kFolders;
    const FolderShare folder(plan_, rank, lane_ % kFolders);
    const bool has_work = rank < plan_.blocks() && folder.first < kSlices;
    const int32_t end = batch_ - 1 + sizes_.pending();
    for (int32_t batch = batch_; batch < num_batches_ && batch < end; ++batch) {
      // Each lane looks at one folding warp.
      const bool is_judge = has_work && (batch & ((1 << plan_.judges_log2) - 1)) == folder.turn;
      const bool is_missing = is_judge && shared_.sent_moments[lane_] <= batch;
      const int32_t missing = __reduce_add_sync(~0u, is_missing ? folder.num_slices(kSlices) : 0);
      if (lane_ == 0 && missing > 0) judged(batch).complete(missing * bytes_of(batch));
      judged(batch).wait(sizes_.pending_parity(batch));
    }
  }

 private:
  __device__ int32_t steps_of(int32_t batch) const {
    return sizes_.steps_in(batch, item_.steps.num_steps);
  }
  // Of one slice.
  __device__ uint32_t bytes_of(int32_t batch) const {
    return steps_of(batch) * exchange_.moment_bytes();
  }
  __device__ Barrier& judged(int32_t batch) const {
    return shared_.judged[sizes_.pending_place(batch)];
  }

  __device__ void expect(int32_t batch) const {
    if (batch < num_batches_) judged(batch).arrive_and_expect(kSlices * bytes_of(batch));
  }

  // A bit for each step of the batch that is not stable. Each lane looks at step lane / 4 and the
  // heads of pair lane % 4.
  __device__ uint32_t unstable_steps(int32_t count) const {
    const StabilityThresholds thresholds = thresholds_of(params_, item_.kv_head);
    const int row = lane_ / 4;
    bool stable = true;
#pragma unroll
    for (int ht = 0; ht < kHeadTiles; ++ht) {
      const int pair = kLanePairs * ht + lane_ % 4;
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        if (row >= count || 2 * pair + column >= params_.group_size) continue;
        stable = stable && is_stable(output_change(moments_of(row, pair, column)), thresholds);
      }
    }
    return __reduce_or_sync(~0u, stable ? 0 : 1u << row);
  }

  // Adds up the slices in their order.
  __device__ IncrementMoments moments_of(int row, int pair, int column) const {
    IncrementMoments sums = {};
    float scale = 1.0f;
    bool is_scaled = false;
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      const float4 part = *exchange_.moments(batch_, slice, column, row, pair);
      sums.aa += part.x;
      sums.ad += part.y;
      sums.dd += part.z;
      is_scaled = is_scaled || part.w != 1.0f;
      scale = fminf(scale, part.w);
    }
    return is_scaled ? scaled_moments_of(row, pair, column) : sums;
  }

  // Slices were scaled on their own, by powers of two: they are brought to the scale of the
  // largest one.
  __device__ IncrementMoments scaled_moments_of(int row, int pair, int column) const {
    float scale = INFINITY;
#pragma unroll 1
    for (int slice = 0; slice < kSlices; ++slice) {
      const float4 part = *exchange_.moments(batch_, slice, column, row, pair);
      // A slice of zeros has no scale.
      if (part.x > 0.0f || part.z > 0.0f) scale = fminf(scale, part.w);
    }
    IncrementMoments sums = {};
#pragma unroll 1
    for (int slice = 0; slice < kSlices; ++slice) {
      const float4 part = *exchange_.moments(batch_, slice, column, row, pair);
      const float ratio = scale < part.w ? scale / part.w : 1.0f;
      sums.aa += part.x * ratio * ratio;
      sums.ad += part.y * ratio * ratio;
      sums.dd += part.z * ratio * ratio;
    }
    return sums;
  }

  const DecodeParams& params_;
  const ClusterPlan& plan_;
  const CudaExchange& sizes_;
  const Exchange& exchange_;
  Shared& shared_;
  const Item& item_;
  const int lane_;
  const int32_t num_batches_;
  int32_t batch_ = 0;       // the next one to be judged
  int32_t last_step_ = -1;  // the one that completed patience
};

}  // namespace art::cuda::sm90
