// The warps of a cluster that fold: each its slices of all steps, in walk order.
#pragma once

#include "cuda/sm90/exchange.cuh"
#include "cuda/sm90/output.cuh"
#include "cuda/sm90/step_view.cuh"

namespace art::cuda::sm90 {

// `kRests`: the items may end because little is left of them. That code is not in the kernel which
// has no use for it: these warps are bound by fetching instructions.
template <class T, int kDim, int kHeadTiles, bool kRests>
class Folder {
  using Shared = ExchangeShared<kDim, kHeadTiles>;
  static constexpr int kSlices = num_slices(kDim);
  static constexpr int kOwn = Snapshot<kDim, kHeadTiles>::kOwn;

 public:
  // `warp`: of those that fold in this thread block.
  __device__ Folder(const DecodeParams& params, const ListedWalks& walks, const ClusterPlan& plan,
                    const Exchange& exchange, Shared& shared, const Item& item, int32_t rank,
                    int warp)
      : params_(params),
        walks_(walks),
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

  __device__ bool has_work() const { return share_.has_work(kSlices, may_stop(params_)); }

  // Folds all steps, or up to the one that ends the item.
  __device__ void run() {
    const int32_t sharers = 1 << plan_.sharers_log2;
    int32_t num_sent = 0;
    for (; batch_ < num_batches_ && wait_for_batch(); ++batch_) {
      if (keeps()) save();
      const int32_t count = sizes_.steps_in(batch_, num_steps_);
      if (may_stop(params_) && (batch_ & (sharers - 1)) == share_.turn) {
        for_each_slice([&](int k, int32_t slice) { fold_and_send(k, slice, count); });
        num_sent = batch_ + 1;
      } else {
        fold_batch(count);
      }
      __syncwarp();
      if (lane_ < plan_.blocks()) {
        send_word(remote_address(&shared_.folded[number_], lane_), batch_ + 1);
      }
    }
    if (!may_stop(params_)) return;
    if (lane_ < plan_.blocks()) {
      send_word(remote_address(&shared_.sent_moments[number_], lane_), num_sent);
    }
    if (!keeps()) return;
    while (known() < num_batches_ && last_batch() == num_batches_) {
    }
    const int32_t stop = shared_.stop;
    if (stop != 0) fold_up_to(stop - 1);
  }

