// The warps of a cluster that fold: each its slices of all steps, in walk order.
#pragma once

#include "cuda/sm90/exchange.cuh"
#include "cuda/sm90/output.cuh"

namespace art::cuda::sm90 {

// Adds up what the lanes of a head pair hold for eight steps; row lane / 4 gets step lane / 4.
template <int kValues>
__device__ inline void reduce_to_rows(float (&parts)[8][kValues], float (&sums)[kValues]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int round = 0; round < 3; ++round) {
    const int half = 4 >> round;
    const bool upper = lane & (4 * half);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i >= half) break;
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        const float kept = upper ? parts[i + half][v] : parts[i][v];
        const float given = upper ? parts[i][v] : parts[i + half][v];
        parts[i][v] = kept + __shfl_xor_sync(~0u, given, 4 * half);
      }
    }
  }
#pragma unroll
  for (int v = 0; v < kValues; ++v) sums[v] = parts[0][v];
}

template <class T, int kDim, int kHeadTiles>
class Folder {
  using Shared = ExchangeShared<kDim, kHeadTiles>;
  static constexpr int kSlices = num_slices(kDim);
  static constexpr int kOwn = Snapshot<kDim, kHeadTiles>::kOwn;

 public:
  // `warp`: of those that fold in this thread block.
  __device__ Folder(const DecodeParams& params, const ClusterPlan& plan, const Exchange& exchange,
                    Shared& shared, const Item& item, int32_t rank, int warp)
      : params_(params),
        plan_(plan),
        sizes_(plan.layout.sizes),
        exchange_(exchange),
        shared_(shared),
        item_(item),
        share_(plan, rank, warp),
        number_(rank * kFolders + warp),
        lane_(threadIdx.x % 32),
        row_(lane_ / 4),
        num_steps_(item.steps.num_steps),
        num_batches_(sizes_.num_batches(num_steps_)),
        first_compared_(item.steps.num_start_steps > 1 ? item.steps.num_start_steps : 1) {}

  __device__ bool has_work() const { return share_.has_work(kSlices, params_.use_stability); }

  // Folds all steps, or up to the one that completes patience.
  __device__ void run() {
    if (params_.use_stability) {
      run_with_verdicts();
      return;
    }
    for (batch_ = 0; batch_ < num_batches_; ++batch_) {
      wait_for_batch();
      fold_batch(steps_of(batch_));
      __syncwarp();
      set_free(batch_ + 1);
    }
  }

