// Guided walks on a GPU, without torch: the caller owns the workspace and the stream.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "core/params.h"

namespace art::cuda {

// Device memory that a call needs beside its results. Known from sizes alone.
size_t guided_workspace_bytes(const GuidedParams& params);

// Orders the units of all sequences, in two kernels. All pointers are device pointers; the
// workspace (256-byte aligned) needs no initialisation and may be reused as soon as the stream has
// passed. Pages and records whose ids are out of range are not read. num_splits: thread blocks that
// order the units of one (sequence, KV head); 0 leaves it to the schedule. It changes no bit.
cudaError_t launch_guided(const GuidedParams& params, int64_t num_splits, void* workspace,
                          cudaStream_t stream);

}  // namespace art::cuda
