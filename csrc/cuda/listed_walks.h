// Explicit walks as the kernels want them: only units with a visible token.
#pragma once

#include <cuda_runtime_api.h>

#include "core/params.h"

namespace art::cuda {

struct ListedWalk {
  int32_t num_units;
  int32_t num_pinned;
  bool in_place;  // nothing was dropped: the units are those of params.walk
};

struct ListedWalks {
  ListedWalk* walks;  // [batch * num_kv_heads]; null: built-in walks
  int32_t* kept;      // [batch * num_kv_heads, max_units]
  int32_t* entries;   // [batch * num_kv_heads, max_units], where they were; null if nobody asks
};

// Drops what a head may not see, keeping the order, for params.walk.
cudaError_t list_walks(const DecodeParams& params, const ListedWalks& walks, cudaStream_t stream);

}  // namespace art::cuda
