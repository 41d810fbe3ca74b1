#include "cpu/append_kv.h"

#include <cstring>

namespace art::cpu {
namespace {

void copy_row(const AppendParams& params, const char* from, char* to) {
  const int64_t size = params.element_size;
  if (params.source_dim_stride == 1 && params.dim_stride == 1) {
    std::memcpy(to, from, params.dim * size);
    return;
  }
  for (int64_t d = 0; d < params.dim; ++d) {
    std::memcpy(to + d * params.dim_stride * size, from + d * params.source_dim_stride * size,
                size);
  }
}

}  // namespace

void append_rows(const AppendParams& params, int64_t begin, int64_t end) {
  const char* source = static_cast<const char*>(params.source);
  char* cache = static_cast<char*>(params.cache);
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t head = 0; head < params.num_kv_heads; ++head) {
      const int64_t slot =
          params.slots[token * params.slots_token_stride + head * params.slots_head_stride];
      if (slot < 0) continue;
      const int64_t from = token * params.source_token_stride + head * params.source_head_stride;
      const int64_t to = slot / params.page_size * params.page_stride +
                         slot % params.page_size * params.token_stride + head * params.head_stride;
      copy_row(params, source + from * params.element_size, cache + to * params.element_size);
    }
  }
}

}  // namespace art::cpu