  // Of warps with the same slices the first one writes.
  __device__ void write_result() const {
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
          const float share = 1.0f / denominator_of(state, sink_of(params_, item_, g));
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
  // Whether this warp goes back to the step that ends the item, if there is one, for the result.
  __device__ bool keeps() const { return may_stop(params_) && share_.turn == 0; }

  // Batches on which the verdict is known to this thread block.
  __device__ int32_t known() const {
    return __shfl_sync(~0u, shared_.known[number_ / kFolders], 0);
  }

  // The batch in which the item ended; none is so late while that is not known. A warp may hear of
  // the end while it is still behind it.
  __device__ int32_t last_batch() const {
    const int32_t stop = __shfl_sync(~0u, shared_.stop, 0);
    return stop == 0 ? num_batches_ : sizes_.batch_of(stop - 1);
  }

  // Waits until a batch can be folded: its results are weighed, and there is room for a snapshot
  // and for moments. False: the item ended before.
  __device__ bool wait_for_batch() const {
    Barrier& weighed = shared_.weighed[sizes_.ring_place(batch_)];
    if (!may_stop(params_)) {
      weighed.wait(sizes_.ring_parity(batch_));
      return true;
    }
    while (true) {
      const bool is_weighed = __all_sync(~0u, weighed.is_over(sizes_.ring_parity(batch_)));
      const int32_t last = last_batch();
      if (last < batch_) return false;
      // What came before the end was good, whether or not this thread block has taken note of it.
      const bool has_room = last < num_batches_ || known() + sizes_.pending() > batch_;
      if (is_weighed && has_room) return true;
      __nanosleep(plan_.pause_ns);
    }
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
  __device__ const StepTable<kHeadTiles>& table() const {
    return shared_.tables[sizes_.ring_place(batch_)];
  }
  __device__ const float4* values_of(int32_t slice, int ht, bool exists) const {
    return exchange_.values(batch_ << sizes_.batch_log2, slice >> plan_.blocks_log2, row_,
                            exists ? pair(ht) : 0);
  }

  // Folds the steps of the batch at hand in one slice and head tile, and shows the running output
  // before each.
  template <class Visit>
  __device__ void fold_tile(int ht, int32_t slice, int32_t count, float4& a,
                            const Visit& visit) const {
    const auto& factors = table().factors[ht];
    const bool exists = pair(ht) < plan_.layout.pairs;
    const float4* from = values_of(slice, ht, exists);
    const int column = exists ? lane_ % 4 : 0;  // there are no factors for other pairs
    const int32_t stride = plan_.layout.value_pieces();
#pragma unroll
    for (int i = 0; i < kBatchSteps; ++i) {
      const float4 p = exists && i < count ? from[i * stride] : float4{};
      // Rows past the end of the batch are such that nothing changes.
      const float4 f = factors[i][column];
      const float4 old = make_float4(a.x * f.x, a.y * f.z, a.z * f.x, a.w * f.z);
      visit(i, old);
      a = make_float4(fmaf(p.x, f.y, old.x), fmaf(p.y, f.w, old.y), fmaf(p.z, f.y, old.z),
                      fmaf(p.w, f.w, old.w));
    }
  }

  __device__ void fold_batch(int32_t count) {
    for_each_slice([&](int k, int32_t slice) {
#pragma unroll
      for (int ht = 0; ht < kHeadTiles; ++ht) {
        fold_tile(ht, slice, count, values_[k][ht], [](int, const float4&) {});
      }
    });
  }

  // Folds a slice and sends its part of the moments of every step. What the output was before each
  // step is put down, so that then a lane can look at all channels of its own step.
  __device__ void fold_and_send(int k, int32_t slice, int32_t count) {
#pragma unroll
    for (int ht = 0; ht < kHeadTiles; ++ht) {
      auto& before = shared_.before[number_ % kFolders];
      fold_tile(ht, slice, count, values_[k][ht],
                [&](int i, const float4& old) { before[i][lane_] = old; });
      __syncwarp();
      send_moments(ht, k, slice, count);
      __syncwarp();
    }
  }

  __device__ void send_moments(int ht, int k, int32_t slice, int32_t count) const {
    const int32_t pairs = plan_.layout.pairs;
    StepView view;
    view.pairs = pairs;
    view.is_halved = 2 * pairs <= kLanePairs;
    const int column = view.is_halved ? lane_ % 2 : lane_ % 4;
    const int own = kLanePairs * ht + column;
    const int first = view.is_halved && lane_ & 2 ? 4 : 0;
    view.before = shared_.before[number_ % kFolders][row_] + kLanePairs * first + column;
    view.values = exchange_.values((batch_ << sizes_.batch_log2) + row_, slice >> plan_.blocks_log2,
                                   first, own < pairs ? own : 0);
    view.weights = weigh(ht, column);

    const bool sends = row_ < count && own < pairs;
    // What is left is on its way while the moments are summed. Slice 0 is the first of its warp.
    const bool tells_rests = kRests && k == 0 && slice == 0 && sends;
    float rests[2] = {NAN, NAN};
    if (tells_rests) find_rests(own, rests);
    float sums[6], scales[2] = {1.0f, 1.0f};
    view.sum(scales, sums);
    const bool has_second = 2 * own + 1 < params_.group_size;
    const bool doubtful = !is_inside(sums) || (has_second && !is_inside(sums + 3));
    if (__any_sync(~0u, sends && row_ >= first_compared_row() && doubtful)) {
      view.sum_scaled(scales, sums);
    }
    if (!sends) return;
    const int32_t judge = exchange_.judge_of(batch_);
    const uint32_t arrived =
        remote_address(&shared_.moments[exchange_.inbox_place_of(batch_)], judge);
#pragma unroll
    for (int head = 0; head < 2; ++head) {
      if (view.is_halved && head != lane_ / 2 % 2) continue;
      const float* m = sums + 3 * head;
      const bool covered = tells_rests && is_head_covered(ht, column, head, rests[head]);
      send(remote_address(exchange_.moments(batch_, slice, head, row_, own), judge),
           make_float4(m[0], m[1], m[2], covered ? -scales[head] : scales[head]), arrived);
    }
  }

  __device__ void find_rests(int own, float (&rests)[2]) const {
    const int32_t step = (batch_ << sizes_.batch_log2) + row_;
#pragma unroll
    for (int head = 0; head < 2; ++head) {
      rests[head] = log_rest_after(params_, walks_, item_, step, 2 * own + head);
    }
  }

  // Whether one head of a pair has little enough left after the lane's step.
  __device__ bool is_head_covered(int ht, int column, int head, float log_rest) const {
    const float4 after = table().states[ht][row_][column];
    const SoftmaxState state =
        head == 0 ? SoftmaxState{after.x, after.y} : SoftmaxState{after.z, after.w};
    const int32_t g = 2 * (kLanePairs * ht + column) + head;
    return is_covered(state, sink_of(params_, item_, g), log_rest, params_.residual_limit);
  }

  // How the lane's step changes the output.
  __device__ float4 weigh(int ht, int column) const {
    const float4 f = table().factors[ht][row_][column];
    const float4 sums = table().sums[ht][row_][column];
    const float4 after = table().states[ht][row_][column];
    const int32_t g = 2 * (kLanePairs * ht + column);
    const IncrementWeights low =
        increment_weights(sums.x, sums.y, {after.x, after.y}, sink_of(params_, item_, g));
    const IncrementWeights high =
        increment_weights(sums.z, sums.w, {after.z, after.w}, sink_of(params_, item_, g + 1));
    return make_float4(f.y * low.keep, low.share, f.w * high.keep, high.share);
  }

  // The first step of the batch at hand that is compared with the one before it.
  __device__ int32_t first_compared_row() const {
    return first_compared_ - (batch_ << sizes_.batch_log2);
  }

  // Each lane finds again what it left.
  __device__ void save() const {
    auto& to = shared_.snapshots[share_.first >> plan_.blocks_log2][sizes_.pending_place(batch_)];
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
#pragma unroll
      for (int ht = 0; ht < kHeadTiles; ++ht) to.values[k][ht][lane_] = values_[k][ht];
    }
  }

  // Goes back to the step that ended the item: the results of its batch are still there.
  __device__ void fold_up_to(int32_t last_step) {
    batch_ = sizes_.batch_of(last_step);
    const auto& from =
        shared_.snapshots[share_.first >> plan_.blocks_log2][sizes_.pending_place(batch_)];
    const int32_t count = last_step - (batch_ << sizes_.batch_log2) + 1;
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
#pragma unroll
      for (int ht = 0; ht < kHeadTiles; ++ht) {
        values_[k][ht] = from.values[k][ht][lane_];
        const int32_t slice = share_.first + (k << share_.apart_log2);
        const bool exists = pair(ht) < plan_.layout.pairs;
        const float4* p = values_of(slice, ht, exists);
        float4& a = values_[k][ht];
        for (int32_t i = 0; i < count && slice < kSlices; ++i) {
          const float4 f = table().factors[ht][i][exists ? lane_ % 4 : 0];
          const float4 q = p[i * plan_.layout.value_pieces()];
          a = make_float4(fmaf(q.x, f.y, a.x * f.x), fmaf(q.y, f.w, a.y * f.z),
                          fmaf(q.z, f.y, a.z * f.x), fmaf(q.w, f.w, a.w * f.z));
        }
      }
    }
  }

  const DecodeParams& params_;
  const ListedWalks& walks_;
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
  int32_t batch_ = 0;             // the one at hand
  float4 values_[kOwn][kHeadTiles] = {};
};

}  // namespace art::cuda::sm90
