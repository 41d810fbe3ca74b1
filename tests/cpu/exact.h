// What the kernels of csrc/cpu must compute, in float64 and one token after the other.
#pragma once

#include <cstdint>
#include <vector>

#include "core/params.h"

namespace checks {

using art::DecodeParams;

struct Visible {
  int32_t begin;
  int32_t end;
};

struct Exact {
  std::vector<double> out;            // [batch, num_q_heads, value_dim]
  std::vector<double> lse;            // [batch, num_q_heads]
  std::vector<double> magnitude;      // [batch, num_q_heads]: largest of the logits that were read
  std::vector<double> largest_value;  // [batch, num_q_heads]: of the values that were read
  std::vector<int32_t> tokens_read;   // [batch, num_kv_heads]
  std::vector<int32_t> stop_block;    // [batch, num_kv_heads]
  // How near a decision came to its threshold, relative to it: there float32 may decide otherwise.
  double nearest = 1e30;
};

Exact exact_attention(const DecodeParams& params);

Visible visible_of(const DecodeParams& params, int32_t batch);

struct Logit {
  double value;
  double magnitude;  // sum of the absolute terms
};

// Of one query head and one key, scaled.
Logit plain_logit(const DecodeParams& params, int32_t batch, int32_t head, int32_t token);

// The same after soft cap and ALiBi.
double adjusted(const DecodeParams& params, int32_t batch, int32_t head, int32_t token,
                double logit);

double log_add(double a, double b);

}  // namespace checks
