// Chooses the kernel and lays out the workspace, from sizes alone: nothing is read from the device.
#include "cuda/decode_attention.h"

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "core/schedule.h"
#include "cuda/arena.h"
#include "cuda/device.h"
#include "cuda/portable/launch.h"
#include "cuda/sizes.h"
#include "cuda/sm80/launch.h"
#include "cuda/sm90/plan.h"

namespace art::cuda {
namespace {

// Room for the units that `lists` explicit walks keep.
int32_t* take_units(const DecodeParams& params, size_t lists, Arena& arena) {
  return arena.take<int32_t>(drops_units(params) ? lists * params.max_units : 0);
}

// And for where these were in the walks, which only ResidualMass asks.
int32_t* take_entries(const DecodeParams& params, size_t lists, Arena& arena) {
  return params.use_residual ? take_units(params, lists, arena) : nullptr;
}

bool is_aligned(const PagedCache& cache) {
  constexpr int64_t kElements = 8;  // of two bytes: 16 bytes
  const int64_t strides = cache.page_stride | cache.token_stride | cache.head_stride;
  return reinterpret_cast<uintptr_t>(cache.data) % 16 == 0 && strides % kElements == 0 &&
         cache.dim_stride == 1;
}

sm80::Entry sm80_entry(const DecodeParams& params) {
  const bool is_half = params.dtype == DType::kFloat16;
  switch (params.head_dim) {
    case 64:
      return is_half ? sm80::run_float16_64 : sm80::run_bfloat16_64;
    case 96:
      return is_half ? sm80::run_float16_96 : sm80::run_bfloat16_96;
    case 128:
      return is_half ? sm80::run_float16_128 : sm80::run_bfloat16_128;
    case 192:
      return is_half ? sm80::run_float16_192 : sm80::run_bfloat16_192;
    case 256:
      return is_half ? sm80::run_float16_256 : sm80::run_bfloat16_256;
    default:
      return nullptr;
  }
}

// Thread blocks of a kernel that are resident at once; 0 where it cannot run.
cudaError_t resident_blocks(const DecodeParams& params, sm80::Entry entry, int64_t* blocks) {
  static ResidencyCache<kKernels> cache;
  Residency residency;
  const cudaError_t error = cache.get(
      kernel_number(params),
      [&](int* per_multiprocessor) {
        const cudaError_t failure = entry(params, {}, nullptr, per_multiprocessor);
        if (failure != cudaErrorInvalidValue) return failure;
        // More shared memory than a thread block may have on this
        // GPU.
        cudaGetLastError();
        *per_multiprocessor = 0;
        return cudaSuccess;
      },
      &residency);
  *blocks = error == cudaSuccess ? residency.total() : 0;
  return error;
}

struct Plan {
  sm90::Plan sm90;
  sm80::Entry entry;  // null: the portable kernels
  int32_t crew;
  int32_t wave_steps;
  int32_t max_waves;
};

cudaError_t make_plan(const DecodeParams& params, int64_t num_splits, Plan* plan) {
  *plan = {{}, nullptr, 1, 1, 0};
  cudaError_t error = cudaSuccess;
  if (newest_kernels() >= 90) error = sm90::make_plan(params, num_splits, &plan->sm90);
  if (error != cudaSuccess || plan->sm90.can_run) return error;
  const bool fits = newest_kernels() >= 80 && params.dtype != DType::kFloat32 &&
                    params.head_dim == params.value_dim && params.group_size <= sm80::kMaxGroup &&
                    is_aligned(params.key) && is_aligned(params.value) &&
                    params.query_batch_stride % 2 == 0 && params.query_head_stride % 2 == 0 &&
                    reinterpret_cast<uintptr_t>(params.query) % 4 == 0;
  const sm80::Entry entry = fits ? sm80_entry(params) : nullptr;
  if (entry == nullptr) return cudaSuccess;
  int64_t resident = 0;
  error = resident_blocks(params, entry, &resident);
  if (error != cudaSuccess || resident == 0) return error;
  plan->entry = entry;
  const int64_t items = num_items(params);
  plan->crew = params.batch_invariant
                   ? 1
                   : cuda_crew(items, resident, max_steps(params), sm80::kMaxWaveSteps);
  if (num_splits > 0) {
    const int32_t limit = cuda_crew(items, resident, num_splits, sm80::kMaxWaveSteps);
    plan->crew = limit;
  }
  plan->wave_steps = sm80::kMaxWaveSteps / plan->crew * plan->crew;
  plan->max_waves = static_cast<int32_t>(max_steps(params) / plan->wave_steps + 1);
  return cudaSuccess;
}

sm80::Workspace lay_out(const DecodeParams& params, const Plan& plan, Arena& arena) {
  const size_t items = num_items(params), group = params.group_size, dim = params.head_dim;
  sm80::Workspace space = {};
  space.crew = plan.crew;
  space.wave_steps = plan.wave_steps;
  space.max_waves = plan.max_waves;
  if (plan.crew > 1) {
    const size_t ring = items * sm80::kRingWaves * plan.wave_steps * group;
    space.state = arena.take<sm80::CrewState>(items);
    space.arrivals = arena.take<int32_t>(items * plan.max_waves);
    space.ring_softmax = arena.take<SoftmaxState>(ring);
    space.ring_values = arena.take<float>(ring * dim);
    space.running_softmax = arena.take<SoftmaxState>(2 * items * group);
    space.running_values = arena.take<float>(2 * items * group * dim);
  }
  space.kept_units = take_units(params, items * plan.crew, arena);
  space.kept_entries = take_entries(params, items * plan.crew, arena);
  return space;
}

portable::Workspace lay_out_portable(const DecodeParams& params, Arena& arena) {
  const size_t items = num_items(params), heads = items * params.group_size;
  portable::Workspace space = {};
  space.softmax = arena.take<SoftmaxState>(heads);
  space.values = arena.take<float>(heads * params.value_dim);
  space.kept_units = take_units(params, items, arena);
  space.kept_entries = take_entries(params, items, arena);
  return space;
}

cudaError_t launch_portable(const DecodeParams& params, void* workspace, cudaStream_t stream) {
  Arena arena(workspace);
  const portable::Workspace space = lay_out_portable(params, arena);
  switch (params.dtype) {
    case DType::kFloat32:
      return portable::launch_float32(params, space, stream);
    case DType::kFloat16:
      return portable::launch_float16(params, space, stream);
    default:
      return portable::launch_bfloat16(params, space, stream);
  }
}

}  // namespace

int newest_kernels() {
  static const int newest = [] {
    const char* variable = std::getenv("ART_CUDA");
    const std::string wanted = variable == nullptr ? "" : variable;
    if (wanted.empty() || wanted == "sm90") return 90;
    if (wanted == "sm80") return 80;
    if (wanted == "portable") return 0;
    throw std::runtime_error("ART_CUDA must be sm90, sm80 or portable, got " + wanted);
  }();
  return newest;
}

cudaError_t workspace_bytes(const DecodeParams& params, int64_t num_splits, size_t* bytes) {
  Plan plan;
  const cudaError_t error = make_plan(params, num_splits, &plan);
  if (error != cudaSuccess) return error;
  Arena arena(nullptr);
  if (plan.sm90.can_run) {
    sm90::run(params, plan.sm90, arena, /*measure_only=*/true, nullptr);
  } else if (plan.entry == nullptr) {
    lay_out_portable(params, arena);
  } else {
    lay_out(params, plan, arena);
  }
  *bytes = arena.used();
  return cudaSuccess;
}

cudaError_t launch_decode(const DecodeParams& params, int64_t num_splits, void* workspace,
                          cudaStream_t stream) {
  Plan plan;
  cudaError_t error = make_plan(params, num_splits, &plan);
  if (error != cudaSuccess) return error;
  Arena arena(workspace);
  if (plan.sm90.can_run) return sm90::run(params, plan.sm90, arena, false, stream);
  if (plan.entry == nullptr) return launch_portable(params, workspace, stream);
  const sm80::Workspace space = lay_out(params, plan, arena);
  if (plan.crew > 1) {
    const char* begin = reinterpret_cast<const char*>(space.state);
    const char* end = reinterpret_cast<const char*>(space.ring_softmax);
    error = cudaMemsetAsync(space.state, 0, end - begin, stream);
    if (error != cudaSuccess) return error;
  }
  return plan.entry(params, space, stream, nullptr);
}

}  // namespace art::cuda
