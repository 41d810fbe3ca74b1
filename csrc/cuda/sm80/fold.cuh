// Folding when several thread blocks compute one item: whoever finishes a wave of steps last folds
// the whole wave, in walk order, so the stop decision is the sequential one.
#pragma once

#include "core/item.h"
#include "core/online_softmax.h"
#include "core/termination.h"
#include "cuda/rows.cuh"
#include "cuda/sm80/launch.h"
#include "cuda/sm80/mma.cuh"

namespace art::cuda::sm80 {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

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

__device__ inline const float* sink_of(const DecodeParams& params, const Item& item, int32_t g) {
  if (params.attn_sinks == nullptr) return nullptr;
  return params.attn_sinks + item.kv_head * params.group_size + g;
}

__device__ inline StabilityThresholds thresholds_of(const DecodeParams& params, const Item& item) {
  if (params.thresholds == nullptr) return {params.d_scale, params.d_direction};
  return {params.thresholds[2 * item.kv_head], params.thresholds[2 * item.kv_head + 1]};
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

// The part of one head that a lane owns: elements lane, lane + 32, ...
template <int kDim>
struct HeadSlice {
  static constexpr int kElements = kDim / 32;
  float values[kElements];
  SoftmaxState softmax;

  __device__ void load(const float* from, const SoftmaxState* state) {
    softmax = *state;
    for (int i = 0; i < kElements; ++i) values[i] = from[threadIdx.x % 32 + 32 * i];
  }
  __device__ void save(float* to, SoftmaxState* state) const {
    for (int i = 0; i < kElements; ++i) to[threadIdx.x % 32 + 32 * i] = values[i];
    if (threadIdx.x % 32 == 0) *state = softmax;
  }
  __device__ FoldFactors add(const HeadSlice& step) {
    const FoldFactors factors = fold(softmax, step.softmax);
    for (int i = 0; i < kElements; ++i) {
      values[i] = values[i] * factors.running + step.values[i] * factors.incoming;
    }
    return factors;
  }
};

template <int kDim>
__device__ OutputChange change_of(const HeadSlice<kDim>& before, const HeadSlice<kDim>& step,
                                  const SoftmaxState& after, const FoldFactors& factors,
                                  const float* sink) {
  const IncrementWeights weights = increment_weights(step.softmax, after, factors, sink);
  const auto moments = [&](float scale, float* largest) {
    IncrementMoments sums = {};
    for (int i = 0; i < HeadSlice<kDim>::kElements; ++i) {
      const float a = before.values[i] * factors.running * scale;
      const float d = step.values[i] * factors.incoming * weights.keep * scale - a * weights.share;
      sums.aa += a * a;
      sums.ad += a * d;
      sums.dd += d * d;
      if (largest != nullptr) *largest = fmaxf(*largest, fmaxf(fabsf(a), fabsf(d)));
    }
    return IncrementMoments{warp_sum(sums.aa), warp_sum(sums.ad), warp_sum(sums.dd)};
  };
  float largest = 0.0f;
  IncrementMoments sums = moments(1.0f, &largest);
  if (!in_range(sums)) sums = moments(moment_scale(warp_max(largest)), nullptr);
  return output_change(sums);
}

template <class T, int kDim>
__device__ void write_head(const DecodeParams& params, const Item& item, int32_t g,
                           const HeadSlice<kDim>& head) {
  const int32_t q_head = item.kv_head * params.group_size + g;
  const int64_t row = int64_t{item.batch} * params.num_q_heads + q_head;
  const SoftmaxState& state = head.softmax;
  const float total = state.sum + sink_mass(state, sink_of(params, item, g));
  for (int i = 0; i < HeadSlice<kDim>::kElements; ++i) {
    // Nothing read leaves 0 / 0, which is defined as zero.
    const float value = state.sum == 0.0f ? 0.0f : head.values[i] / total;
    static_cast<T*>(params.out)[row * kDim + threadIdx.x % 32 + 32 * i] = Mma<T>::round(value);
  }
  if (threadIdx.x % 32 == 0) params.lse[row] = log_sum_exp(state);
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

  __device__ HeadSlice<kDim> step(int32_t i, int32_t g) const {
    HeadSlice<kDim> slice;
    slice.load(ring_values + (int64_t{i} * group + g) * kDim, ring_softmax + i * group + g);
    return slice;
  }
  __device__ HeadSlice<kDim> before(int32_t g) const {
    HeadSlice<kDim> slice = {};
    if (!is_first) slice.load(before_values + g * kDim, before_softmax + g);
    return slice;
  }
};

// Visits the first steps of a wave in order. Several are loaded before the first is used: one at a
// time, every step would wait for the second-level cache.
template <int kDim, class Visit>
__device__ void for_each_step(const Wave<kDim>& wave, int32_t count, int32_t g,
                              const Visit& visit) {
  constexpr int kAhead = kDim <= 128 ? 4 : 1;
  HeadSlice<kDim> steps[kAhead];
  for (int32_t base = 0; base < count; base += kAhead) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (base + i < count) steps[i] = wave.step(base + i, g);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (base + i < count) visit(base + i, steps[i]);
    }
  }
}

