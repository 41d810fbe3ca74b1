// One thread block per item: for batches that fill the device. A producing warp keeps the stages
// filled; the consuming warps take the steps in turn, each computes its step alone and then, when
// the step before has been folded, folds it into the running output and decides whether to stop.
#pragma once

#include "cuda/sm90/kernel.cuh"
#include "cuda/sm90/output.cuh"
#include "cuda/sm90/stages.cuh"

namespace art::cuda::sm90 {

template <class T, int kDim, int kHeadTiles>
struct SoloShared {
  static constexpr int kConsumers = num_stages(kDim, kHeadTiles);  // warps
  Stages<kDim, kConsumers> stages;
  // The running output after the last step of each warp, each lane's part of Partial::values. A
  // warp's is written over by its next step, and so stays until the verdict on it is known.
  struct Running {
    float4 values[kHeadTiles][kDim / 16][32];
    SoftmaxState softmax[8 * kHeadTiles];
  } running[kConsumers];
  QueryTile<T, kDim, kHeadTiles> query;
  // Two chains pass from step to step: folding is short and must not wait for the verdict, whose
  // roots and divisions take longer.
  Barrier fold_turn[kConsumers], verdict_turn[kConsumers];
  PatienceCounter patience;
  int32_t tokens_read;
  volatile bool is_finished;
  int32_t found_row;  // by item_at()
};

template <class T, int kDim, int kHeadTiles>
class SoloConsumer {
  using Shared = SoloShared<T, kDim, kHeadTiles>;
  static constexpr int kConsumers = Shared::kConsumers;

 public:
  __device__ SoloConsumer(const DecodeParams& params, const ListedWalks& walks, Shared& shared,
                          const Item& item, int32_t index)
      : params_(params),
        walks_(walks),
        shared_(shared),
        item_(item),
        index_(index),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        before_(shared.running[(warp_ + kConsumers - 1) % kConsumers]),
        after_(shared.running[warp_]) {}

  __device__ void run() {
    if (item_.steps.num_steps == 0 && warp_ == 0) write_result(0, -1);
    Consumer<T, kDim, kHeadTiles, kConsumers, kConsumers> consumer(params_, shared_.stages,
                                                                   shared_.query);
    const int next = (warp_ + 1) % kConsumers;
    for (uint32_t round = 0;; round ^= 1) {
      Partial<kDim, kHeadTiles> partial;
      int32_t tokens;
      const int32_t step = consumer.next(item_, [&] { return is_finished(); }, partial, tokens);
      if (step < 0) return;
      const bool compares = params_.use_stability && item_.steps.block_of(step) > 0;
      Moments moments;
      shared_.fold_turn[warp_].wait(round);
      if (!is_finished()) fold_step(partial, compares, moments);
      __syncwarp();
      if (lane_ == 0) shared_.fold_turn[next].arrive();
      const bool stable = compares && is_stable_step(moments);
      const bool covered = params_.use_residual && is_covered_step(step);
      shared_.verdict_turn[warp_].wait(round);
      if (!is_finished()) decide(step, compares, stable, covered, tokens);
      __syncwarp();
      if (lane_ == 0) shared_.verdict_turn[next].arrive();
    }
  }

 private:
  // This lane's part of the sums.
  using Moments = IncrementMoments[kHeadTiles][2];

  // The same answer for all lanes: it may change at any time.
  __device__ bool is_finished() const { return __any_sync(~0u, shared_.is_finished); }

  __device__ int32_t head(int head_tile, int column) const {
    return 8 * head_tile + 2 * (lane_ % 4) + column;
  }

  // Only the warp whose turn it is gets here.
  __device__ void fold_step(const Partial<kDim, kHeadTiles>& partial, bool compares,
                            Moments& moments) {
#pragma unroll
    for (int ht = 0; ht < kHeadTiles; ++ht) {
      FoldFactors factors[2];
      IncrementWeights weights[2];
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int32_t g = head(ht, column);
        const SoftmaxState& incoming = partial.softmax[ht][column];
        const SoftmaxState before = before_.softmax[g];
        SoftmaxState state = before;
        factors[column] = fold(state, incoming);
        if (lane_ < 4) after_.softmax[g] = state;
        if (!compares) continue;
        const float* sink = sink_of(params_, item_, g);
        weights[column] = increment_weights(before, incoming, state, factors[column], sink);
      }
#pragma unroll
      for (int i = 0; i < kDim / 16; ++i) {
        const float4 a = before_.values[ht][i][lane_];
        const float (&p)[4] = partial.values[ht][i];
        after_.values[ht][i][lane_] =
            make_float4(a.x * factors[0].running + p[0] * factors[0].incoming,
                        a.y * factors[1].running + p[1] * factors[1].incoming,
                        a.z * factors[0].running + p[2] * factors[0].incoming,
                        a.w * factors[1].running + p[3] * factors[1].incoming);
      }
      if (compares) sum_heads(partial, ht, factors, weights, moments[ht]);
    }
  }

