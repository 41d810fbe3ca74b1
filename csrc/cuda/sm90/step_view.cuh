// How one step of a batch changes the running output, as a lane of a folding warp sees it.
#pragma once

#include "core/termination.h"
#include "cuda/sm90/launch.h"

namespace art::cuda::sm90 {

// Of {aa, ad, dd}.
__device__ inline bool is_inside(const float* moments) {
  return in_range({moments[0], moments[1], moments[2]});
}

// One step and one pair of heads, in the channels of one slice. Where four lanes are more than
// there are pairs, two lanes share a pair and each takes half of the channels.
struct StepView {
  int32_t pairs;
  bool is_halved;
  const float4* before;  // output before the step, [row][kLanePairs]: {head, head + 1} of a
                         // channel, and of the one 8 further
  const float4* values;  // of the step, [row][pairs]: the same
  float4 weights;        // {change, share} of both heads

  // The moments {aa, ad, dd} of both heads, of vectors multiplied by `scales`.
  __device__ void sum(const float (&scales)[2], float (&sums)[6]) const {
#pragma unroll
    for (float& sum : sums) sum = 0.0f;
    const float s = scales[0], t = scales[1];
    for_each_row([&](const float4& a, const float4& d) {
      add(a.x * s, a.z * s, d.x * s, d.z * s, sums);
      add(a.y * t, a.w * t, d.y * t, d.w * t, sums + 3);
    });
    if (!is_halved) return;
#pragma unroll
    for (float& sum : sums) sum += __shfl_xor_sync(~0u, sum, 2);
  }

  // The same where squares have left the range of float32; chooses the scales.
  __device__ void sum_scaled(float (&scales)[2], float (&sums)[6]) const {
    float largest[2] = {};
    for_each_row([&](const float4& a, const float4& d) {
      largest[0] =
          fmaxf(largest[0], fmaxf(fmaxf(fabsf(a.x), fabsf(a.z)), fmaxf(fabsf(d.x), fabsf(d.z))));
      largest[1] =
          fmaxf(largest[1], fmaxf(fmaxf(fabsf(a.y), fabsf(a.w)), fmaxf(fabsf(d.y), fabsf(d.w))));
    });
#pragma unroll
    for (int head = 0; head < 2; ++head) {
      float most = largest[head];
      if (is_halved) most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
      // What a step gives must not depend on those it shares a batch with.
      if (!is_inside(sums + 3 * head)) scales[head] = moment_scale(most);
    }
    sum(scales, sums);
  }

 private:
  // Visits the lane's rows: the output before the step, and its change.
  template <class Visit>
  __device__ void for_each_row(const Visit& visit) const {
    const float4& w = weights;
    const int num_rows = is_halved ? 4 : 8;
    for (int first = 0; first < num_rows; first += 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4 a = before[kLanePairs * (first + i)];
        const float4 p = values[pairs * (first + i)];
        const float4 d = make_float4(p.x * w.x - a.x * w.y, p.y * w.z - a.y * w.w,
                                     p.z * w.x - a.z * w.y, p.w * w.z - a.w * w.w);
        visit(a, d);
      }
    }
  }

  __device__ static void add(float a, float a_next, float d, float d_next, float* sums) {
    sums[0] = fmaf(a_next, a_next, fmaf(a, a, sums[0]));
    sums[1] = fmaf(a_next, d_next, fmaf(a, d, sums[1]));
    sums[2] = fmaf(d_next, d_next, fmaf(d, d, sums[2]));
  }
};

}  // namespace art::cuda::sm90
