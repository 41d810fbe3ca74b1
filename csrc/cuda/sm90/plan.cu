#include "cuda/sm90/plan.h"

#include "core/schedule.h"
#include "cuda/device.h"
#include "cuda/sizes.h"
#include "cuda/sm90/tensor_map.h"

namespace art::cuda::sm90 {
namespace {

template <DType kDType>
bool find_entries(const DecodeParams& params, Entries* found) {
  switch (params.head_dim) {
    case 64:
      *found = entries<kDType, 64>(params.group_size, params.use_residual);
      return true;
    case 96:
      *found = entries<kDType, 96>(params.group_size, params.use_residual);
      return true;
    case 128:
      *found = entries<kDType, 128>(params.group_size, params.use_residual);
      return true;
    case 192:
      *found = entries<kDType, 192>(params.group_size, params.use_residual);
      return true;
    case 256:
      *found = entries<kDType, 256>(params.group_size, params.use_residual);
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

constexpr int kClusterSizes = 3;

cudaError_t solo_residency(const DecodeParams& params, const Entries& entries,
                           Residency* residency) {
  static ResidencyCache<kKernels> cache;
  return cache.get(
      kernel_number(params),
      [&](int* blocks) { return entries.solo(params, {}, {}, nullptr, blocks); }, residency);
}

// Clusters of 2, 4 and 8 thread blocks that the device holds at once.
cudaError_t find_max_clusters(const DecodeParams& params, const Entries& entries,
                              int32_t (&max_clusters)[kClusterSizes]) {
  static ResidencyCache<kKernels * 2 * kClusterSizes> cache;
  const int number = kernel_number(params) * 2 + params.use_residual;
  for (int i = 0; i < kClusterSizes; ++i) {
    ClusterPlan plan = {};
    plan.blocks_log2 = i + 1;
    Residency residency;
    const cudaError_t error = cache.get(
        number * kClusterSizes + i,
        [&](int* blocks) { return entries.cluster(params, {}, {}, plan, nullptr, blocks); },
        &residency);
    if (error != cudaSuccess) return error;
    max_clusters[i] = residency.blocks;
  }
  return cudaSuccess;
}

// num_splits other than 0 sets the thread blocks per item, rounded down to a cluster's size.
int32_t choose_blocks(const DecodeParams& params, int64_t num_splits, bool has_solo,
                      const int32_t (&max_clusters)[kClusterSizes]) {
  int32_t blocks = 1;
  if (num_splits > 0) {
    for (int i = 0; i < kClusterSizes; ++i) {
      if ((2 << i) <= num_splits && max_clusters[i] > 0) blocks = 2 << i;
    }
  } else {
    blocks = cuda_cluster_blocks(num_items(params), max_steps(params), may_stop(params),
                                 params.head_dim, max_clusters);
    // Clusters of any size give the same bits, but not the ones of solo.
    if (blocks == 0) blocks = params.batch_invariant ? 2 : 1;
  }
  return blocks == 1 && !has_solo ? 2 : blocks;
}

ClusterPlan plan_cluster(const DecodeParams& params, const Entries& entries, int32_t blocks) {
  ClusterPlan plan = {};
  const int32_t slices = num_slices(params.head_dim), local = slices_of_block(slices, blocks);
  while (plan.blocks() < blocks) ++plan.blocks_log2;
  plan.producers =
      cuda_cluster_producers(entries.max_producers, max_steps(params) / blocks, params.head_dim);
  // Eight thread blocks deliver faster than their results are folded, and warps that keep asking
  // take turns from those that fold: with pauses, a criterion that never fires costs one sequence
  // of eight KV heads 2 to 6 % less time (H200). In clusters of two the way of a verdict to the
  // other thread block is what takes the time, and pauses cost up to 5 %.
  plan.pause_ns = blocks == kMaxClusterBlocks ? 20 : 0;
  plan.sharers_log2 = local == 1 ? 2 : local == 2 ? 1 : 0;
  plan.layout = {(params.group_size + 1) / 2, local, slices, {}};
  const int64_t slot = plan.layout.value_pieces() + plan.layout.pairs;
  plan.layout.sizes =
      cuda_exchange(plan.blocks_log2, 16 * slot, 16 * plan.layout.inbox_pieces(),
                    entries.exchange_bytes - 16 * plan.layout.pairs, entries.max_pending_log2);
  return plan;
}

}  // namespace

cudaError_t make_plan(const DecodeParams& params, int64_t num_splits, Plan* plan) {
  *plan = {};
  const bool known = params.dtype == DType::kFloat16
                         ? find_entries<DType::kFloat16>(params, &plan->entries)
                         : find_entries<DType::kBFloat16>(params, &plan->entries);
  if (!known || plan->entries.cluster == nullptr || !takes(params)) return cudaSuccess;
  int32_t max_clusters[kClusterSizes];
  Residency solo = {};
  cudaError_t error = find_max_clusters(params, plan->entries, max_clusters);
  if (error == cudaSuccess && plan->entries.solo != nullptr) {
    error = solo_residency(params, plan->entries, &solo);
  }
  // Without clusters of two, the GPU is older or has too little shared memory.
  if (error != cudaSuccess || max_clusters[0] == 0) return error;
  const int32_t blocks = choose_blocks(params, num_splits, solo.blocks > 0, max_clusters);
  plan->is_solo = blocks == 1;
  if (!plan->is_solo) plan->cluster = plan_cluster(params, plan->entries, blocks);
  plan->can_run =
      plan->is_solo || plan->cluster.layout.bytes() <= int64_t{plan->entries.exchange_bytes};
  return cudaSuccess;
}

cudaError_t run(const DecodeParams& params, const Plan& plan, Arena& arena, bool measure_only,
                cudaStream_t stream) {
  const size_t items = num_items(params);
  ListedWalks walks = {};
  const bool is_listed = drops_units(params);
  if (is_listed) {
    walks.walks = arena.take<ListedWalk>(items);
    walks.kept = arena.take<int32_t>(items * params.max_units);
    if (params.use_residual) walks.entries = arena.take<int32_t>(items * params.max_units);
  }
  if (measure_only) return cudaSuccess;

  Maps maps;
  maps.page_size = Divider(params.page_size);
  maps.unit_size = Divider(params.unit_size);
  maps.tiles_per_step = Divider(tiles_per_step(params));
  cudaError_t error = encode_map(params.key, params, &maps.key);
  if (error == cudaSuccess) error = encode_map(params.value, params, &maps.value);
  if (error == cudaSuccess && is_listed) error = list_walks(params, walks, stream);
  if (error != cudaSuccess) return error;
  if (plan.is_solo) return plan.entries.solo(params, walks, maps, stream, nullptr);
  return plan.entries.cluster(params, walks, maps, plan.cluster, stream, nullptr);
}

}  // namespace art::cuda::sm90
