// Decode attention on tensor cores for sm_80 and newer. A thread block computes one item, or every
// crew-th step of it; keys are the rows of the matrix products and query heads the columns, so any
// GQA ratio up to 16 runs the same code.
#pragma once

#include "cuda/sm80/step.cuh"

namespace art::cuda::sm80 {

template <class T, int kDim, int kHeadTiles>
class Block : StepAttention<T, kDim, kHeadTiles> {
  using Base = StepAttention<T, kDim, kHeadTiles>;
  using typename Base::S;

 public:
  __device__ Block(const DecodeParams& params, const Workspace& workspace,
                   Shared<kDim, kHeadTiles>& shared, int32_t index, int32_t rank, const Item& item)
      : Base(params, workspace, shared, item, rank), index_(index) {
    const int32_t steps = item.steps.num_steps;
    num_local_ = steps > rank ? (steps - rank - 1) / workspace.crew + 1 : 0;
  }

  // Works through the tiles from `tile` on. Returns the wave that has to be folded before it goes
  // on, or -1 at the end.
  __device__ int32_t run(int32_t& tile) {
    load_query();
    const int32_t num_tiles = num_local_ * tiles_per_step_;
    if (tile == 0) start_pipeline(num_tiles);
    while (tile < num_tiles) {
      wait_copies<S::kStages - 2>();
      __syncthreads();
      advance_pipeline(tile, num_tiles);
      const bool first = tile % tiles_per_step_ == 0;
      const bool last = tile % tiles_per_step_ == tiles_per_step_ - 1;
      score(tile);
      __syncthreads();
      if (first && workspace_.crew == 1 && decide()) break;
      weigh(tile, first);
      const int32_t local = tile++ / tiles_per_step_;
      if (!last) continue;
      if (workspace_.crew == 1) {
        fold_step(local);
        continue;
      }
      const Next next = store_step(local);
      if (next != Next::kTile) return next == Next::kFold ? wave_of(local) : -1;
    }
    if (workspace_.crew > 1) return -1;
    __syncthreads();
    if (stop_block_ < 0) decide();
    write_output();
    return -1;
  }

 private:
  enum class Next { kTile, kFold, kEnd };

  using Base::advance_pipeline, Base::load_query, Base::of_column, Base::score;
  using Base::item_, Base::lane_, Base::params_, Base::shared_, Base::step_, Base::step_values_;
  using Base::start_pipeline, Base::step_of, Base::weigh, Base::write_step;
  using Base::thread_, Base::tiles_per_step_, Base::warp_, Base::workspace_;

  // ---- folding, one thread block per item

  __device__ bool compares(int32_t step) const {
    return params_.use_stability && item_.steps.block_of(step) > 0;
  }

  __device__ void fold_step(int32_t step) {
    const bool compare = compares(step);
    pending_step_ = step;
#pragma unroll
    for (int ht = 0; ht < kHeadTiles; ++ht) {
      const SoftmaxState before = running_[ht];
      const FoldFactors factors = fold(running_[ht], step_[ht]);
      const int32_t g = 8 * ht + lane_ / 4;
      const IncrementWeights weights =
          increment_weights(before, step_[ht], running_[ht], factors, sink_of(params_, item_, g));
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        fold_column(ht, column, factors, weights, compare, step);
      }
    }
  }

