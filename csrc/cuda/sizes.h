// Sizes of a call, known without looking at the device.
#pragma once

#include <cstdint>

#include "core/params.h"

namespace art::cuda {

// Pairs of a sequence and a KV head.
inline int64_t num_items(const DecodeParams& params) {
  return int64_t{params.batch} * params.num_kv_heads;
}

// At most, of a sequence that fills its block table.
inline int64_t max_steps(const DecodeParams& params) {
  const int64_t tokens = int64_t{params.max_pages} * params.page_size;
  const int64_t units = params.walk_order == WalkOrder::kExplicit
                            ? params.max_units
                            : (tokens + params.unit_size - 1) / params.unit_size;
  return units / (params.block_size / params.unit_size) + 2;
}

// Whether units may have to be dropped from an explicit walk.
inline bool drops_units(const DecodeParams& params) {
  return params.walk_order == WalkOrder::kExplicit && !params.walk_is_visible;
}

// A number for the kernel of a 16-bit dtype, head size (a multiple of 32, at most 256) and number
// of head tiles (of 8 query heads: one or two).
inline int kernel_number(const DecodeParams& params) {
  const int dtype = params.dtype == DType::kFloat16, tiles = params.group_size > 8;
  return (dtype * 2 + tiles) * 9 + params.head_dim / 32;
}
constexpr int kKernels = 2 * 2 * 9;

}  // namespace art::cuda
