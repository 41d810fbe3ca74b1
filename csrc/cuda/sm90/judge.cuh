// The warp of a thread block that judges batches, which of their steps changed the output little or
// left little, finds the end from the verdicts of all thread blocks, and tells how much was read.
#pragma once

#include "cuda/sm90/exchange.cuh"
#include "cuda/sm90/output.cuh"

namespace art::cuda::sm90 {

// `kRests`: as for Folder.
template <int kDim, int kHeadTiles, bool kRests>
class Judge {
  using Shared = ExchangeShared<kDim, kHeadTiles>;
  static constexpr int kSlices = num_slices(kDim);

 public:
  __device__ Judge(const DecodeParams& params, const ClusterPlan& plan, const Exchange& exchange,
                   Shared& shared, const Item& item, int32_t rank)
      : params_(params),
        plan_(plan),
        sizes_(plan.layout.sizes),
        exchange_(exchange),
        shared_(shared),
        item_(item),
        thresholds_(thresholds_of(params, item)),
        num_steps_(item.steps.num_steps),
        lane_(threadIdx.x % 32),
        num_batches_(sizes_.num_batches(num_steps_)),
        first_compared_(item.steps.num_start_steps > 1 ? item.steps.num_start_steps : 1),
        rank_(rank),
        batch_(rank) {}

  // What there is once an item; when it has ended.
  __device__ void write_result(int32_t index) const {
    // Where this warp has found the end itself, its own word may still be on its way.
    const int32_t stop = stop_ != 0 ? stop_ : shared_.stop;
    const int32_t num_steps = stop != 0 ? stop : num_steps_, last = num_steps - 1;
    const int32_t units = num_steps == 0 ? 0 : item_.steps.positions(last).end;
    const int32_t tokens = tokens_in(params_, item_, units);
    if (lane_ != 0) return;
    params_.tokens_read[index] = tokens;
    params_.stop_block[index] = stop != 0 ? item_.steps.block_of(last) : -1;
  }

  // Judges every batch that is this thread block's turn, and takes note of all verdicts, until the
  // item ends.
  __device__ void run() {
    if (lane_ == 0) {
      for (int32_t i = 0; i < sizes_.inbox_batches(); ++i) expect(batch_ + i * plan_.blocks());
    }
    while (num_known_ < num_batches_ && !__any_sync(~0u, shared_.stop != 0)) {
      if (batch_ < num_batches_ &&
          __all_sync(~0u, moments(batch_).is_over(exchange_.inbox_parity(batch_)))) {
        judge();
        batch_ += plan_.blocks();
      } else if (!take_verdict()) {
        __nanosleep(plan_.pause_ns);
      }
    }
  }

  // Waits for the moments that are still on their way; when all others are done.
  __device__ void drain() const {
    if (shared_.stop == 0) return;
    const int32_t rank = lane_ / kFolders;
    const FolderShare folder(plan_, rank, lane_ % kFolders);
    const bool has_work = rank < plan_.blocks() && folder.first < kSlices;
    for (int32_t i = 0; i < sizes_.inbox_batches(); ++i) {
      const int32_t batch = batch_ + i * plan_.blocks();
      if (batch >= num_batches_) break;
      // Each lane looks at one folding warp.
      const bool is_sender = has_work && (batch & ((1 << plan_.sharers_log2) - 1)) == folder.turn;
      const bool is_missing = is_sender && shared_.sent_moments[lane_] <= batch;
      const int32_t missing = __reduce_add_sync(~0u, is_missing ? folder.num_slices(kSlices) : 0);
      if (lane_ == 0 && missing > 0) moments(batch).complete(missing * bytes_of(batch));
      moments(batch).wait(exchange_.inbox_parity(batch));
    }
  }

 private:
  __device__ void judge() const {
    const uint32_t verdict = verdict_of(batch_, steps_of(batch_));
    if (lane_ == 0) expect(batch_ + plan_.blocks() * sizes_.inbox_batches());
    __syncwarp();
    if (lane_ < plan_.blocks()) {
      send_word(remote_address(&shared_.verdicts[sizes_.ring_place(batch_)], lane_),
                verdict_on(batch_, verdict));
    }
  }

  // Takes note of the next verdict if it is there. If reading goes on after it, the batch's ring
  // slots are free as soon as it is folded.
  __device__ bool take_verdict() {
    const uint32_t verdict = __shfl_sync(~0u, shared_.verdicts[sizes_.ring_place(num_known_)], 0);
    if ((verdict ^ verdict_on(num_known_, 0)) >> kVerdictBits != 0) return false;
    const int32_t first = num_known_ << sizes_.batch_log2, count = steps_of(num_known_);
    const int32_t first_row = first_compared_ > first ? first_compared_ - first : 0;
    const int32_t last =
        kRests ? find_last(~verdict, first_row, count) : find_settled(~verdict, first_row, count);
    ++num_known_;
    // All that see the last verdict say the same.
    if (lane_ < plan_.blocks()) {
      if (last >= 0) {
        send_word(remote_address(&shared_.stop, lane_), first + last + 1);
      } else {
        send_word(remote_address(&shared_.known[rank_], lane_), num_known_);
      }
    }
    if (last >= 0) {
      num_known_ = num_batches_;
      stop_ = first + last + 1;
    }
    return true;
  }

