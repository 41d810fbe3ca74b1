// Comparisons may be evaluated for both outcomes: no value depends on it, and loops become vectors.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math")
#endif

#include "cpu/append_kv.h"

#include <cstring>

#include "core/int8_rows.h"
#include "cpu/elements.h"

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

template <DType dtype>
void quantise_row(const AppendParams& params, const char* from, int8_t* to, float* scale) {
  float row[kMaxInt8Dim];
  const int64_t dim = params.dim, stride = params.source_dim_stride;
  if (stride == 1) {  // apart, so that it becomes vectors
    for (int64_t d = 0; d < dim; ++d) {
      row[d] = value_of(from + d * size_of(dtype), DTypeConstant<dtype>());
    }
  } else {
    for (int64_t d = 0; d < dim; ++d) {
      row[d] = value_of(from + d * stride * size_of(dtype), DTypeConstant<dtype>());
    }
  }
  int32_t largest = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const int32_t magnitude = static_cast<int32_t>(bits_of(row[d])) & kMagnitudeBits;
    largest = magnitude > largest ? magnitude : largest;
  }
  *scale = row_scale(largest);
  int8_t codes[kMaxInt8Dim];
  for (int64_t d = 0; d < dim; ++d) codes[d] = static_cast<int8_t>(row_code(row[d], *scale));
  if (params.dim_stride == 1) {
    std::memcpy(to, codes, dim);
    return;
  }
  for (int64_t d = 0; d < dim; ++d) to[d * params.dim_stride] = codes[d];
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
      const int64_t page = slot / params.page_size, offset = slot % params.page_size;
      const char* from =
          source + (token * params.source_token_stride + head * params.source_head_stride) *
                       params.element_size;
      const int64_t to =
          page * params.page_stride + offset * params.token_stride + head * params.head_stride;
      if (params.scale == nullptr) {
        copy_row(params, from, cache + to * params.element_size);
        continue;
      }
      float* scale = params.scale + page * params.scale_page_stride +
                     offset * params.scale_token_stride + head * params.scale_head_stride;
      with_dtype(params.source_dtype, [&](auto kind) {
        quantise_row<decltype(kind)::value>(params, from, reinterpret_cast<int8_t*>(cache) + to,
                                            scale);
      });
    }
  }
}

}  // namespace art::cpu