  __device__ void fold_column(int ht, int column, const FoldFactors& factors,
                              const IncrementWeights& weights, bool compare, int32_t step) {
    const FoldFactors of_head = {of_column(factors.running, column),
                                 of_column(factors.incoming, column)};
    const IncrementWeights increment = {of_column(weights.keep, column),
                                        of_column(weights.share, column)};
    const float scale = of_column(scale_[ht], column);
    float sums[3] = {};
#pragma unroll
    for (int i = 0; i < 2 * S::kSlices; ++i) {
      float& value = values_[ht][i / 2][i % 2 * 2 + column];
      const FoldedElement element(value, step_values_[ht][i / 2][i % 2 * 2 + column], of_head);
      value = element.after();
      const float a = element.before * scale, d = element.change(increment, scale);
      sums[0] += a * a;
      sums[1] += a * d;
      sums[2] += d * d;
    }
    if (!params_.use_stability) return;
    if (!compare) sums[0] = largest_in_column(column, ht);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      for (int other = 4; other <= 16; other *= 2) {
        const float y = __shfl_xor_sync(~0u, sums[i], other);
        sums[i] = compare ? sums[i] + y : fmaxf(sums[i], y);
      }
      if (lane_ < 4) {
        shared_.moments[step % 2][warp_][8 * ht + 2 * lane_ + column][i] = sums[i];
      }
    }
  }

  __device__ float largest_in_column(int column, int ht) const {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 2 * S::kSlices; ++i) {
      largest = fmaxf(largest, fabsf(values_[ht][i / 2][i % 2 * 2 + column]));
    }
    return largest;
  }

  // The decision about the last folded step, one barrier after its moments were written. Every
  // warp sees all heads and comes to the same result.
  __device__ bool decide() {
    if (pending_step_ < 0) return false;
    const int32_t step = pending_step_;
    pending_step_ = -1;
    const bool settled = params_.use_stability && completes_patience(step);
    const bool covered =
        params_.use_residual && item_.steps.completes_block(step) && is_group_covered(step);
    if (!stops(settled, covered, params_.all_agree)) return false;
    stop_block_ = item_.steps.block_of(step);
    num_read_ = step + 1;
    return true;
  }

  __device__ bool completes_patience(int32_t step) {
    const bool compare = compares(step);
    const StabilityThresholds thresholds = thresholds_of(params_, item_);
    bool stable = true;
#pragma unroll
    for (int ht = 0; ht < kHeadTiles; ++ht) {
      const int32_t g = 8 * ht + lane_ / 4;
      float sums[3] = {};
      for (int warp = 0; warp < kWarps; ++warp) {
        const float* part = shared_.moments[step % 2][warp][g];
        for (int i = 0; i < 3; ++i) sums[i] = compare ? sums[i] + part[i] : fmaxf(sums[i], part[i]);
      }
      if (!compare) {
        // The starting output sets the scale that keeps the squares in range.
        scale_[ht] = moment_scale(sums[0]);
        continue;
      }
      const OutputChange change = output_change({sums[0], sums[1], sums[2]});
      stable = stable && (g >= params_.group_size || is_stable(change, thresholds));
      if (sums[0] > 1e20f || sums[0] < 1e-20f) scale_[ht] *= moment_scale(sqrtf(sums[0]));
    }
    return compare && patience_.completes(__all_sync(~0u, stable), params_.patience);
  }

  // Whether every head has little enough left. The running states are still those after the step.
  __device__ bool is_group_covered(int32_t step) const {
    const int32_t entry = last_entry_of(item_, step, kept_units_of(params_, workspace_));
    bool covered = true;
#pragma unroll
    for (int ht = 0; ht < kHeadTiles; ++ht) {
      const int32_t g = 8 * ht + lane_ / 4;
      if (g >= params_.group_size) continue;
      covered = covered && is_head_covered(params_, item_, g, entry, running_[ht]);
    }
    return __all_sync(~0u, covered);
  }

  __device__ void write_output() {
    const int32_t first_head = item_.kv_head * params_.group_size;
    const int64_t first_row = int64_t{item_.batch} * params_.num_q_heads + first_head;
#pragma unroll
    for (int ht = 0; ht < kHeadTiles; ++ht) {
      const int32_t own = 8 * ht + lane_ / 4;
      const bool exists = own < params_.group_size;
      const float total = running_[ht].sum + sink_mass(running_[ht], sink_of(params_, item_, own));
      if (exists && thread_ % 4 == 0 && warp_ == 0) {
        params_.lse[first_row + own] = log_sum_exp(running_[ht]);
      }
#pragma unroll
      for (int i = 0; i < 4 * S::kSlices; ++i) {
        const float denominator = of_column(total, i % 2), sum = of_column(running_[ht].sum, i % 2);
        const int32_t g = 8 * ht + 2 * (lane_ % 4) + i % 2;
        const int32_t d = 16 * (i / 4 * kWarps + warp_) + lane_ / 4 + 8 * (i % 4 / 2);
        if (g >= params_.group_size || d >= kDim) continue;
        // Nothing read leaves 0 / 0, which is defined as zero.
        const float value = sum == 0.0f ? 0.0f : values_[ht][i / 4][i % 4] / denominator;
        static_cast<T*>(params_.out)[(first_row + g) * kDim + d] = Mma<T>::round(value);
      }
    }
    count_tokens(params_, item_, stop_block_ < 0 ? item_.steps.num_steps : num_read_,
                 params_.tokens_read + index_);
    if (thread_ == 0) params_.stop_block[index_] = stop_block_;
  }

  // ---- handing over, several thread blocks per item

  __device__ int32_t wave_of(int32_t local) const { return step_of(local) / workspace_.wave_steps; }

  // Stores the step for the fold of its wave.
  __device__ Next store_step(int32_t local) {
    const int32_t step = step_of(local), wave = wave_of(local);
    CrewState& state = workspace_.state[index_];
    if (thread_ == 0) {
      // The ring slot is free once the wave that used it last is folded.
      int32_t folded;
      while ((folded = load_acquire(&state.folded_waves)) <= wave - kRingWaves) __nanosleep(100);
      shared_.flag = folded;
    }
    __syncthreads();
    if (shared_.flag == kFinished) return Next::kEnd;
    const int64_t slot =
        (int64_t{index_} * kRingWaves + wave % kRingWaves) * workspace_.wave_steps +
        step % workspace_.wave_steps;
    write_step(workspace_.ring_softmax + slot * params_.group_size,
               workspace_.ring_values + slot * params_.group_size * kDim);
    const bool last_of_wave = local + 1 == num_local_ || wave_of(local + 1) != wave;
    return last_of_wave ? arrive(state, wave) : Next::kTile;
  }

  // The last of the crew to finish a wave folds it. Waves are folded in order; whoever folds the
  // one before is running, so the wait ends.
  __device__ Next arrive(CrewState& state, int32_t wave) {
    __syncthreads();
    if (thread_ == 0) {
      const int32_t left = item_.steps.num_steps - wave * workspace_.wave_steps;
      const int32_t expected = left < workspace_.crew ? left : workspace_.crew;
      int32_t* arrivals = workspace_.arrivals + int64_t{index_} * workspace_.max_waves + wave;
      const bool folds = add_acq_rel(arrivals, 1) + 1 == expected;
      int32_t folded = -1;
      while (folds && (folded = load_acquire(&state.folded_waves)) < wave) __nanosleep(50);
      shared_.flag = folded;
    }
    __syncthreads();
    if (shared_.flag == wave) return Next::kFold;
    return shared_.flag == kFinished ? Next::kEnd : Next::kTile;
  }

  const int32_t index_;
  int32_t num_local_;
  SoftmaxState running_[kHeadTiles];
  float values_[kHeadTiles][S::kSlices][4] = {};
  float scale_[kHeadTiles] = {};
  PatienceCounter patience_;
  int32_t pending_step_ = -1;
  int32_t stop_block_ = -1;
  int32_t num_read_ = 0;
};