  __device__ void sum_heads(const Partial<kDim, kHeadTiles>& partial, int ht,
                            const FoldFactors (&factors)[2], const IncrementWeights (&weights)[2],
                            IncrementMoments (&moments)[2]) const {
    float scales[2] = {1.0f, 1.0f};
    for (bool is_last = false;; is_last = true) {
      moments[0] = moments[1] = {};
      for_each_change(partial, ht, factors, weights, scales, [&](int column, float a, float d) {
        moments[column].aa += a * a;
        moments[column].ad += a * d;
        moments[column].dd += d * d;
      });
      bool doubtful = false;
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        // Where each lane's part is far inside the range, so is the sum.
        const IncrementMoments& part = moments[column];
        const bool inside = part.aa > 1e-30f && part.aa < 1e28f && part.dd < 1e28f;
        doubtful = doubtful || (!inside && head(ht, column) < params_.group_size);
      }
      if (is_last || !__any_sync(~0u, doubtful)) return;
      float largest[2] = {};
      for_each_change(partial, ht, factors, weights, scales, [&](int column, float a, float d) {
        largest[column] = fmaxf(largest[column], fmaxf(fabsf(a), fabsf(d)));
      });
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const IncrementMoments& part = moments[column];
        const float aa = head_sum(part.aa), ad = head_sum(part.ad), dd = head_sum(part.dd);
        const float most = head_max(largest[column]);
        if (!in_range({aa, ad, dd})) scales[column] = moment_scale(most);
      }
    }
  }

  // Visits this lane's elements of both heads: the running output and its change.
  template <class Visit>
  __device__ void for_each_change(const Partial<kDim, kHeadTiles>& partial, int ht,
                                  const FoldFactors (&factors)[2],
                                  const IncrementWeights (&weights)[2], const float (&scales)[2],
                                  const Visit& visit) const {
    float running[2], keep[2];
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      running[column] = factors[column].running * scales[column];
      keep[column] = factors[column].incoming * weights[column].keep * scales[column];
    }
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      // With all of the loads in flight at once the registers would not suffice.
      if (kDim > 192 && i % 4 == 0) asm volatile("" ::: "memory");
      const float4 before = before_.values[ht][i][lane_];
      const float elements[4] = {before.x, before.y, before.z, before.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float a = elements[j] * running[j % 2];
        visit(j % 2, a, partial.values[ht][i][j] * keep[j % 2] - a * weights[j % 2].share);
      }
    }
  }

  // Lanes that hold the same two heads share the work: every other one looks at the second.
  __device__ bool is_stable_step(const Moments& moments) const {
    const StabilityThresholds thresholds = thresholds_of(params_, item_);
    const int column = lane_ / 4 % 2;
    bool stable = true;
#pragma unroll
    for (int ht = 0; ht < kHeadTiles; ++ht) {
      const IncrementMoments &low = moments[ht][0], &high = moments[ht][1];
      const float aa[2] = {head_sum(low.aa), head_sum(high.aa)};
      const float ad[2] = {head_sum(low.ad), head_sum(high.ad)};
      const float dd[2] = {head_sum(low.dd), head_sum(high.dd)};
      const OutputChange change =
          output_change(column == 0 ? IncrementMoments{aa[0], ad[0], dd[0]}
                                    : IncrementMoments{aa[1], ad[1], dd[1]});
      if (head(ht, column) < params_.group_size) stable = stable && is_stable(change, thresholds);
    }
    return __all_sync(~0u, stable);
  }

  // The same for what is left. The states after the step are this warp's until its next one.
  __device__ bool is_covered_step(int32_t step) const {
    const int column = lane_ / 4 % 2;
    bool covered = true;
#pragma unroll
    for (int ht = 0; ht < kHeadTiles; ++ht) {
      const int32_t g = head(ht, column);
      if (g >= params_.group_size) continue;
      covered = covered &&
                is_covered(after_.softmax[g], sink_of(params_, item_, g),
                           log_rest_after(params_, walks_, item_, step, g), params_.residual_limit);
    }
    return __all_sync(~0u, covered);
  }

  // Only the warp whose turn it is gets here.
  __device__ void decide(int32_t step, bool compares, bool stable, bool covered, int32_t tokens) {
    PatienceCounter patience = shared_.patience;
    const bool settled = compares && patience.completes(stable, params_.patience);
    const bool is_last = stops(settled, covered, params_.all_agree);
    const int32_t read = shared_.tokens_read + tokens;
    const bool ends = is_last || step + 1 == item_.steps.num_steps;
    __syncwarp();
    if (lane_ == 0) {
      shared_.patience = patience;
      shared_.tokens_read = read;
      if (ends) shared_.is_finished = true;
    }
    if (ends) write_result(read, is_last ? item_.steps.block_of(step) : -1);
  }

  __device__ void write_result(int32_t tokens_read, int32_t stop_block) {
    if (lane_ == 0) {
      params_.tokens_read[index_] = tokens_read;
      params_.stop_block[index_] = stop_block;
    }
    const int64_t first_row =
        int64_t{item_.batch} * params_.num_q_heads + item_.kv_head * params_.group_size;
#pragma unroll
    for (int ht = 0; ht < kHeadTiles; ++ht) {
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int32_t g = head(ht, column);
        if (g >= params_.group_size) continue;
        const SoftmaxState state = after_.softmax[g];
        const float share = 1.0f / denominator_of(state, sink_of(params_, item_, g));
        T* row = static_cast<T*>(params_.out) + (first_row + g) * kDim + lane_ / 4;
#pragma unroll
        for (int i = 0; i < kDim / 16; ++i) {
          const float4 a = after_.values[ht][i][lane_];
          row[16 * i] = Mma<T>::round((column == 0 ? a.x : a.y) * share);
          row[16 * i + 8] = Mma<T>::round((column == 0 ? a.z : a.w) * share);
        }
        if (lane_ < 4) params_.lse[first_row + g] = log_sum_exp(state);
      }
    }
  }

  const DecodeParams& params_;
  const ListedWalks& walks_;
  Shared& shared_;
  const Item& item_;
  const int32_t index_;
  const int warp_, lane_;
  const typename Shared::Running& before_;
  typename Shared::Running& after_;
};

