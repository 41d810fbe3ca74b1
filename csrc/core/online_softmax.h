// The softmax state of one query head, and how a later part of the walk is folded into it.
#pragma once

#include <cmath>

#include "core/macros.h"

namespace art {

// Weighted values are kept beside it, unnormalised: output = accumulator / (sum + sink mass).
struct SoftmaxState {
  float max = -INFINITY;  // largest logit so far
  float sum = 0.0f;       // sum of exp(logit - max)
};

// Factors that bring two partial results to their common maximum.
struct FoldFactors {
  float running;
  float incoming;
};

// How far the smaller maximum lies below the common one; 0 where nothing was read by either.
ART_HD float fold_distance(const SoftmaxState& running, const SoftmaxState& incoming) {
  const bool rises = incoming.max > running.max;
  const float distance = rises ? running.max - incoming.max : incoming.max - running.max;
  // We don't want (-inf) - (-inf), since that would give NaN.
  return rises || running.max > -INFINITY ? distance : 0.0f;
}

// `scale`: exp(fold_distance()).
ART_HD FoldFactors fold(SoftmaxState& running, const SoftmaxState& incoming, float scale) {
  const bool rises = incoming.max > running.max;
  const FoldFactors factors = {rises ? scale : 1.0f, rises ? 1.0f : scale};
  running.sum = running.sum * factors.running + incoming.sum * factors.incoming;
  if (rises) running.max = incoming.max;
  return factors;
}

ART_HD FoldFactors fold(SoftmaxState& running, const SoftmaxState& incoming) {
  return fold(running, incoming, std::exp(fold_distance(running, incoming)));
}

// An attention sink is a logit without a token: it adds to the denominator only. Kept out of the
// state, it costs the log-sum-exp over the tokens no precision.
ART_HD float sink_mass(const SoftmaxState& state, const float* sink_logit) {
  return sink_logit == nullptr ? 0.0f : std::exp(*sink_logit - state.max);
}

// Natural logarithm, over the tokens read.
ART_HD float log_sum_exp(const SoftmaxState& state) {
  return state.sum == 0.0f ? -INFINITY : state.max + std::log(state.sum);
}

// Natural logarithm of the denominator, sink included. Not through sink_mass(), which overflows
// where a sink is far above every logit.
ART_HD float log_denominator(const SoftmaxState& state, const float* sink_logit) {
  const float lse = log_sum_exp(state);
  if (sink_logit == nullptr) return lse;
  const float sink = *sink_logit, max = lse > sink ? lse : sink;
  if (max == -INFINITY) return lse;
  return max + std::log(std::exp(lse - max) + std::exp(sink - max));
}

}  // namespace art
