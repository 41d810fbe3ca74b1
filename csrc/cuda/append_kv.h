// Writing new tokens into a paged cache on a GPU, without torch.
#pragma once

#include <cuda_runtime_api.h>

#include "core/params.h"

namespace art::cuda {

// Writes the keys and values of the same tokens to the same slots, in one launch where both are
// copied in pieces of one size. Slots that are negative or beyond `num_pages` are skipped.
cudaError_t launch_append(const AppendParams& key, const AppendParams& value, int64_t num_pages,
                          cudaStream_t stream);

}  // namespace art::cuda
