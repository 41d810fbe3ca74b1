#include "cuda/decode_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "ops/allocate.h"
#include "ops/check_cache.h"
#include "ops/cuda_call.h"
#include "ops/decode_attention.h"

namespace art {
namespace {

// check_values() on copies of the index tensors: waits for the device.
void check_values_on_device(const DecodeArguments& args, DecodeParams params) {
  std::vector<Tensor> copies;
  const auto copy = [&](const Tensor& tensor) -> const Tensor& {
    return copies.emplace_back(on_host(tensor));
  };
  const auto data = [&](const std::optional<Tensor>& tensor) {
    return tensor ? copy(*tensor).const_data_ptr<int32_t>() : nullptr;
  };
  const Tensor table = copy(args.block_table), lens = copy(args.seq_lens);
  point_to_tables(params, table, lens);
  params.seq_starts = data(args.seq_starts);
  params.walk = data(args.walk);
  params.walk_lens = data(args.walk_lens);
  params.pinned_units = data(args.num_pinned_per_head);
  params.thresholds = args.thresholds ? copy(*args.thresholds).const_data_ptr<float>() : nullptr;
  check_values(params, /*duplicates=*/true);
}

void launch_cuda(const DecodeArguments& args, const DecodeParams& params, int64_t num_splits) {
  if (params.batch == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(args.query.get_device_index());
  if (is_checked(args.checked)) check_values_on_device(args, params);
  size_t bytes = 0;
  check_launch("decode_attention", cuda::workspace_bytes(params, num_splits, &bytes));
  const Tensor workspace = new_empty(args.query, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  check_launch("decode_attention",
               cuda::launch_decode(params, num_splits, workspace.mutable_data_ptr(),
                                   current_stream(args.query)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(art, CUDA, m) {
  m.impl("decode_attention", TORCH_BOX(&Decode<launch_cuda>::decode_attention));
  m.impl("decode_attention.out", TORCH_BOX(&Decode<launch_cuda>::decode_attention_out));
  m.impl("_decode_attention_split", TORCH_BOX(&Decode<launch_cuda>::decode_attention_split));
}

}  // namespace art
