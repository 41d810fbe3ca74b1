#include "cuda/guided_walk.h"

#include <cstdint>

#include "cuda/arena.h"
#include "cuda/decode_attention.h"
#include "cuda/guided/workspace.h"
#include "cuda/sizes.h"

namespace art::cuda {
namespace {

guided::Workspace lay_out(const GuidedParams& params, Arena& arena) {
  const size_t items = num_items(params.attention);
  constexpr int32_t kVector = guided::kUnitsPerVector;
  guided::Workspace space = {};
  space.unit_stride = (params.max_units + kVector - 1) / kVector * kVector;
  space.unit_lse = arena.take<int16_t>(items * params.attention.group_size * space.unit_stride);
  if (!guided::orders_in_shared_memory(params)) {
    space.order = arena.take<int32_t>(items * 2 * space.unit_stride);
  }
  return space;
}

}  // namespace

size_t guided_workspace_bytes(const GuidedParams& params) {
  Arena arena(nullptr);
  lay_out(params, arena);
  return arena.used();
}

cudaError_t launch_guided(const GuidedParams& params, int64_t num_splits, void* workspace,
                          cudaStream_t stream) {
  if (params.attention.batch == 0) return cudaSuccess;
  Arena arena(workspace);
  const guided::Workspace space = lay_out(params, arena);
  const bool on_tensors = newest_kernels() >= 80 && guided::can_use_tensors(params);
  const cudaError_t error = on_tensors ? guided::score_tensors(params, space, stream)
                                       : guided::score_plain(params, space, stream);
  return error == cudaSuccess ? guided::order_units(params, space, num_splits, stream) : error;
}

}  // namespace art::cuda
