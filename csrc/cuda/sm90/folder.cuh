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
  static constexpr int kBatch = 8;  // steps, at most

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
        warp_(warp),
        lane_(threadIdx.x % 32),
        row_(lane_ / 4),
        rank_(rank),
        first_slice_(rank + plan.blocks * warp),
        num_batches_((item.steps.num_steps + sizes_.batch_steps - 1) / sizes_.batch_steps) {}

  // Whether any slice is this warp's.
  __device__ bool has_work() const { return first_slice_ < kSlices; }

  // Folds all steps, or up to the one that completes patience.
  __device__ void run() {
    if (warp_ == 0 && lane_ == 0) {
      for (int32_t batch = 0; batch < ring_batches(); ++batch) expect(batch);
    }
    for (batch_ = 0; batch_ < num_batches_; ++batch_) {
      if (!wait_for(batch_)) break;
      if (warp_ == 0 && lane_ == 0) expect(batch_ + ring_batches());
      if (params_.use_stability) {
        if (batch_ >= sizes_.pending && !wait_for_verdict(batch_ - sizes_.pending)) {
          ++batch_;
          break;
        }
        save();
      }
      const int32_t count = steps_of(batch_);
      prepare(batch_, count);
      for_each_slice([&](int k, int32_t slice) {
        if (params_.use_stability) {
          judge(k, slice, count);
        } else {
          fold_slice(k, slice, count);
        }
      });
      // The lanes have read the scalars of the batch, and its results.
      __syncwarp();
      if (!params_.use_stability) set_free(batch_ + 1);
    }
    if (!params_.use_stability) return;
    for (int32_t batch = num_batches_ > sizes_.pending ? num_batches_ - sizes_.pending : 0;
         batch < num_batches_; ++batch) {
      if (!wait_for_verdict(batch)) break;
    }
    if (lane_ == 0) {
      send_word(remote_address(&shared_.sent_moments[first_slice_], 0), num_judged_);
    }
    if (const int32_t stop = shared_.stop; stop != 0) fold_up_to(stop - 1);
  }

  // Waits for what is still on its way to this thread block; when all others are done.
  __device__ void drain(int num_warps) const {
    if (shared_.stop == 0) return;
    for (int32_t batch = batch_; batch < num_batches_ && batch < batch_ + ring_batches(); ++batch) {
      const int32_t step = batch * sizes_.batch_steps + lane_, turn = step / plan_.blocks;
      const bool comes =
          lane_ < steps_of(batch) &&
          shared_.sent_steps[step % plan_.blocks][turn % num_warps] > turn / num_warps;
      const int32_t missing = steps_of(batch) - __popc(__ballot_sync(~0u, comes));
      Barrier& full = shared_.full[batch & (ring_batches() - 1)];
      if (lane_ == 0 && missing > 0) full.complete(missing * own_step_bytes());
      full.wait(parity(batch));
    }
  }

  __device__ void write_result() const {
    const int64_t first_row =
        int64_t{item_.batch} * params_.num_q_heads + item_.kv_head * params_.group_size;
    for_each_slice([&](int k, int32_t slice) {
#pragma unroll
      for (int ht = 0; ht < kHeadTiles; ++ht) {
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const int32_t g = head(ht, column);
          if (g >= params_.group_size) continue;
          const SoftmaxState& state = states_[ht][column];
          const float share = 1.0f / denominator_of(state, sink_of(params_, item_.kv_head, g));
          const float4& a = values_[k][ht];
          T* to = static_cast<T*>(params_.out) + (first_row + g) * kDim + 16 * slice + row_;
          to[0] = Mma<T>::round((column == 0 ? a.x : a.y) * share);
          to[8] = Mma<T>::round((column == 0 ? a.z : a.w) * share);
          if (slice == 0 && row_ == 0) params_.lse[first_row + g] = log_sum_exp(state);
        }
      }
    });
  }

 private:
  // ---- Batches

  __device__ int32_t ring_batches() const { return sizes_.ring_steps / sizes_.batch_steps; }
  __device__ int32_t steps_of(int32_t batch) const {
    const int32_t left = item_.steps.num_steps - batch * sizes_.batch_steps;
    return left < sizes_.batch_steps ? left : sizes_.batch_steps;
  }
  __device__ uint32_t own_step_bytes() const {
    return exchange_.step_bytes((kSlices - rank_ + plan_.blocks - 1) / plan_.blocks);
  }
  __device__ uint32_t parity(int32_t batch) const { return batch / ring_batches() & 1; }
  __device__ uint32_t verdict_parity(int32_t batch) const { return batch / sizes_.pending & 1; }

  __device__ void expect(int32_t batch) const {
    if (batch >= num_batches_) return;
    shared_.full[batch & (ring_batches() - 1)].arrive_and_expect(steps_of(batch) *
                                                                 own_step_bytes());
  }

  // False: the item ends before.
  __device__ bool wait_for(int32_t batch) const {
    return wait_for(shared_.full[batch & (ring_batches() - 1)], parity(batch));
  }
  __device__ bool wait_for(Barrier& barrier, uint32_t parity) const {
    while (true) {
      if (__all_sync(~0u, barrier.is_over(parity))) return true;
      if (__any_sync(~0u, shared_.stop != 0)) return false;
    }
  }

  // Of a batch after which reading goes on, the ring slots are free.
  __device__ bool wait_for_verdict(int32_t batch) const {
    if (!wait_for(shared_.decided[batch & (sizes_.pending - 1)], verdict_parity(batch))) {
      return false;
    }
    set_free(batch + 1);
    return true;
  }

  __device__ void set_free(int32_t batches) const {
    if (lane_ < plan_.blocks) {
      send_word(remote_address(&shared_.freed[first_slice_], lane_), batches);
    }
  }

  // ---- Folding

  template <class Visit>
  __device__ void for_each_slice(const Visit& visit) const {
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      const int32_t slice = first_slice_ + plan_.blocks * kFolders * k;
      if (slice < kSlices) visit(k, slice);
    }
  }

  __device__ int pair(int ht) const { return kLanePairs * ht + lane_ % 4; }
  __device__ int32_t head(int ht, int column) const { return 2 * pair(ht) + column; }
  __device__ int num_pairs() const { return (params_.group_size + 1) / 2; }

  // Forms the scalars of a batch, each row of lanes those of its step, and advances the states.
  // Steps from `count` on change nothing.
  __device__ void prepare(int32_t batch, int32_t count) {
    StepTable<kHeadTiles>& table = shared_.tables[warp_];
    const int32_t step = batch * sizes_.batch_steps + row_;
#pragma unroll
    for (int ht = 0; ht < kHeadTiles; ++ht) {
      const bool exists = row_ < count && pair(ht) < num_pairs();
      const float4 sent = exists ? *exchange_.states(step, pair(ht))
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
      table.factors[ht][lane_] = make_float4(factors[0].running, factors[0].incoming,
                                             factors[1].running, factors[1].incoming);
      table.masses[ht][lane_] =
          make_float2(incoming[0].sum * factors[0].incoming, incoming[1].sum * factors[1].incoming);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const float4 f = table.factors[ht][4 * i + lane_ % 4];
        const float2 mass = table.masses[ht][4 * i + lane_ % 4];
        if (i > row_) continue;
        after[0].sum = fmaf(after[0].sum, f.x, mass.x);
        after[1].sum = fmaf(after[1].sum, f.z, mass.y);
      }
      if (params_.use_stability) {
        float4 weights;
        weights.x = weights_of(incoming[0], after[0], factors[0], head(ht, 0), weights.y);
        weights.z = weights_of(incoming[1], after[1], factors[1], head(ht, 1), weights.w);
        table.weights[ht][lane_] = weights;
      }
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        states_[ht][column] = {__shfl_sync(~0u, after[column].max, 28 + lane_ % 4),
                               __shfl_sync(~0u, after[column].sum, 28 + lane_ % 4)};
      }
    }
    __syncwarp();
  }

  __device__ float weights_of(const SoftmaxState& incoming, const SoftmaxState& after,
                              const FoldFactors& factors, int32_t g, float& share) const {
    const IncrementWeights weights =
        increment_weights(incoming, after, factors, sink_of(params_, item_.kv_head, g));
    share = weights.share;
    return factors.incoming * weights.keep;
  }

  // Visits the steps of the batch at hand in one slice and head tile, with the running output
  // before each.
  template <class Visit>
  __device__ void fold_tile(int ht, int32_t slice, int32_t count, float4& a,
                            const Visit& visit) const {
    const StepTable<kHeadTiles>& table = shared_.tables[warp_];
    const bool exists = pair(ht) < num_pairs();
    const float4* from = exchange_.values(batch_ * sizes_.batch_steps, slice / plan_.blocks, row_,
                                          exists ? pair(ht) : 0);
    const int32_t stride = plan_.layout.slot_pieces();
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float4 p = exists && i < count ? from[i * stride] : float4{};
      const float4 f = table.factors[ht][4 * i + lane_ % 4];
      const float4 old = make_float4(a.x * f.x, a.y * f.z, a.z * f.x, a.w * f.z);
      visit(i, old, p);
      a = make_float4(fmaf(p.x, f.y, old.x), fmaf(p.y, f.w, old.y), fmaf(p.z, f.y, old.z),
                      fmaf(p.w, f.w, old.w));
    }
  }

  __device__ void fold_slice(int k, int32_t slice, int32_t count) {
#pragma unroll
    for (int ht = 0; ht < kHeadTiles; ++ht) {
      fold_tile(ht, slice, count, values_[k][ht], [](int, const float4&, const float4&) {});
    }
  }

  // Folds a slice and sends its part of the moments of every step.
  __device__ void judge(int k, int32_t slice, int32_t count) {
    num_judged_ = batch_ + 1;
    const StepTable<kHeadTiles>& table = shared_.tables[warp_];
#pragma unroll
    for (int ht = 0; ht < kHeadTiles; ++ht) {
      const float4 start = values_[k][ht];
      float parts[kBatch][6], sums[6];
      fold_tile(ht, slice, count, values_[k][ht], [&](int i, const float4& old, const float4& p) {
        const float4 w = table.weights[ht][4 * i + lane_ % 4];
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
      const bool matters = row_ >= first_compared() && row_ < count;
      const bool doubtful = (head(ht, 0) < params_.group_size && !inside(sums)) ||
                            (head(ht, 1) < params_.group_size && !inside(sums + 3));
      if (__any_sync(~0u, matters && doubtful)) {
        sum_scaled(ht, slice, count, start, sums, scales);
      }
      if (row_ < count && pair(ht) < num_pairs()) {
        Barrier& judged = shared_.judged[batch_ & (sizes_.pending - 1)];
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const float* m = sums + 3 * column;
          send(remote_address(exchange_.moments(batch_, slice, column, row_, pair(ht)), 0),
               make_float4(m[0], m[1], m[2], scales[column]), remote_address(&judged, 0));
        }
      }
    }
  }

  __device__ static bool inside(const float* moments) {
    return in_range({moments[0], moments[1], moments[2]});
  }
  // The first step of the batch at hand that is compared with the one before it.
  __device__ int32_t first_compared() const {
    const int32_t starting = item_.steps.num_start_steps > 1 ? item_.steps.num_start_steps : 1;
    return starting - batch_ * sizes_.batch_steps;
  }

  // Where squares leave the range of float32: the moments of the slice from vectors that are
  // scaled step by step.
  __device__ void sum_scaled(int ht, int32_t slice, int32_t count, float4 a, float (&sums)[6],
                             float (&scales)[2]) const {
    const StepTable<kHeadTiles>& table = shared_.tables[warp_];
    const bool exists = pair(ht) < num_pairs();
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const float4 p = exists ? *exchange_.values(batch_ * sizes_.batch_steps + i,
                                                  slice / plan_.blocks, row_, pair(ht))
                              : float4{};
      const float4 f = table.factors[ht][4 * i + lane_ % 4];
      const float4 w = table.weights[ht][4 * i + lane_ % 4];
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

  // ---- Going back to the step that ended the item

  // Each lane finds again what it left; the states are the same in all rows.
  __device__ void save() const {
    Snapshot<kDim, kHeadTiles>& to = shared_.snapshots[warp_][batch_ & (sizes_.pending - 1)];
#pragma unroll
    for (int ht = 0; ht < kHeadTiles; ++ht) {
#pragma unroll
      for (int k = 0; k < kOwn; ++k) to.values[k][ht][lane_] = values_[k][ht];
      if (row_ == 0) {
        to.states[ht][lane_] = make_float4(states_[ht][0].max, states_[ht][0].sum,
                                           states_[ht][1].max, states_[ht][1].sum);
      }
    }
    __syncwarp();
  }

  __device__ void fold_up_to(int32_t last_step) {
    const int32_t next = batch_;
    batch_ = last_step / sizes_.batch_steps;
    const Snapshot<kDim, kHeadTiles>& from =
        shared_.snapshots[warp_][batch_ & (sizes_.pending - 1)];
#pragma unroll
    for (int ht = 0; ht < kHeadTiles; ++ht) {
#pragma unroll
      for (int k = 0; k < kOwn; ++k) values_[k][ht] = from.values[k][ht][lane_];
      const float4 states = from.states[ht][lane_ % 4];
      states_[ht][0] = {states.x, states.y};
      states_[ht][1] = {states.z, states.w};
    }
    const int32_t count = last_step - batch_ * sizes_.batch_steps + 1;
    prepare(batch_, count);
    for_each_slice([&](int k, int32_t slice) { fold_slice(k, slice, count); });
    batch_ = next;
  }

  const DecodeParams& params_;
  const ClusterPlan& plan_;
  const CudaExchange& sizes_;
  const Exchange& exchange_;
  Shared& shared_;
  const Item& item_;
  const int warp_, lane_, row_;
  const int32_t rank_, first_slice_, num_batches_;
  int32_t batch_ = 0;       // the one at hand; after run(), the first that was not waited for
  int32_t num_judged_ = 0;  // batches whose moments were sent
  float4 values_[kOwn][kHeadTiles] = {};
  SoftmaxState states_[kHeadTiles][2];
};

}  // namespace art::cuda::sm90