template <class T, int kDim, int kHeadTiles>
__global__ void __launch_bounds__(kThreads, kDim <= 128 && kHeadTiles == 1 ? 3 : 2)
    decode_kernel(const __grid_constant__ DecodeParams params,
                  const __grid_constant__ Workspace workspace) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<kDim, kHeadTiles>*>(memory);
  const int32_t index = blockIdx.x / workspace.crew, rank = blockIdx.x % workspace.crew;
  const TokenRange visible = visible_of(params, index);
  const int32_t pinned = num_pinned_of(params, index);
  const KeptUnits kept = kept_units_of(params, workspace);
  const Walk walk = params.walk_order == WalkOrder::kExplicit
                        ? visible_walk<kThreads>(params, index, visible, kept)
                        : built_in_walk(params.walk_order, visible, params.unit_size, pinned);
  const Item item = make_item(params, index, visible, walk);
  if (workspace.crew > 1 && item.steps.num_steps == 0 && rank == 0) {
    for (int32_t g = threadIdx.x / 32; g < params.group_size; g += kWarps) {
      write_head<T, kDim>(params, item, g, {});
    }
    if (threadIdx.x == 0) params.tokens_read[index] = 0, params.stop_block[index] = -1;
  }
  int32_t tile = 0, wave = 0;
  do {
    // A fold takes nearly all registers, so of a Block only the copies under way live through it.
    wave = Block<T, kDim, kHeadTiles>(params, workspace, shared, index, rank, item).run(tile);
  } while (wave >= 0 && !fold_wave<T, kDim>(params, workspace, item, index, wave));
}

template <class T, int kDim, int kHeadTiles>
cudaError_t run_heads(const DecodeParams& params, const Workspace& workspace, cudaStream_t stream,
                      int* blocks) {
  constexpr int kBytes = sizeof(Shared<kDim, kHeadTiles>);
  const auto kernel = decode_kernel<T, kDim, kHeadTiles>;
  if (blocks != nullptr) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (error != cudaSuccess) return error;
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, kThreads, kBytes);
  }
  const unsigned grid = static_cast<unsigned>(params.batch) * params.num_kv_heads * workspace.crew;
  kernel<<<grid, kThreads, kBytes, stream>>>(params, workspace);
  return cudaGetLastError();
}

template <class T, int kDim>
cudaError_t run(const DecodeParams& params, const Workspace& workspace, cudaStream_t stream,
                int* blocks) {
  if (params.group_size <= 8) return run_heads<T, kDim, 1>(params, workspace, stream, blocks);
  return run_heads<T, kDim, 2>(params, workspace, stream, blocks);
}

}  // namespace art::cuda::sm80
