// The interface between the CPU scheduler and the SIMD targets: every target implements one table.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "core/coded_groups.h"
#include "core/item.h"
#include "core/key_codes.h"
#include "core/online_softmax.h"
#include "core/params.h"
#include "core/termination.h"
#include "core/unit_order.h"
#include "cpu/arena.h"

namespace art::cpu {

constexpr int32_t kTileTokens = 64;    // tokens whose logits are computed together
constexpr int32_t kTilePadding = 16;   // a tile is rounded up to whole vectors
constexpr int32_t kRowAlignment = 16;  // floats; rows of scratch arrays start on cache lines
constexpr int32_t kHeadsPerPass = 4;   // query heads that share one load of a key
constexpr int32_t kScoreStride = kTileTokens + kTilePadding;
constexpr int32_t kMaxHeadDim = 256;

constexpr int32_t round_up(int32_t n, int32_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Softmax states and weighted value sums of one step, or of all steps folded so far.
struct Accumulator {
  SoftmaxState* softmax;  // [group_size]
  float* values;          // [group_size, padded value_dim]
  int32_t* num_tokens;    // [1]
};

// Buffers of one worker.
struct Scratch {
  float* query;       // [group_size rounded up to kHeadsPerPass, padded head_dim], scaled
  void* plain_query;  // the same as it came, for targets that multiply it so
  float* scores;      // [group_size rounded up to kHeadsPerPass, kScoreStride]
  void* keys;         // [head_dim, kTileTokens]: ends of pages of a token-contiguous cache
  Accumulator step;   // result of a step that is folded at once
  Accumulator tile;   // second and later tiles of a step
};

// All but the accumulators.
inline Scratch take_scratch(const DecodeParams& params, Arena& arena) {
  const size_t heads = round_up(params.group_size, kHeadsPerPass);
  const size_t row = round_up(params.head_dim, kRowAlignment);
  const bool copies_keys = params.key.dim_stride != 1;
  Scratch scratch = {};
  scratch.query = arena.take<float>(heads * row);
  scratch.plain_query = arena.take<float>(heads * row);
  scratch.scores = arena.take<float>(heads * kScoreStride);
  scratch.keys = arena.take<float>(copies_keys ? size_t{kTileTokens} * params.head_dim : 0);
  return scratch;
}

// Buffers of one worker of a guided walk. Rows of code queries are in the order of
// CodeLayout::position(), each of the four places in a field padded to whole vectors.
struct GuidedScratch {
  Scratch tile;       // without accumulators
  float* code_query;  // [group_size rounded up to kHeadsPerPass, 4, padded fields]
  float* scaled;      // the same, times the scales of a group
  // Units by groups, from that of the first visible token on.
  float* unit_max;    // [group_size, padded max_units]: largest logit
  float* unit_sum;    // [group_size, padded max_units]: sum of exp(logit - max)
  int16_t* unit_lse;  // [group_size, padded max_units]: in steps, see core/unit_order.h
};

struct Kernels {
  const char* target;
  void (*load_query)(const DecodeParams& params, const Item& item, Scratch& scratch);
  void (*compute_step)(const DecodeParams& params, const Item& item, int32_t step, Scratch& scratch,
                       Accumulator result);
  // Folds a step into the running output. With `compare`, returns whether the block is stable.
  bool (*fold_step)(const DecodeParams& params, const Item& item, Accumulator step, bool compare,
                    Accumulator running);
  void (*write_output)(const DecodeParams& params, const Item& item, Accumulator running);
  // Estimates the log-sum-exp of all units of an item, for each query head.
  void (*score_units)(const GuidedParams& params, const Item& item, GuidedScratch& scratch);
};

namespace baseline {
const Kernels& kernels(DType dtype);
}
#if defined(__x86_64__)
namespace avx2 {
const Kernels& kernels(DType dtype);
}
namespace avx512 {
const Kernels& kernels(DType dtype);
}
namespace avx512bf16 {
const Kernels& kernels(DType dtype);
}
namespace amx {
const Kernels& kernels(DType dtype);
}
#elif defined(__aarch64__)
namespace neon {
const Kernels& kernels(DType dtype);
}
#endif

// Name of the SIMD target in use: the best one the machine runs, or the one that the environment
// variable ART_CPU names.
const char* target_name();

// Names of all targets, and whether this machine runs them.
std::vector<std::pair<const char*, bool>> target_support();

// Of the target in use, for keys and values of a dtype.
const Kernels& kernels(DType dtype);

}  // namespace art::cpu