  // Of warps with the same slices the first one writes; that of the first slice writes what there
  // is once an item.
  __device__ void write_result(int32_t index) const {
    if (share_.turn != 0) return;
    const int32_t stop = shared_.stop, num_steps = stop != 0 ? stop : num_steps_;
    const int32_t last = num_steps - 1, batch = sizes_.batch_of(last);
    const int32_t in_batch = last & (sizes_.batch_steps() - 1);
    const int64_t first_row =
        int64_t{item_.batch} * params_.num_q_heads + item_.kv_head * params_.group_size;
    for_each_slice([&](int k, int32_t slice) {
#pragma unroll
      for (int ht = 0; ht < kHeadTiles; ++ht) {
        float4 states = make_float4(-INFINITY, 0.0f, -INFINITY, 0.0f);
        if (num_steps > 0) {
          states = shared_.tables[sizes_.ring_place(batch)].states[ht][in_batch][lane_ % 4];
        }
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const int32_t g = 2 * pair(ht) + column;
          if (g >= params_.group_size) continue;
          const SoftmaxState state =
              column == 0 ? SoftmaxState{states.x, states.y} : SoftmaxState{states.z, states.w};
          const float share = 1.0f / denominator_of(state, sink_of(params_, item_.kv_head, g));
          const float4& a = values_[k][ht];
          T* to = static_cast<T*>(params_.out) + (first_row + g) * kDim + 16 * slice + row_;
          to[0] = Mma<T>::round((column == 0 ? a.x : a.y) * share);
          to[8] = Mma<T>::round((column == 0 ? a.z : a.w) * share);
          if (slice == 0 && row_ == 0) params_.lse[first_row + g] = log_sum_exp(state);
        }
      }
    });
    if (share_.first != 0) return;
    const int32_t units = num_steps == 0 ? 0 : item_.steps.positions(last).end;
    const int32_t tokens = tokens_in(params_, item_, units);
    if (lane_ != 0) return;
    params_.tokens_read[index] = tokens;
    params_.stop_block[index] = stop != 0 ? item_.steps.block_of(last) : -1;
  }

 private:
  __device__ void run_with_verdicts() {
    const int32_t senders = 1 << plan_.senders_log2;
    int32_t num_sent = 0;
    for (batch_ = 0; batch_ < num_batches_; ++batch_) {
      if (!wait_for_batch()) break;
      if (share_.turn == 0) save();
      const int32_t count = steps_of(batch_);
      if ((batch_ & (senders - 1)) == share_.turn) {
        for_each_slice([&](int k, int32_t slice) { fold_and_send(k, slice, count); });
        num_sent = batch_ + 1;
      } else {
        fold_batch(count);
      }
    }
    while (num_known_ < num_batches_ && last_batch() == num_batches_) take_verdict();
    if (lane_ < plan_.blocks()) {
      send_word(remote_address(&shared_.sent_moments[number_], lane_), num_sent);
    }
    const int32_t stop = shared_.stop;
    if (stop != 0 && share_.turn == 0) fold_up_to(stop - 1);
  }

  __device__ int32_t steps_of(int32_t batch) const { return sizes_.steps_in(batch, num_steps_); }

  // The batch in which the item ended; none is so late while that is not known. A warp may hear of
  // the end while it is still behind it.
  __device__ int32_t last_batch() const {
    const int32_t stop = __shfl_sync(~0u, shared_.stop, 0);
    return stop == 0 ? num_batches_ : sizes_.batch_of(stop - 1);
  }

  // Waits until a batch can be folded: its results are weighed, and not too many batches before it
  // wait for their verdict. False: the item ended before.
  __device__ bool wait_for_batch() {
    Barrier& weighed = shared_.weighed[sizes_.ring_place(batch_)];
    while (true) {
      const bool is_weighed = __all_sync(~0u, weighed.is_over(sizes_.ring_parity(batch_)));
      const int32_t last = last_batch();
      if (last < batch_) return false;
      // What came before the end was good, whether or not this warp has taken note of it.
      const bool has_room = num_known_ + sizes_.pending() > batch_ || last < num_batches_;
      if (is_weighed && (has_room || !params_.use_stability)) return true;
      if (num_known_ < batch_ && params_.use_stability) take_verdict();
    }
  }

  // Takes note of the next verdict if it is there, on a batch that this warp has folded. If reading
  // goes on after it, its ring slots are free.
  __device__ void take_verdict() {
    const int32_t verdict = __shfl_sync(~0u, shared_.verdicts[sizes_.ring_place(num_known_)], 0);
    if (verdict >> kBatchSteps != num_known_ + 1) return;
    const int32_t first = num_known_ << sizes_.batch_log2, count = steps_of(num_known_);
    int32_t last_step = -1;
#pragma unroll
    for (int32_t i = 0; i < kBatchSteps; ++i) {
      if (i >= count || first + i < first_compared_ || last_step >= 0) continue;
      if (patience_.completes(!(verdict >> i & 1), params_.patience)) last_step = first + i;
    }
    if (last_step < 0) {
      set_free(++num_known_);
      return;
    }
    // All that see this verdict say the same.
    if (lane_ < plan_.blocks()) send_word(remote_address(&shared_.stop, lane_), last_step + 1);
    while (last_batch() == num_batches_) {
    }
  }

  __device__ void set_free(int32_t batches) const {
    if (lane_ < plan_.blocks()) send_word(remote_address(&shared_.freed[number_], lane_), batches);
  }

  template <class Visit>
  __device__ void for_each_slice(const Visit& visit) const {
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      const int32_t slice = share_.first + (k << share_.apart_log2);
      if (slice < kSlices) visit(k, slice);
    }
  }

  __device__ int pair(int ht) const { return kLanePairs * ht + lane_ % 4; }
  __device__ bool has_head(int ht, int column) const {
    return 2 * pair(ht) + column < params_.group_size;
  }
  __device__ const StepTable<kHeadTiles>& table() const {
    return shared_.tables[sizes_.ring_place(batch_)];
  }
  __device__ const float4* values_of(int32_t slice, int ht, bool exists) const {
    return exchange_.values(batch_ << sizes_.batch_log2, slice >> plan_.blocks_log2, row_,
                            exists ? pair(ht) : 0);
  }

  // Visits the steps of the batch at hand in one slice and head tile, with the running output
  // before each.
  template <class Visit>
  __device__ void fold_tile(int ht, int32_t slice, int32_t count, float4& a,
                            const Visit& visit) const {
    const auto& factors = table().factors[ht];
    const bool exists = pair(ht) < plan_.layout.pairs;
    const float4* from = values_of(slice, ht, exists);
    const int32_t stride = plan_.layout.slot_pieces();
#pragma unroll
    for (int i = 0; i < kBatchSteps; ++i) {
      const float4 p = exists && i < count ? from[i * stride] : float4{};
      // Rows past the end of the batch are such that nothing changes.
      const float4 f = factors[i][lane_ % 4];
      const float4 old = make_float4(a.x * f.x, a.y * f.z, a.z * f.x, a.w * f.z);
      visit(i, old, p);
      a = make_float4(fmaf(p.x, f.y, old.x), fmaf(p.y, f.w, old.y), fmaf(p.z, f.y, old.z),
                      fmaf(p.w, f.w, old.w));
    }
  }

  __device__ void fold_batch(int32_t count) {
    for_each_slice([&](int k, int32_t slice) {
#pragma unroll
      for (int ht = 0; ht < kHeadTiles; ++ht) {
        fold_tile(ht, slice, count, values_[k][ht], [](int, const float4&, const float4&) {});
      }
    });
  }

  // Folds a slice and sends its part of the moments of every step.
  __device__ void fold_and_send(int k, int32_t slice, int32_t count) {
#pragma unroll
    for (int ht = 0; ht < kHeadTiles; ++ht) {
      const float4 start = values_[k][ht];
      weigh(ht);
      float parts[kBatchSteps][6], sums[6];
      fold_tile(ht, slice, count, values_[k][ht], [&](int i, const float4& old, const float4& p) {
        const float4 w = shared_.weights[number_ % kFolders][4 * i + lane_ % 4];
        const float4 d = make_float4(p.x * w.x - old.x * w.y, p.y * w.z - old.y * w.w,
                                     p.z * w.x - old.z * w.y, p.w * w.z - old.w * w.w);
        parts[i][0] = fmaf(old.x, old.x, old.z * old.z);
        parts[i][1] = fmaf(old.x, d.x, old.z * d.z);
        parts[i][2] = fmaf(d.x, d.x, d.z * d.z);
        parts[i][3] = fmaf(old.y, old.y, old.w * old.w);
        parts[i][4] = fmaf(old.y, d.y, old.w * d.w);
        parts[i][5] = fmaf(d.y, d.y, d.w * d.w);
      });
      reduce_to_rows(parts, sums);
      float scales[2] = {1.0f, 1.0f};
      const bool matters = row_ >= first_compared_row() && row_ < count;
      const bool doubtful =
          (has_head(ht, 0) && !inside(sums)) || (has_head(ht, 1) && !inside(sums + 3));
      if (__any_sync(~0u, matters && doubtful)) {
        sum_scaled(ht, slice, count, start, sums, scales);
      }
      if (row_ < count && pair(ht) < plan_.layout.pairs) {
        const int32_t judge = exchange_.judge_of(batch_);
        const uint32_t arrived =
            remote_address(&shared_.moments[exchange_.inbox_place_of(batch_)], judge);
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const float* m = sums + 3 * column;
          send(remote_address(exchange_.moments(batch_, slice, column, row_, pair(ht)), judge),
               make_float4(m[0], m[1], m[2], scales[column]), arrived);
        }
      }
    }
  }

  // Forms how each step changes the output, each row of lanes for its step.
  __device__ void weigh(int ht) const {
    const float4 f = table().factors[ht][row_][lane_ % 4];
    const float4 sums = table().sums[ht][row_][lane_ % 4];
    const float4 after = table().states[ht][row_][lane_ % 4];
    float4 weights;
    weights.x = weigh_head(ht, 0, {after.x, after.y}, f.y, sums.y, weights.y);
    weights.z = weigh_head(ht, 1, {after.z, after.w}, f.w, sums.w, weights.w);
    // The lanes have read those of the batch before.
    __syncwarp();
    shared_.weights[number_ % kFolders][lane_] = weights;
    __syncwarp();
  }
  __device__ float weigh_head(int ht, int column, const SoftmaxState& after, float incoming,
                              float mass, float& share) const {
    const float* sink = sink_of(params_, item_.kv_head, 2 * pair(ht) + column);
    const IncrementWeights weights = increment_weights(mass, after, sink);
    share = weights.share;
    return incoming * weights.keep;
  }

  __device__ static bool inside(const float* moments) {
    return in_range({moments[0], moments[1], moments[2]});
  }
  // The first step of the batch at hand that is compared with the one before it.
  __device__ int32_t first_compared_row() const {
    return first_compared_ - (batch_ << sizes_.batch_log2);
  }

  // Where squares leave the range of float32: the moments of the slice from vectors that are
  // scaled step by step.
  __device__ void sum_scaled(int ht, int32_t slice, int32_t count, float4 a, float (&sums)[6],
                             float (&scales)[2]) const {
    const bool exists = pair(ht) < plan_.layout.pairs;
    const float4* from = values_of(slice, ht, exists);
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const float4 p = exists ? from[i * plan_.layout.slot_pieces()] : float4{};
      const float4 f = table().factors[ht][i][lane_ % 4];
      const float4 w = shared_.weights[number_ % kFolders][4 * i + lane_ % 4];
      const float old[4] = {a.x * f.x, a.y * f.z, a.z * f.x, a.w * f.z};
      const float d[4] = {p.x * w.x - old[0] * w.y, p.y * w.z - old[1] * w.w,
                          p.z * w.x - old[2] * w.y, p.w * w.z - old[3] * w.w};
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const float a0 = old[column], a1 = old[column + 2], d0 = d[column], d1 = d[column + 2];
        const float largest = fmaxf(fmaxf(fabsf(a0), fabsf(a1)), fmaxf(fabsf(d0), fabsf(d1)));
        const float scale = moment_scale(head_max(largest));
        const float x0 = a0 * scale, x1 = a1 * scale, y0 = d0 * scale, y1 = d1 * scale;
        const float aa = head_sum(fmaf(x0, x0, x1 * x1)), ad = head_sum(fmaf(x0, y0, x1 * y1));
        const float dd = head_sum(fmaf(y0, y0, y1 * y1));
        if (row_ != i) continue;
        sums[3 * column] = aa;
        sums[3 * column + 1] = ad;
        sums[3 * column + 2] = dd;
        scales[column] = scale;
      }
      a = make_float4(fmaf(p.x, f.y, old[0]), fmaf(p.y, f.w, old[1]), fmaf(p.z, f.y, old[2]),
                      fmaf(p.w, f.w, old[3]));
    }
  }

  // Each lane finds again what it left.
  __device__ void save() const {
    auto& to = shared_.snapshots[number_ % kFolders][sizes_.pending_place(batch_)];
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
#pragma unroll
      for (int ht = 0; ht < kHeadTiles; ++ht) to.values[k][ht][lane_] = values_[k][ht];
    }
  }

  // Goes back to the step that ended the item: the results of its batch are still there.
  __device__ void fold_up_to(int32_t last_step) {
    batch_ = sizes_.batch_of(last_step);
    const auto& from = shared_.snapshots[number_ % kFolders][sizes_.pending_place(batch_)];
    const int32_t count = last_step - (batch_ << sizes_.batch_log2) + 1;
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
#pragma unroll
      for (int ht = 0; ht < kHeadTiles; ++ht) {
        values_[k][ht] = from.values[k][ht][lane_];
        const int32_t slice = share_.first + (k << share_.apart_log2);
        const float4* p = values_of(slice, ht, pair(ht) < plan_.layout.pairs);
        float4& a = values_[k][ht];
        for (int32_t i = 0; i < count && slice < kSlices; ++i) {
          const float4 f = table().factors[ht][i][lane_ % 4];
          const float4 q = p[i * plan_.layout.slot_pieces()];
          a = make_float4(fmaf(q.x, f.y, a.x * f.x), fmaf(q.y, f.w, a.y * f.z),
                          fmaf(q.z, f.y, a.z * f.x), fmaf(q.w, f.w, a.w * f.z));
        }
      }
    }
  }

  const DecodeParams& params_;
  const ClusterPlan& plan_;
  const CudaExchange& sizes_;
  const Exchange& exchange_;
  Shared& shared_;
  const Item& item_;
  const FolderShare share_;
  const int32_t number_;  // in the cluster
  const int lane_, row_;
  const int32_t num_steps_, num_batches_;
  const int32_t first_compared_;  // step
  PatienceCounter patience_;
  int32_t num_known_ = 0;  // verdicts that were taken note of
  int32_t batch_ = 0;      // the one at hand
  float4 values_[kOwn][kHeadTiles] = {};
};

}  // namespace art::cuda::sm90
