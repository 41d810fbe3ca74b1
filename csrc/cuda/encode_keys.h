// Key codes of complete groups on a GPU, without torch.
#pragma once

#include <cuda_runtime_api.h>

#include "core/params.h"

namespace art::cuda {

// Encodes the groups that became complete. All pointers are device pointers. A group with a page
// id, or with an id in the code table, that is out of range is skipped.
cudaError_t launch_encode(const EncodeParams& params, cudaStream_t stream);

}  // namespace art::cuda
