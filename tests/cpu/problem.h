// Inputs of the checks of csrc/cpu: what a case is, and the buffers that it becomes.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "core/params.h"

namespace checks {

using art::DecodeParams;
using art::DType;
using art::WalkOrder;

enum class Layout {
  kTokensFirst,  // [pages, tokens, heads, dim]
  kHeadsFirst,   // [pages, heads, tokens, dim]
  kPaddedRows,   // rows apart from each other
  kTokensLast,   // keys [pages, heads, dim, tokens]
  kPageTables,   // one head's rows in a page, page ids per head
};

struct Case {
  std::string name;
  std::vector<int32_t> lens;  // of the sequences
  int32_t num_kv_heads = 2;
  int32_t group_size = 2;
  int32_t head_dim = 64;
  int32_t value_dim = 64;
  int32_t page_size = 16;
  Layout layout = Layout::kTokensFirst;
  WalkOrder order = WalkOrder::kSinkRecent;  // kExplicit: random units, some left out
  int32_t num_pinned = 8;
  int32_t unit_size = 16;
  int32_t block_size = 64;
  bool stability = true;
  float d_scale = 0.06f;
  float d_direction = 1.8e-3f;
  int32_t patience = 2;
  bool thresholds = false;  // of their own for each KV head
  float residual = 0.0f;    // for guided cases: stop when no more than this share is left; 0: never
  bool all_agree = false;
  float softcap = 0.0f;
  int32_t window = 0;
  bool sinks = false;
  bool alibi = false;
  bool starts = false;  // of the sequences, behind token 0
  bool guided = false;  // encodes the keys and walks by the codes
};

// Owns all that params point to. What must not be read is NaN, or a page that does not exist.
struct Problem {
  DecodeParams params = {};
  int32_t capacity = 0;  // tokens that a block table holds
  std::vector<uint8_t> query, keys, values;
  std::vector<int32_t> block_table, lens, starts, walk, walk_lens;
  std::vector<float> sinks, slopes, thresholds;
  std::vector<float> key_scales, value_scales;  // of int8 caches

  Problem() = default;
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;
};

// The same numbers on every machine.
class Random {
 public:
  explicit Random(uint32_t seed) : bits_(seed) {}
  int32_t below(int32_t end) { return static_cast<int32_t>(bits_() % static_cast<uint32_t>(end)); }
  double normal();  // nearly: of mean 0 and variance 1

 private:
  std::mt19937 bits_;
};

int64_t size_of(DType dtype);
double read(DType dtype, const void* elements, int64_t index);
void write(DType dtype, void* elements, int64_t index, double x);

// One element of a cache: of an int8 cache its code times the scale of its row.
double read(const DecodeParams& params, const art::PagedCache& cache,
            const art::PagedScales& scales, int64_t batch, int64_t head, int64_t token,
            int64_t dim);

// Of int8 keys and values, with queries in float32; of any other type, all in this one.
void build(const Case& what, DType dtype, uint32_t seed, Problem& problem);

// Position of one element of a cache.
int64_t element(const DecodeParams& params, const art::PagedCache& cache, int64_t batch,
                int64_t head, int64_t token, int64_t dim);

}  // namespace checks
