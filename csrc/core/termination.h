// The stopping rule of Attention Run-time Termination (arXiv 2606.00024): how much one block of
// keys changed the attention output, and whether reading may stop. The only definition there is.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"

namespace art {

// Inner products of the running output o and the increment direction u = (block mean) - o. The
// output after the block is o + w u, with w the block's share of the softmax mass so far.
template <typename T>
struct IncrementMoments {
  T oo;  // <o, o>
  T ou;  // <o, u>
  T uu;  // <u, u>
};

// Relative change of the output's length, and one minus the cosine between old and new output.
struct OutputChange {
  float scale;
  float direction;
};

// Both changes follow from the increment: subtracting two nearly equal outputs would leave only
// rounding noise at thresholds such as 1e-7. Everything is divided by |o|^2 first, so that only
// the squares themselves can leave the range of T.
template <typename T>
ART_HD OutputChange output_change(const IncrementMoments<T>& moments, T w) {
  if (w == T(0)) return {0.0f, 0.0f};
  if (moments.oo == T(0)) {
    if (moments.uu == T(0)) return {0.0f, 0.0f};
    return {INFINITY, INFINITY};
  }
  const T projection = w * (moments.ou / moments.oo);
  const T increment_sq = w * w * (moments.uu / moments.oo);
  const T growth = T(2) * projection + increment_sq;  // |o_new|^2 / |o|^2 - 1
  const T ratio_sq = T(1) + growth;
  if (ratio_sq <= T(0)) return {1.0f, 1.0f};
  const T ratio = std::sqrt(ratio_sq);
  const T scale = std::fabs(growth) / (T(1) + ratio);

  // Rounding can make the Gram determinant negative; a NaN must stay one.
  T sine_sq = (increment_sq - projection * projection) / ratio_sq;
  if (sine_sq < T(0)) sine_sq = T(0);
  const T cosine = (T(1) + projection) / ratio;
  const T direction = cosine > T(0) ? sine_sq / (T(1) + cosine) : T(1) - cosine;
  return {static_cast<float>(scale), static_cast<float>(direction)};
}

// True where float32 squares may have under- or overflowed, so that the moments must be formed
// again in double.
ART_HD bool needs_double(const IncrementMoments<float>& moments) {
  return !(moments.oo > 1e-30f && moments.oo < 1e30f && moments.uu < 1e30f);
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
};

}  // namespace art
