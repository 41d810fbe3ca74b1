// When reading may stop. The rule of Attention Run-time Termination (arXiv 2606.00024): how much
// one block of keys changed the attention output. And our own: how much of the softmax mass is
// left. The only definitions there are.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/bits.h"
#include "core/macros.h"
#include "core/online_softmax.h"

namespace art {

// With a the weighted values so far and p those of the block, both brought to the common maximum,
// the output before the block is a / T0 and after it (a + p) / T1, where T0 and T1 are the
// denominators, sink included. Up to the common factor 1 / T0, which cancels from every ratio,
// the output is a, and its change is d = keep * p - share * a. Subtracting two nearly equal
// outputs instead would leave only rounding noise at thresholds such as 1e-7.
struct IncrementWeights {
  float keep;   // T0 / T1
  float share;  // 1 - keep: the block's share of the softmax mass
};

// `earlier`, `block`: softmax mass before the block and of it, against the maximum of `after`.
// The total without the block would be wrong for a block that outweighs all before it by far: their
// difference has few digits of what was there, or none.
ART_HD IncrementWeights increment_weights(float earlier, float block, const SoftmaxState& after,
                                          const float* sink_logit) {
  const float sink = sink_mass(after, sink_logit), total = after.sum + sink;
  // A sink far above every logit overflows the total: the block's share is then nothing.
  if (total == INFINITY) return {1.0f, 0.0f};
  return {(earlier + sink) / total, block / total};
}

ART_HD IncrementWeights increment_weights(const SoftmaxState& before, const SoftmaxState& incoming,
                                          const SoftmaxState& after, const FoldFactors& factors,
                                          const float* sink_logit) {
  return increment_weights(before.sum * factors.running, incoming.sum * factors.incoming, after,
                           sink_logit);
}

// Inner products of the output a and its change d.
struct IncrementMoments {
  float aa;
  float ad;
  float dd;
};

// False where squares may have left the range of float32: the moments must then be formed again
// from vectors multiplied by moment_scale().
ART_HD bool in_range(const IncrementMoments& moments) {
  return moments.aa > 1e-30f && moments.aa < 1e30f && moments.dd < 1e30f;
}

// A power of two that brings the largest element of both vectors near one. Exact, and common to
// both, so it changes no ratio.
ART_HD float moment_scale(float largest) {
  if (!(largest > 0.0f) || largest == INFINITY) return 1.0f;
  const uint32_t biased = bits_of(largest) >> 23, exponent = biased < 253u ? biased : 253u;
  return float_of_bits((254u - exponent) << 23);  // 2^-e for a largest element of 2^e
}

// Relative change of the output's length, and one minus the cosine between old and new output.
struct OutputChange {
  float scale;
  float direction;
};

ART_HD OutputChange output_change(const IncrementMoments& moments) {
  if (moments.dd == 0.0f) return {0.0f, 0.0f};
  if (moments.aa == 0.0f) return {INFINITY, INFINITY};
  const float projection = moments.ad / moments.aa;
  const float increment_sq = moments.dd / moments.aa;
  const float growth = 2.0f * projection + increment_sq;  // |new|^2 / |old|^2 - 1
  const float ratio_sq = 1.0f + growth;
  if (ratio_sq <= 0.0f) return {1.0f, 1.0f};
  const float ratio = std::sqrt(ratio_sq);
  const float scale = std::fabs(growth) / (1.0f + ratio);

  // Rounding can make the Gram determinant negative; a NaN must stay one.
  float sine_sq = (increment_sq - projection * projection) / ratio_sq;
  if (sine_sq < 0.0f) sine_sq = 0.0f;
  const float cosine = (1.0f + projection) / ratio;
  const float direction = cosine > 0.0f ? sine_sq / (1.0f + cosine) : 1.0f - cosine;
  return {scale, direction};
}

struct StabilityThresholds {
  float d_scale;
  float d_direction;
};

// Comparisons with NaN are false: an output that is not a number is never stable.
ART_HD bool is_stable(const OutputChange& change, const StabilityThresholds& thresholds) {
  return change.scale <= thresholds.d_scale && change.direction <= thresholds.d_direction;
}

// Counts consecutive stable blocks; a block counts as stable when it is so for every query head
// of the group.
struct PatienceCounter {
  int32_t stable_blocks = 0;

  ART_HD bool completes(bool block_is_stable, int32_t patience) {
    stable_blocks = block_is_stable ? stable_blocks + 1 : 0;
    return stable_blocks >= patience;
  }

  // The same for blocks `first` to `end` - 1, a bit each, fewer than 32: the one that completes it,
  // or -1.
  ART_HD int32_t completes_among(uint32_t stable, int32_t first, int32_t end, int32_t patience) {
    const int32_t count = end - first;
    if (count > 0 && stable >> first == (1u << count) - 1) {
      const int32_t missing = patience - stable_blocks;
      stable_blocks += count;
      return missing <= count ? first + missing - 1 : -1;
    }
    for (int32_t i = first; i < end; ++i) {
      const uint32_t rest = stable >> i;
      if (rest == 0) {
        stable_blocks = 0;
        return -1;
      }
      if (completes(rest & 1, patience)) return i;
    }
    return -1;
  }
};

// With T the softmax denominator of what was read and R the mass of the rest, R / (T + R) <= eps
// just when log(R) - log(T) is at most this. -inf for eps 0: then nothing may be left.
inline float residual_limit(double eps) { return static_cast<float>(std::log(eps / (1.0 - eps))); }

// Whether a head has so much of its softmax mass that it needs no more. A block is covered when
// every query head of the group is. A difference that is NaN never is: of NaN itself, of nothing
// left where nothing was read, or of two infinities.
ART_HD bool is_covered(const SoftmaxState& read, const float* sink_logit, float log_rest,
                       float limit) {
  return log_rest - log_denominator(read, sink_logit) <= limit;
}

// Whether to stop after a block. `settled`: it completes the patience, and `covered`; false where
// there is no such rule. `all_agree` is for two rules, of which one is otherwise enough.
ART_HD bool stops(bool settled, bool covered, bool all_agree) {
  return all_agree ? settled && covered : settled || covered;
}

}  // namespace art
