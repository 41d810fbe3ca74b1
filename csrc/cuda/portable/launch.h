// Entry points of the portable kernels, one per dtype.
#pragma once

#include <cuda_runtime_api.h>

#include "core/online_softmax.h"
#include "core/params.h"

namespace art::cuda::portable {

struct Workspace {
  SoftmaxState* softmax;  // [items, group_size]
  float* values;          // [items, group_size, value_dim], unnormalised
  int32_t* kept_units;    // [items, max_units], for explicit walks
  int32_t* kept_entries;  // [items, max_units], where they were; null if nobody asks
};

cudaError_t launch_float32(const DecodeParams& params, const Workspace& workspace,
                           cudaStream_t stream);
cudaError_t launch_float16(const DecodeParams& params, const Workspace& workspace,
                           cudaStream_t stream);
cudaError_t launch_bfloat16(const DecodeParams& params, const Workspace& workspace,
                            cudaStream_t stream);

}  // namespace art::cuda::portable
