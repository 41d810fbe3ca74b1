#include <algorithm>
#include <cmath>
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
  params.source_dtype = cache.query_dtype;
  params.element_size = size_of(cache.query_dtype);
  params.source_dim_stride = 1;
  params.source_head_stride = params.dim;
  params.source_token_stride = params.dim * params.num_kv_heads;
  append.source.resize(num_tokens * params.source_token_stride * params.element_size);
  if (cache.dtype == DType::kInt8) {  // numbers, for they are rounded
    for (int64_t i = 0; i < num_tokens * params.source_token_stride; ++i) {
      write(params.source_dtype, append.source.data(), i, random.normal());
    }
  } else {
    for (uint8_t& byte : append.source) byte = static_cast<uint8_t>(random.below(256));
  }
  params.source = append.source.data();
  const int64_t num_slots = cache.num_pages * cache.page_size;
  for (int64_t i = 0; i < num_tokens * params.num_kv_heads; ++i) {
    append.slots.push_back(random.below(static_cast<int32_t>(num_slots) + 4) - 4);
  }
  params.slots = append.slots.data();
  params.slots_token_stride = params.num_kv_heads;
  params.slots_head_stride = 1;
}

// What becomes of one row: itself, or of an int8 cache its codes and its scale.
std::vector<uint8_t> stored_row(const art::AppendParams& params, const uint8_t* row, float* scale) {
  if (scale == nullptr) return {row, row + params.dim * params.element_size};
  double largest = 0.0;
  for (int64_t d = 0; d < params.dim; ++d) {
    largest = std::max(largest, std::abs(read(params.source_dtype, row, d)));
  }
  *scale = static_cast<float>(largest) / 127.0f;
  std::vector<uint8_t> codes;
  for (int64_t d = 0; d < params.dim; ++d) {
    const float steps = static_cast<float>(read(params.source_dtype, row, d)) / *scale;
    codes.push_back(static_cast<uint8_t>(static_cast<int8_t>(std::nearbyint(steps))));
  }
  return codes;
}

}  // namespace

void check_append(const std::string& name, const Case& what, DType dtype, Totals& totals) {
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
  if (dtype == DType::kInt8) {
    params.scale = problem.key_scales.data();
    params.scale_page_stride = problem.params.key_scale.page_stride;
    params.scale_token_stride = problem.params.key_scale.token_stride;
    params.scale_head_stride = problem.params.key_scale.head_stride;
  }
  std::vector<float> scales = problem.key_scales;
  const int64_t size = size_of(dtype);
  for (int64_t i = 0; i < params.num_tokens * params.num_kv_heads; ++i) {
    const int64_t slot = append.slots[i], head = i % params.num_kv_heads;
    if (slot < 0) continue;
    const int64_t page = slot / params.page_size, offset = slot % params.page_size;
    float* scale = scales.empty()
                       ? nullptr
                       : scales.data() + page * params.scale_page_stride +
                             offset * params.scale_token_stride + head * params.scale_head_stride;
    const std::vector<uint8_t> row =
        stored_row(params, append.source.data() + i * params.dim * params.element_size, scale);
    for (int64_t d = 0; d < params.dim; ++d) {
      const int64_t to = page * params.page_stride + offset * params.token_stride +
                         head * params.head_stride + d * params.dim_stride;
      std::memcpy(expected.data() + to * size, row.data() + d * size, size);
    }
  }
  art::cpu::append_rows(params, 0, params.num_tokens / 2);
  art::cpu::append_rows(params, params.num_tokens / 2, params.num_tokens);
  if (expected != problem.keys) fail(totals, name, "appended tokens are elsewhere");
  if (scales.size() > 0 &&
      std::memcmp(scales.data(), problem.key_scales.data(), scales.size() * sizeof(float)) != 0) {
    fail(totals, name, "other scales of appended tokens");
  }
}

}  // namespace checks