// Nothing has been read: what the first step is folded into, and the result where there is no step.
template <class T, int kDim, int kHeadTiles>
__device__ void clear(SoloShared<T, kDim, kHeadTiles>& shared, int thread, int num_threads) {
  for (auto& running : shared.running) {
    for (int i = thread; i < 8 * kHeadTiles; i += num_threads) running.softmax[i] = {};
    for (int i = thread; i < kHeadTiles * kDim / 16 * 32; i += num_threads) {
      running.values[0][0][i] = {};
    }
  }
}

template <class T, int kDim, int kHeadTiles>
constexpr int kSoloThreads = 32 * (SoloShared<T, kDim, kHeadTiles>::kConsumers + 1);

template <class T, int kDim, int kHeadTiles>
__global__ void __launch_bounds__(kSoloThreads<T, kDim, kHeadTiles>, num_blocks(kDim, kHeadTiles))
    solo_kernel(const __grid_constant__ DecodeParams params,
                const __grid_constant__ ListedWalks walks, const __grid_constant__ Maps maps) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  __trap();
#else
  using Shared = SoloShared<T, kDim, kHeadTiles>;
  constexpr int kThreads = kSoloThreads<T, kDim, kHeadTiles>;
  extern __shared__ unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared*>(aligned(memory));
  static_assert(sizeof(shared.running) >= kMaxSorted * sizeof(int32_t));
  if (threadIdx.x == 0) {
    prefetch_map(&maps.key);
    prefetch_map(&maps.value);
    shared.stages.init();
    for (Barrier& turn : shared.fold_turn) turn.init(1);
    for (Barrier& turn : shared.verdict_turn) turn.init(1);
    shared.patience = PatienceCounter();
    shared.tokens_read = 0;
    shared.is_finished = false;
    fence_barrier_init();
  }
  wait_for_kernel_before();
  const int32_t index =
      item_at(params, blockIdx.x, reinterpret_cast<int32_t*>(shared.running), shared.found_row);
  const Item item = find_item(params, walks, index);
  clear(shared, threadIdx.x, kThreads);
  shared.query.load(params, item.batch, item.kv_head * params.group_size, params.group_size,
                    threadIdx.x, kThreads);
  __syncthreads();
  if (threadIdx.x / 32 == Shared::kConsumers) {
    produce(params, maps, item, shared.stages, 1, 0, 0, 1, [&] { return shared.is_finished; });
    return;
  }
  if (threadIdx.x == 0) {
    shared.fold_turn[0].arrive();
    shared.verdict_turn[0].arrive();
  }
  SoloConsumer<T, kDim, kHeadTiles>(params, walks, shared, item, index).run();
#endif
}

template <class T, int kDim, int kHeadTiles>
cudaError_t run_solo(const DecodeParams& params, const ListedWalks& walks, const Maps& maps,
                     cudaStream_t stream, int* blocks) {
  constexpr int kBytes = sizeof(SoloShared<T, kDim, kHeadTiles>) + kSharedAlignment;
  constexpr int kThreads = kSoloThreads<T, kDim, kHeadTiles>;
  const auto kernel = solo_kernel<T, kDim, kHeadTiles>;
  if (blocks != nullptr) {
    bool can_run;
    *blocks = 0;
    const cudaError_t error = prepare(kernel, kBytes, &can_run);
    if (!can_run) return error;
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, kThreads, kBytes);
  }
  cudaLaunchAttribute attribute = early_start();
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(params.batch) * params.num_kv_heads);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params, walks, maps);
}

}  // namespace art::cuda::sm90
