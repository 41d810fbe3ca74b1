// CUDA decode attention, without torch: the caller owns the workspace and the stream.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "core/params.h"

namespace art::cuda {

// The newest kernels that may be used: 90, 80 or 0 for sm90, sm80 or portable in the environment
// variable ART_CUDA, 90 without it. Throws if it is none of them.
int newest_kernels();

// Device memory that a call needs. Known from sizes alone: nothing is read from the device.
// `num_splits` 0 leaves the number of thread blocks per item to the schedule.
cudaError_t workspace_bytes(const DecodeParams& params, int64_t num_splits, size_t* bytes);

// Starts the kernels on `stream`. All pointers are device pointers; the workspace (256-byte
// aligned) needs no initialisation and may be reused as soon as the stream has passed.
cudaError_t launch_decode(const DecodeParams& params, int64_t num_splits, void* workspace,
                          cudaStream_t stream);

}  // namespace art::cuda
