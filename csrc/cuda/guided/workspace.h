// The kernels of a guided walk, in the order in which they run, and what they pass on.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/params.h"

namespace art::cuda::guided {

struct Workspace {
  int16_t* unit_lse;    // [batch * num_kv_heads, group_size, unit_stride], by unit, in steps
  int32_t unit_stride;  // max_units, rounded up to whole vectors of 16 bytes
  int32_t* order;       // [batch * num_kv_heads, 2, unit_stride]: scores, then the order; null: in
                        // shared memory
};

constexpr int32_t kUnitsPerVector = 8;
constexpr int32_t kMaxTensorGroup = 16;

// Log-sum-exp of all units with a visible token: in plain arithmetic, for every shape and dtype;
cudaError_t score_plain(const GuidedParams& params, const Workspace& space, cudaStream_t stream);

// or on tensor cores, where can_use_tensors().
bool can_use_tensors(const GuidedParams& params);
cudaError_t score_tensors(const GuidedParams& params, const Workspace& space, cudaStream_t stream);

// Whether the order of a call needs no memory but that of its thread blocks, however many these
// are.
bool orders_in_shared_memory(const GuidedParams& params);
// num_splits: thread blocks per item, as far as the GPU can; 0 leaves it to the schedule.
cudaError_t order_units(const GuidedParams& params, const Workspace& space, int64_t num_splits,
                        cudaStream_t stream);

}  // namespace art::cuda::guided
