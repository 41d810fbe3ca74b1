// Host side of the sm_90 kernels: whether they take a call, which schedule, which workspace.
#pragma once

#include <cuda_runtime_api.h>

#include "core/schedule.h"
#include "cuda/arena.h"
#include "cuda/sm90/launch.h"

namespace art::cuda::sm90 {

struct Plan {
  bool can_run;
  bool is_solo;
  Entries entries;
  ClusterPlan cluster;
};

cudaError_t make_plan(const DecodeParams& params, int64_t num_splits, Plan* plan);

// Takes the workspace from the arena and, unless that only measures, starts the kernels.
cudaError_t run(const DecodeParams& params, const Plan& plan, Arena& arena, bool measure_only,
                cudaStream_t stream);

}  // namespace art::cuda::sm90
