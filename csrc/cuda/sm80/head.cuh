// One head's running output, spread over the lanes of a warp, and what folding a step does to it.
#pragma once

#include "core/item.h"
#include "core/online_softmax.h"
#include "core/termination.h"
#include "cuda/rows.cuh"
#include "cuda/sm80/mma.cuh"

namespace art::cuda::sm80 {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

__device__ inline SoftmaxState load_softmax(const SoftmaxState* state) {
  const float2 loaded = __ldcg(reinterpret_cast<const float2*>(state));
  return {loaded.x, loaded.y};
}

// The elements of one head's vector that a lane owns: lane, lane + 32, ...
template <int kDim>
struct HeadSlice {
  static constexpr int kElements = kDim / 32;
  float values[kElements];

  // Other multiprocessors wrote it, so it is read past the first-level cache.
  __device__ void load(const float* from) {
    for (int i = 0; i < kElements; ++i) values[i] = __ldcg(from + threadIdx.x % 32 + 32 * i);
  }
  __device__ void save(float* to) const {
    for (int i = 0; i < kElements; ++i) to[threadIdx.x % 32 + 32 * i] = values[i];
  }
  __device__ void fill(float value) {
    for (int i = 0; i < kElements; ++i) values[i] = value;
  }
};

// What folding a step does to the output of one head. It follows from the logits alone, so it is
// known for all steps of a wave before the first vector is looked at.
struct alignas(16) StepWeights {
  FoldFactors factors;
  IncrementWeights increment;
};

// An element of the output before and of its increment, each brought to the common maximum.
struct FoldedElement {
  float before;
  float added;

  __device__ FoldedElement(float running, float step, const FoldFactors& factors)
      : before(running * factors.running), added(step * factors.incoming) {}

  // Never contracted to a multiply-add, which would round differently from one kernel to the next.
  __device__ float after() const { return __fadd_rn(before, added); }
  __device__ float change(const IncrementWeights& weights, float scale) const {
    return added * weights.keep * scale - before * scale * weights.share;
  }
};

// This lane's part of the moments of one step. `running` is the output before it.
template <int kDim>
__device__ IncrementMoments partial_moments(const HeadSlice<kDim>& running,
                                            const HeadSlice<kDim>& step, const StepWeights& weights,
                                            float scale) {
  IncrementMoments sums = {};
  for (int i = 0; i < HeadSlice<kDim>::kElements; ++i) {
    const FoldedElement element(running.values[i], step.values[i], weights.factors);
    const float a = element.before * scale, d = element.change(weights.increment, scale);
    sums.aa += a * a;
    sums.ad += a * d;
    sums.dd += d * d;
  }
  return sums;
}

template <int kDim>
__device__ float largest_element(const HeadSlice<kDim>& running, const HeadSlice<kDim>& step,
                                 const StepWeights& weights) {
  float largest = 0.0f;
  for (int i = 0; i < HeadSlice<kDim>::kElements; ++i) {
    const FoldedElement element(running.values[i], step.values[i], weights.factors);
    const float d = element.change(weights.increment, 1.0f);
    largest = fmaxf(largest, fmaxf(fabsf(element.before), fabsf(d)));
  }
  return largest;
}

template <int kDim>
__device__ void add_step(HeadSlice<kDim>& running, const HeadSlice<kDim>& step,
                         const StepWeights& weights) {
  for (int i = 0; i < HeadSlice<kDim>::kElements; ++i) {
    const FoldedElement element(running.values[i], step.values[i], weights.factors);
    running.values[i] = element.after();
  }
}

// Sums kCount values over the warp, all at once: half of the values move at each exchange. Lane i
// ends with the sum of value i / (32 / kCount).
template <int kCount>
__device__ float warp_sums(float (&x)[kCount]) {
  int lane_bit = 16;
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2, lane_bit /= 2) {
    const bool upper = (threadIdx.x & lane_bit) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float kept = upper ? x[i + half] : x[i], given = upper ? x[i] : x[i + half];
      x[i] = kept + __shfl_xor_sync(~0u, given, lane_bit);
    }
  }
  for (; lane_bit > 0; lane_bit /= 2) x[0] += __shfl_xor_sync(~0u, x[0], lane_bit);
  return x[0];
}

// The running output of one head.
template <int kDim>
struct FoldedHead {
  SoftmaxState softmax;
  HeadSlice<kDim> slice;

  __device__ void load(const SoftmaxState* state, const float* values) {
    softmax = load_softmax(state);
    slice.load(values);
  }
  __device__ void save(SoftmaxState* state, float* values) const {
    if (threadIdx.x % 32 == 0) *state = softmax;
    slice.save(values);
  }
};

template <class T, int kDim>
__device__ void write_head(const DecodeParams& params, const Item& item, int32_t g,
                           const FoldedHead<kDim>& head) {
  const SoftmaxState& softmax = head.softmax;
  const int32_t q_head = item.kv_head * params.group_size + g;
  const int64_t row = int64_t{item.batch} * params.num_q_heads + q_head;
  const float total = softmax.sum + sink_mass(softmax, sink_of(params, item, g));
  for (int i = 0; i < HeadSlice<kDim>::kElements; ++i) {
    // Nothing read leaves 0 / 0, which is defined as zero.
    const float value = softmax.sum == 0.0f ? 0.0f : head.slice.values[i] / total;
    static_cast<T*>(params.out)[row * kDim + threadIdx.x % 32 + 32 * i] = Mma<T>::round(value);
  }
  if (threadIdx.x % 32 == 0) params.lse[row] = log_sum_exp(softmax);
}

}  // namespace art::cuda::sm80
