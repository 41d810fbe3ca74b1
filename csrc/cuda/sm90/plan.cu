#include "cuda/sm90/plan.h"

#include "core/schedule.h"
#include "cuda/device.h"
#include "cuda/sm90/tensor_map.h"

namespace art::cuda::sm90 {
namespace {

template <DType kDType>
bool find_entries(const DecodeParams& params, Entries* found) {
  switch (params.head_dim) {
    case 64:
      *found = entries<kDType, 64>(params.group_size);
      return true;
    case 96:
      *found = entries<kDType, 96>(params.group_size);
      return true;
    case 128:
      *found = entries<kDType, 128>(params.group_size);
      return true;
    case 192:
      *found = entries<kDType, 192>(params.group_size);
      return true;
    case 256:
      *found = entries<kDType, 256>(params.group_size);
      return true;
    default:
      return false;
  }
}

bool takes(const DecodeParams& params) {
  const bool boxes_fit_pages = params.page_size % kBoxTokens == 0 || params.max_pages == 1;
  return params.dtype != DType::kFloat32 && params.head_dim == params.value_dim &&
         params.group_size <= kMaxGroup && params.unit_size % kBoxTokens == 0 && boxes_fit_pages &&
         is_mappable(params.key, params) && is_mappable(params.value, params) &&
         params.query_batch_stride % 2 == 0 && params.query_head_stride % 2 == 0 &&
         reinterpret_cast<uintptr_t>(params.query) % 4 == 0;
}

int64_t num_items(const DecodeParams& params) {
  return int64_t{params.batch} * params.num_kv_heads;
}

// Of a sequence that fills its block table.
int64_t max_steps(const DecodeParams& params) {
  const int64_t tokens = int64_t{params.max_pages} * params.page_size;
  const int64_t units = params.walk_order == WalkOrder::kExplicit
                            ? params.max_units
                            : (tokens + params.unit_size - 1) / params.unit_size;
  return units / (params.block_size / params.unit_size) + 2;
}

cudaError_t residency_of(const DecodeParams& params, const Entries& entries, bool is_solo,
                         Residency* residency) {
  static ResidencyCache<2 * 2 * 9 * 2> cache;
  const int dtype = params.dtype == DType::kFloat16, tiles = params.group_size > 8;
  const int kernel = ((dtype * 2 + tiles) * 9 + params.head_dim / 32) * 2 + is_solo;
  return cache.get(
      kernel,
      [&](int* blocks) {
        return is_solo ? entries.solo(params, {}, {}, nullptr, blocks)
                       : entries.team(params, {}, {}, {}, nullptr, blocks);
      },
      residency);
}

}  // namespace

cudaError_t make_plan(const DecodeParams& params, int64_t num_splits, Plan* plan) {
  *plan = {};
  const bool known = params.dtype == DType::kFloat16
                         ? find_entries<DType::kFloat16>(params, &plan->entries)
                         : find_entries<DType::kBFloat16>(params, &plan->entries);
  if (!known || !takes(params)) return cudaSuccess;
  const int64_t items = num_items(params);
  Residency residency;
  cudaError_t error = residency_of(params, plan->entries, false, &residency);
  if (error != cudaSuccess || residency.total() < 2) return error;
  plan->can_run = true;
  plan->is_solo = num_splits > 0
                      ? num_splits == 1
                      : !params.batch_invariant && cuda_runs_solo(items, residency.multiprocessors);
  plan->is_solo = plan->is_solo && plan->entries.solo != nullptr;
  if (plan->is_solo) return residency_of(params, plan->entries, true, &residency);
  plan->teams = cuda_teams(items, residency.multiprocessors, residency.total(), max_steps(params),
                           plan->entries.stages, num_splits);
  return cudaSuccess;
}

cudaError_t run(const DecodeParams& params, const Plan& plan, Arena& arena, bool measure_only,
                cudaStream_t stream) {
  const size_t items = num_items(params);
  const CudaTeams& teams = plan.teams;
  TeamSpace space = {teams.teams, teams.workers, teams.claim_steps, teams.ring_steps};
  const size_t zeroed_from = arena.used();
  if (!plan.is_solo) {
    space.state = arena.take<TeamState>(items);
    space.written = arena.take<int32_t>(items * teams.ring_steps);
  }
  const size_t zeroed = arena.used() - zeroed_from;
  if (!plan.is_solo) {
    const int pieces = slot_pieces(params.head_dim, head_pairs(params.group_size));
    space.slots = arena.take<float4>(items * teams.ring_steps * pieces);
  }
  ListedWalks walks = {};
  const bool is_listed = params.walk_order == WalkOrder::kExplicit;
  if (is_listed) {
    walks.walks = arena.take<ListedWalk>(items);
    walks.kept = arena.take<int32_t>(items * params.max_units);
  }
  if (measure_only) return cudaSuccess;

  Maps maps;
  cudaError_t error = encode_map(params.key, params, &maps.key);
  if (error == cudaSuccess) error = encode_map(params.value, params, &maps.value);
  if (error == cudaSuccess && is_listed) error = list_walks(params, walks, stream);
  if (error == cudaSuccess && zeroed > 0) error = cudaMemsetAsync(space.state, 0, zeroed, stream);
  if (error != cudaSuccess) return error;
  if (plan.is_solo) return plan.entries.solo(params, walks, maps, stream, nullptr);
  return plan.entries.team(params, walks, maps, space, stream, nullptr);
}

}  // namespace art::cuda::sm90