// Folds one wave; returns true when that finished the item. Called by a whole thread block.
template <class T, int kDim>
__device__ bool fold_wave(const DecodeParams& params, const Workspace& workspace, const Item& item,
                          int32_t index, int32_t wave_number) {
  __shared__ uint32_t unstable;  // bit i: step i of the wave is not stable for every head
  __shared__ int32_t stop;       // index of the step that completes the patience, or -1
  const Wave<kDim> wave(params, workspace, item, index, wave_number);
  const StabilityThresholds thresholds = thresholds_of(params, item);
  if (threadIdx.x == 0) unstable = 0;
  __syncthreads();
  for (int32_t g = threadIdx.x / 32; g < wave.group; g += kWarps) {
    HeadSlice<kDim> running = wave.before(g);
    uint32_t mask = 0;
    for_each_step(wave, wave.count, g, [&](int32_t i, const HeadSlice<kDim>& step) {
      const HeadSlice<kDim> before = running;
      const FoldFactors factors = running.add(step);
      if (!params.use_stability || item.steps.block_of(wave.first + i) == 0) return;
      const OutputChange change =
          change_of(before, step, running.softmax, factors, sink_of(params, item, g));
      if (!is_stable(change, thresholds)) mask |= 1u << i;
    });
    if (threadIdx.x % 32 == 0) atomicOr(&unstable, mask);
    running.save(wave.after_values + g * kDim, wave.after_softmax + g);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    stop = -1;
    PatienceCounter& patience = workspace.state[index].patience;
    for (int32_t i = 0; params.use_stability && i < wave.count && stop < 0; ++i) {
      if (item.steps.block_of(wave.first + i) == 0) continue;
      if (patience.completes(!(unstable >> i & 1), params.patience)) stop = i;
    }
  }
  __syncthreads();
  const int32_t end = wave.first + wave.count;
  if (stop < 0 && end < item.steps.num_steps) return false;

  // A stop inside the wave: its first steps are folded once more, up to there.
  const int32_t count = stop < 0 ? wave.count : stop + 1;
  for (int32_t g = threadIdx.x / 32; g < wave.group; g += kWarps) {
    HeadSlice<kDim> running = wave.before(g);
    for_each_step(wave, count, g, [&](int32_t, const HeadSlice<kDim>& step) { running.add(step); });
    write_head<T>(params, item, g, running);
  }
  count_tokens(params, item, wave.first + count, params.tokens_read + index);
  if (threadIdx.x == 0) {
    params.stop_block[index] = stop < 0 ? -1 : item.steps.block_of(wave.first + stop);
  }
  return true;
}

}  // namespace art::cuda::sm80
