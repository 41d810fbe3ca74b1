#include "ops/key_codes.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/encode_keys.h"
#include "cuda/guided_walk.h"
#include "ops/allocate.h"
#include "ops/check_cache.h"
#include "ops/cuda_call.h"

namespace art {
namespace {

// check_values() on copies of the index tensors: these wait for the device.
void check_values_on_device(const EncodeArguments& args, EncodeParams params) {
  const Tensor table = on_host(args.block_table), lens = on_host(args.seq_lens);
  const Tensor code_table = on_host(args.code_table);
  point_to_tables(params.cache, table, lens);
  point_to_table(params.codes, code_table);
  std::optional<Tensor> coded_lens;
  if (args.coded_lens) {
    coded_lens = on_host(*args.coded_lens);
    point_to_coded_lens(params, *coded_lens);
  }
  check_values(params);
}

void check_values_on_device(const GuidedArguments& args, GuidedParams params) {
  const Tensor table = on_host(args.block_table), lens = on_host(args.seq_lens);
  const Tensor code_table = on_host(args.code_table);
  point_to_tables(params.attention, table, lens);
  point_to_table(params.codes, code_table);
  std::optional<Tensor> starts;
  if (args.seq_starts) {
    starts = on_host(*args.seq_starts);
    params.attention.seq_starts = starts->const_data_ptr<int32_t>();
  }
  check_values(params);
}

void encode_on_gpu(const EncodeArguments& args, const EncodeParams& params) {
  const torch::stable::accelerator::DeviceGuard guard(args.key_cache.get_device_index());
  if (is_checked(args.checked)) check_values_on_device(args, params);
  check_launch("encode_keys", cuda::launch_encode(params, current_stream(args.key_cache)));
}

void guide_on_gpu(const GuidedArguments& args, const GuidedParams& params, int64_t num_splits) {
  const torch::stable::accelerator::DeviceGuard guard(args.query.get_device_index());
  if (is_checked(args.checked)) check_values_on_device(args, params);
  const int64_t bytes = static_cast<int64_t>(cuda::guided_workspace_bytes(params));
  const Tensor workspace = new_empty(args.query, {bytes}, ScalarType::Byte);
  check_launch("guided_walk", cuda::launch_guided(params, num_splits, workspace.mutable_data_ptr(),
                                                  current_stream(args.query)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(art, CUDA, m) {
  m.impl("encode_keys", TORCH_BOX(&encode_keys<encode_on_gpu>));
  m.impl("guided_walk", TORCH_BOX(&guided_walk<guide_on_gpu>));
  m.impl("_guided_walk_split", TORCH_BOX(&guided_walk_split<guide_on_gpu>));
}

}  // namespace art
