// Folding when several thread blocks compute one item: whoever finishes a wave of steps last folds
// the whole wave, in walk order, so the stop decision is the sequential one.
#pragma once

#include "cuda/sm80/head.cuh"
#include "cuda/sm80/launch.h"

namespace art::cuda::sm80 {

__device__ inline int32_t load_acquire(const int32_t* address) {
  int32_t value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

__device__ inline void store_release(int32_t* address, int32_t value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

__device__ inline int32_t add_acq_rel(int32_t* address, int32_t value) {
  int32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(address), "r"(value)
               : "memory");
  return before;
}

// Where this thread block puts what it keeps of an explicit walk.
__device__ inline KeptUnits kept_units_of(const DecodeParams& params, const Workspace& workspace) {
  const int64_t first = int64_t{blockIdx.x} * params.max_units;
  return {workspace.kept_units + first,
          params.use_residual ? workspace.kept_entries + first : nullptr};
}

// Visible tokens of the first `num_steps` steps; counted by all threads together.
__device__ inline void count_tokens(const DecodeParams& params, const Item& item, int32_t num_steps,
                                    int32_t* tokens_read) {
  __shared__ int32_t total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  const int32_t end = num_steps == 0 ? 0 : item.steps.positions(num_steps - 1).end;
  int32_t tokens = 0;
  for (int32_t i = threadIdx.x; i < end; i += kThreads) {
    tokens += unit_tokens(item.walk.unit_at(i), params.unit_size, item.visible).size();
  }
  atomicAdd(&total, tokens);
  __syncthreads();
  if (threadIdx.x == 0) *tokens_read = total;
}

// Steps of one wave, and the running output before and after it.
template <int kDim>
struct Wave {
  int32_t first;
  int32_t count;
  int32_t group;
  bool is_first;
  const SoftmaxState* ring_softmax;  // [count, group]
  const float* ring_values;          // [count, group, kDim]
  SoftmaxState* before_softmax;      // [group]
  float* before_values;              // [group, kDim]
  SoftmaxState* after_softmax;
  float* after_values;

  __device__ Wave(const DecodeParams& params, const Workspace& workspace, const Item& item,
                  int32_t index, int32_t wave) {
    const int64_t ring = (int64_t{index} * kRingWaves + wave % kRingWaves) * workspace.wave_steps;
    const int64_t before = 2 * int64_t{index} + wave % 2;
    const int64_t after = 2 * int64_t{index} + (wave + 1) % 2;
    group = params.group_size;
    first = wave * workspace.wave_steps;
    const int32_t left = item.steps.num_steps - first;
    count = left < workspace.wave_steps ? left : workspace.wave_steps;
    is_first = wave == 0;
    ring_softmax = workspace.ring_softmax + ring * group;
    ring_values = workspace.ring_values + ring * group * kDim;
    before_softmax = workspace.running_softmax + before * group;
    before_values = workspace.running_values + before * group * kDim;
    after_softmax = workspace.running_softmax + after * group;
    after_values = workspace.running_values + after * group * kDim;
  }

  // Steps from `end` on weigh nothing, and adding -0 to anything leaves it as it is.
  __device__ SoftmaxState step_softmax(int32_t i, int32_t end, int32_t g) const {
    return i < end ? load_softmax(ring_softmax + i * group + g) : SoftmaxState();
  }
  __device__ HeadSlice<kDim> step(int32_t i, int32_t end, int32_t g) const {
    HeadSlice<kDim> slice;
    slice.fill(-0.0f);
    if (i < end) slice.load(ring_values + (int64_t{i} * group + g) * kDim);
    return slice;
  }
  __device__ FoldedHead<kDim> before(int32_t g) const {
    FoldedHead<kDim> head = {};
    if (!is_first) head.load(before_softmax + g, before_values + g * kDim);
    return head;
  }
  __device__ FoldedHead<kDim> after(int32_t g) const {
    FoldedHead<kDim> head;
    head.load(after_softmax + g, after_values + g * kDim);
    return head;
  }
};

// Folds the logits of a wave's steps, of which lane i holds step i, and leaves the steps' weights.
// Maxima and exponentials are formed for all steps at once; only the sums depend on each other.
// Returns the state after the lane's own step.
__device__ inline SoftmaxState fold_softmax(const SoftmaxState& before, const SoftmaxState& step,
                                            const float* sink, StepWeights (&weights)[32]) {
  const int lane = threadIdx.x % 32;
  float max = step.max;
  for (int distance = 1; distance < 32; distance *= 2) {
    const float other = __shfl_up_sync(~0u, max, distance);
    if (lane >= distance && other > max) max = other;
  }
  const float earlier = __shfl_up_sync(~0u, max, 1);
  SoftmaxState after = {lane > 0 && earlier > before.max ? earlier : before.max, 0.0f};
  const FoldFactors factors = fold(after, step);
  const float added = after.sum;  // folded into nothing, the step leaves its own mass
  float sum = before.sum, mass_before = 0.0f;
#pragma unroll 8
  for (int i = 0; i < 32; ++i) {
    const float kept = __shfl_sync(~0u, factors.running, i);
    if (i == lane) mass_before = sum * kept;
    sum = __fmaf_rn(sum, kept, __shfl_sync(~0u, added, i));
    if (i == lane) after.sum = sum;
  }
  __syncwarp();  // the weights of the head before are no longer read
  weights[lane] = {factors, increment_weights(mass_before, added, after, sink)};
  __syncwarp();
  return after;
}

// Steps that are loaded before the first is used: one at a time, every step would wait for the
// second-level cache. Their moments are summed over the warp together.
template <int kDim>
constexpr int kAhead = kDim <= 128 ? 8 : 4;

// The step of a wave whose moments this lane ends with.
template <int kDim>
__device__ int32_t moments_step() {
  constexpr int kBatches = 32 / kAhead<kDim>;
  const int32_t lane = threadIdx.x % 32;
  return lane % kBatches * kAhead<kDim> + lane / kBatches;
}

// Folds the first `count` steps of a wave into one head, by one warp. `moments` receives those of
// the step moments_step(), `after` the state after the step with the lane's number.
template <bool kMoments, int kDim>
__device__ FoldedHead<kDim> fold_head(const Wave<kDim>& wave, int32_t count, int32_t g,
                                      const float* sink, StepWeights (&weights)[32],
                                      IncrementMoments& moments, SoftmaxState& after) {
  constexpr int kSteps = kAhead<kDim>, kBatches = 32 / kSteps;
  const int32_t lane = threadIdx.x % 32;
  const SoftmaxState own = wave.step_softmax(lane, count, g);
  FoldedHead<kDim> head = wave.before(g);
  HeadSlice<kDim> steps[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) steps[i] = wave.step(i, count, g);
  after = fold_softmax(head.softmax, own, sink, weights);
  head.softmax = {__shfl_sync(~0u, after.max, 31), __shfl_sync(~0u, after.sum, 31)};
  for (int32_t base = 0; base < count; base += kSteps) {
    float aa[kSteps], ad[kSteps], dd[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const StepWeights step_weights = weights[base + i];
      if constexpr (kMoments) {
        const IncrementMoments part = partial_moments(head.slice, steps[i], step_weights, 1.0f);
        aa[i] = part.aa, ad[i] = part.ad, dd[i] = part.dd;
      }
      add_step(head.slice, steps[i], step_weights);
      steps[i] = wave.step(base + i + kSteps, count, g);
    }
    if constexpr (kMoments) {
      const IncrementMoments sums = {warp_sums(aa), warp_sums(ad), warp_sums(dd)};
      if (lane % kBatches == base / kSteps) moments = sums;
    }
  }
  return head;
}

// Forms the moments of some steps (one bit each) again, from vectors brought into range.
template <int kDim>
__device__ void rescale_moments(const Wave<kDim>& wave, uint32_t which, int32_t g,
                                const StepWeights (&weights)[32], IncrementMoments& moments) {
  HeadSlice<kDim> running = wave.before(g).slice;
#pragma unroll 1
  for (int32_t i = 0; i < wave.count; ++i) {
    const HeadSlice<kDim> step = wave.step(i, wave.count, g);
    if (which >> i & 1) {
      const float scale = moment_scale(warp_max(largest_element(running, step, weights[i])));
      const IncrementMoments part = partial_moments(running, step, weights[i], scale);
      const IncrementMoments sums = {warp_sum(part.aa), warp_sum(part.ad), warp_sum(part.dd)};
      if (moments_step<kDim>() == i) moments = sums;
    }
    add_step(running, step, weights[i]);
  }
}

// Which of the steps that are compared (one bit each) changed the output of one head too much.
template <int kDim>
__device__ uint32_t unstable_steps(const Wave<kDim>& wave, uint32_t compared, int32_t g,
                                   const StabilityThresholds& thresholds,
                                   const StepWeights (&weights)[32], IncrementMoments moments) {
  const uint32_t own = compared & 1u << moments_step<kDim>();
  const uint32_t lost = __reduce_or_sync(~0u, in_range(moments) ? 0 : own);
  if (lost != 0) rescale_moments(wave, lost, g, weights, moments);
  return __reduce_or_sync(~0u, is_stable(output_change(moments), thresholds) ? 0 : own);
}

// Steps of a wave, one bit each.
struct Verdicts {
  uint32_t compared;  // with the output before them
  uint32_t unstable;  // of those, for a head of the group
  uint32_t covered;   // for every head of the group, and completing a block
};

// The step of a wave to stop after, or -1.
__device__ inline int32_t find_stop(PatienceCounter& counter, const Verdicts& verdicts,
                                    const DecodeParams& params) {
  int32_t stop = -1;
#pragma unroll
  for (int32_t i = 0; i < kMaxWaveSteps; ++i) {
    const bool settled = (verdicts.compared >> i & 1) &&
                         counter.completes(!(verdicts.unstable >> i & 1), params.patience);
    if (stop < 0 && stops(settled, verdicts.covered >> i & 1, params.all_agree)) stop = i;
  }
  return stop;
}

// Folds one wave; returns true when that finished the item. Called by a whole thread block, one of
// whose threads has seen that all steps of the wave are stored.
template <class T, int kDim>
__device__ bool fold_wave(const DecodeParams& params, const Workspace& workspace, const Item& item,
                          int32_t index, int32_t wave_number) {
  __shared__ StepWeights weights[kWarps][32];
  // Bit i: step i of the wave is not stable, or not covered, for every head.
  __shared__ uint32_t unstable, uncovered;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Wave<kDim> wave(params, workspace, item, index, wave_number);
  CrewState& state = workspace.state[index];
  PatienceCounter counter = {__ldcg(&state.patience.stable_blocks)};
  const bool compares =
      params.use_stability && lane < wave.count && item.steps.block_of(wave.first + lane) > 0;
  const uint32_t compared = __ballot_sync(~0u, compares);
  const StabilityThresholds thresholds = thresholds_of(params, item);
  // What is left is known of entries of the walk: of the last one that the lane's step reads.
  const bool can_cover =
      params.use_residual && lane < wave.count && item.steps.completes_block(wave.first + lane);
  const int32_t entry =
      can_cover ? last_entry_of(item, wave.first + lane, kept_units_of(params, workspace)) : -1;
  if (threadIdx.x == 0) unstable = 0, uncovered = 0;
  __syncthreads();
  for (int32_t g = warp; g < wave.group; g += kWarps) {
    const float* sink = sink_of(params, item, g);
    FoldedHead<kDim> head;
    IncrementMoments moments = {};
    SoftmaxState after;
    if (compared != 0) {
      head = fold_head<true>(wave, wave.count, g, sink, weights[warp], moments, after);
      const uint32_t mask = unstable_steps(wave, compared, g, thresholds, weights[warp], moments);
      if (lane == 0) atomicOr(&unstable, mask);
    } else {
      head = fold_head<false>(wave, wave.count, g, sink, weights[warp], moments, after);
    }
    if (params.use_residual) {
      const bool covered = can_cover && is_head_covered(params, item, g, entry, after);
      const uint32_t mask = __ballot_sync(~0u, !covered);
      if (lane == 0) atomicOr(&uncovered, mask);
    }
    head.save(wave.after_softmax + g, wave.after_values + g * kDim);
  }
  __syncthreads();
  const uint32_t covered = params.use_residual ? ~uncovered : 0;
  const int32_t stop = find_stop(counter, {compared, unstable, covered}, params);
  const bool finished = stop >= 0 || wave.first + wave.count == item.steps.num_steps;
  if (threadIdx.x == 0) {
    state.patience = counter;
    // Once finished, the rest of the crew need not read on while the result is written.
    store_release(&state.folded_waves, finished ? kFinished : wave_number + 1);
  }
  if (!finished) return false;

  const int32_t count = stop < 0 ? wave.count : stop + 1;
  for (int32_t g = warp; g < wave.group; g += kWarps) {
    // A stop inside the wave: its first steps are folded once more, up to there.
    IncrementMoments unused;
    SoftmaxState unused_state;
    const FoldedHead<kDim> head = count == wave.count
                                      ? wave.after(g)
                                      : fold_head<false>(wave, count, g, sink_of(params, item, g),
                                                         weights[warp], unused, unused_state);
    write_head<T>(params, item, g, head);
  }
  count_tokens(params, item, wave.first + count, params.tokens_read + index);
  if (threadIdx.x == 0) {
    params.stop_block[index] = stop < 0 ? -1 : item.steps.block_of(wave.first + stop);
  }
  return true;
}

}  // namespace art::cuda::sm80
