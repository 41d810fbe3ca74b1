#include <cstring>

#include "checks.h"
#include "cpu/append_kv.h"

namespace checks {
namespace {

// Random slots, some of them to be skipped, and new tokens.
struct Append {
  art::AppendParams params = {};
  std::vector<uint8_t> source;
  std::vector<int64_t> slots;
};

void set_source(const Problem& problem, int32_t num_tokens, Random& random, Append& append) {
  const DecodeParams& cache = problem.params;
  art::AppendParams& params = append.params;
  params.num_tokens = num_tokens;
  params.num_kv_heads = cache.num_kv_heads;
  params.dim = cache.head_dim;
  params.page_size = cache.page_size;
  params.element_size = size_of(cache.dtype);
  params.source_dim_stride = 1;
  params.source_head_stride = params.dim;
  params.source_token_stride = params.dim * params.num_kv_heads;
  append.source.resize(num_tokens * params.source_token_stride * params.element_size);
  for (uint8_t& byte : append.source) byte = static_cast<uint8_t>(random.below(256));
  params.source = append.source.data();
  const int64_t num_slots = cache.num_pages * cache.page_size;
  for (int64_t i = 0; i < num_tokens * params.num_kv_heads; ++i) {
    append.slots.push_back(random.below(static_cast<int32_t>(num_slots) + 4) - 4);
  }
  params.slots = append.slots.data();
  params.slots_token_stride = params.num_kv_heads;
  params.slots_head_stride = 1;
}

}  // namespace

void check_append(const std::string& name, const Case& what, DType dtype, Totals& totals) {
  if (dtype == DType::kInt8) return;  // what is written there depends on what it was: no copy
  Problem problem;
  Append append;
  Random random(7);
  build(what, dtype, 1, problem);
  set_source(problem, 40, random, append);
  std::vector<uint8_t> expected = problem.keys;
  art::AppendParams& params = append.params;
  params.cache = problem.keys.data();
  params.page_stride = problem.params.key.page_stride;
  params.token_stride = problem.params.key.token_stride;
  params.head_stride = problem.params.key.head_stride;
  params.dim_stride = problem.params.key.dim_stride;
  for (int64_t i = 0; i < params.num_tokens * params.num_kv_heads; ++i) {
    const int64_t slot = append.slots[i], head = i % params.num_kv_heads;
    for (int64_t d = 0; slot >= 0 && d < params.dim; ++d) {
      const int64_t to = slot / params.page_size * params.page_stride +
                         slot % params.page_size * params.token_stride + head * params.head_stride +
                         d * params.dim_stride;
      std::memcpy(expected.data() + to * params.element_size,
                  append.source.data() + (i * params.dim + d) * params.element_size,
                  params.element_size);
    }
  }
  art::cpu::append_rows(params, 0, params.num_tokens / 2);
  art::cpu::append_rows(params, params.num_tokens / 2, params.num_tokens);
  if (expected != problem.keys) fail(totals, name, "appended tokens are elsewhere");
}

}  // namespace checks