  // The step of a batch that ends the item, or -1; by patience alone, or by both rules. `verdict`
  // has a bit for each step that is stable, and above these one for each that is covered.
  __device__ int32_t find_settled(uint32_t verdict, int32_t first_row, int32_t count) {
    const uint32_t stable = verdict & ((1u << count) - 1);
    return patience_.completes_among(stable, first_row, count, params_.patience);
  }
  __device__ int32_t find_last(uint32_t verdict, int32_t first_row, int32_t count) {
    for (int32_t i = 0; i < count; ++i) {
      const bool settled = params_.use_stability && i >= first_row &&
                           patience_.completes(verdict >> i & 1, params_.patience);
      const bool covered = verdict >> (kBatchSteps + i) & 1;
      if (stops(settled, covered, params_.all_agree)) return i;
    }
    return -1;
  }

  __device__ int32_t steps_of(int32_t batch) const { return sizes_.steps_in(batch, num_steps_); }
  // Of one slice.
  __device__ uint32_t bytes_of(int32_t batch) const {
    return steps_of(batch) * exchange_.moment_bytes();
  }
  __device__ Barrier& moments(int32_t batch) const {
    return shared_.moments[exchange_.inbox_place_of(batch)];
  }
  __device__ void expect(int32_t batch) const {
    if (batch < num_batches_) moments(batch).arrive_and_expect(kSlices * bytes_of(batch));
  }

  // For verdict_on(). Each lane looks at step lane / 4, and at every fourth head.
  __device__ uint32_t verdict_of(int32_t batch, int32_t count) const {
    const int row = lane_ / 4;
    bool stable = true, covered = true;
#pragma unroll
    for (int i = 0; i < 2 * kHeadTiles; ++i) {
      const int32_t g = lane_ % 4 + 4 * i;
      if (row >= count || g >= params_.group_size) continue;
      const OutputChange change = output_change(moments_of(batch, row, g / 2, g % 2));
      stable = stable && is_stable(change, thresholds_);
      if (kRests) {
        covered = covered && exchange_.moments(batch, 0, g % 2, row, g / 2)->w < 0.0f;
      }
    }
    const uint32_t uncovered = !kRests || covered ? 0 : 1u << (kBatchSteps + row);
    return __reduce_or_sync(~0u, (stable ? 0 : 1u << row) | uncovered);
  }

  __device__ static float scale_of(const float4& part) { return kRests ? fabsf(part.w) : part.w; }

  // Adds up the slices in their order.
  __device__ IncrementMoments moments_of(int32_t batch, int row, int pair, int column) const {
    IncrementMoments sums = {};
    bool is_scaled = false;
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      const float4 part = *exchange_.moments(batch, slice, column, row, pair);
      sums.aa += part.x;
      sums.ad += part.y;
      sums.dd += part.z;
      is_scaled = is_scaled || scale_of(part) != 1.0f;
    }
    return is_scaled ? scaled_moments_of(batch, row, pair, column) : sums;
  }

  // Slices were scaled on their own, by powers of two: they are brought to the scale of the
  // largest one.
  __device__ IncrementMoments scaled_moments_of(int32_t batch, int row, int pair,
                                                int column) const {
    float scale = INFINITY;
#pragma unroll 1
    for (int slice = 0; slice < kSlices; ++slice) {
      const float4 part = *exchange_.moments(batch, slice, column, row, pair);
      // A slice of zeros has no scale.
      if (part.x > 0.0f || part.z > 0.0f) scale = fminf(scale, scale_of(part));
    }
    IncrementMoments sums = {};
#pragma unroll 1
    for (int slice = 0; slice < kSlices; ++slice) {
      const float4 part = *exchange_.moments(batch, slice, column, row, pair);
      const float own = scale_of(part), ratio = scale < own ? scale / own : 1.0f;
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
  const StabilityThresholds thresholds_;
  const int32_t num_steps_;
  const int lane_;
  const int32_t num_batches_;
  const int32_t first_compared_;  // step
  const int32_t rank_;
  int32_t batch_;          // the next one of this thread block
  int32_t num_known_ = 0;  // verdicts that were taken note of
  int32_t stop_ = 0;       // as Shared::stop, if this warp has found it
  PatienceCounter patience_;
};

}  // namespace art::cuda::sm90
