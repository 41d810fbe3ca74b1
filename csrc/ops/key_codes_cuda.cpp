#include "ops/key_codes.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/decode_attention.h"
#include "cuda/encode_keys.h"
#include "cuda/guided_walk.h"
#include "ops/cuda_call.h"

namespace art {
namespace {

// Tables and lengths where the host can read them. Waits for the device.
class HostTables {
 public:
  HostTables(const Tensor& block_table, const Tensor& seq_lens, const Tensor& code_table)
      : block_table_(copy(block_table)), seq_lens_(copy(seq_lens)), code_table_(copy(code_table)) {}

  void set(DecodeParams& cache, CodePool& codes) const {
    cache.block_table = block_table_.const_data_ptr<int32_t>();
    cache.block_table_batch_stride = block_table_.stride(0);
    cache.block_table_head_stride = block_table_.dim() == 3 ? block_table_.stride(1) : 0;
    cache.seq_lens = seq_lens_.const_data_ptr<int32_t>();
    cache.seq_lens_batch_stride = seq_lens_.stride(0);
    cache.seq_lens_head_stride = seq_lens_.dim() == 2 ? seq_lens_.stride(1) : 0;
    codes.table = code_table_.const_data_ptr<int32_t>();
    codes.table_batch_stride = code_table_.stride(0);
    codes.table_head_stride = code_table_.dim() == 3 ? code_table_.stride(1) : 0;
  }

  static Tensor copy(const Tensor& tensor) { return torch::stable::contiguous(on_host(tensor)); }

 private:
  Tensor block_table_;
  Tensor seq_lens_;
  Tensor code_table_;
};

bool is_checked(const std::optional<bool>& checked) {
  return checked ? *checked : checked_by_environment();
}

void check_encode_on_device(const EncodeArguments& args, EncodeParams params) {
  const HostTables tables(args.block_table, args.seq_lens, args.code_table);
  tables.set(params.cache, params.codes);
  std::optional<Tensor> coded;
  if (args.coded_lens) {
    coded = HostTables::copy(*args.coded_lens);
    params.coded_lens = coded->const_data_ptr<int32_t>();
    params.coded_lens_batch_stride = coded->stride(0);
    params.coded_lens_head_stride = coded->dim() == 2 ? coded->stride(1) : 0;
  }
  check_values(params);
}

void check_guided_on_device(const GuidedArguments& args, GuidedParams params) {
  const HostTables tables(args.block_table, args.seq_lens, args.code_table);
  tables.set(params.attention, params.codes);
  std::optional<Tensor> starts;
  if (args.seq_starts) {
    starts = HostTables::copy(*args.seq_starts);
    params.attention.seq_starts = starts->const_data_ptr<int32_t>();
  }
  check_values(params);
}

void encode_keys_cuda(Tensor key_cache, Tensor block_table, Tensor seq_lens, Tensor key_codes,
                      Tensor code_table, std::optional<Tensor> coded_lens,
                      std::optional<bool> checked) {
  const EncodeArguments args = {key_cache,  block_table, seq_lens, key_codes,
                                code_table, coded_lens,  checked};
  const EncodeParams params = check_encode(args);
  const torch::stable::accelerator::DeviceGuard guard(key_cache.get_device_index());
  if (is_checked(checked)) check_encode_on_device(args, params);
  check_launch("encode_keys", cuda::launch_encode(params, current_stream(key_cache)));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> guided_walk_cuda(
    Tensor query, Tensor key_cache, Tensor block_table, Tensor seq_lens, Tensor key_codes,
    Tensor code_table, std::optional<double> scale, double softcap,
    std::optional<Tensor> attn_sinks, int64_t sliding_window, std::optional<Tensor> alibi_slopes,
    std::optional<Tensor> seq_starts, std::optional<bool> checked, bool rest) {
  const GuidedArguments args = {query,        key_cache,  block_table, seq_lens,   key_codes,
                                code_table,   scale,      softcap,     attn_sinks, sliding_window,
                                alibi_slopes, seq_starts, checked,     rest};
  GuidedParams params = check_guided(args);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  if (is_checked(checked)) check_guided_on_device(args, params);
  if (!cuda::environment_is_valid()) {
    fail_check("guided_walk: the environment variable ART_CUDA must be sm90, sm80 or portable");
  }
  const GuidedOutputs outputs = allocate_outputs(args, params);
  const int64_t bytes = static_cast<int64_t>(cuda::guided_workspace_bytes(params));
  const Tensor workspace =
      torch::stable::new_empty(query, {bytes}, torch::headeronly::ScalarType::Byte);
  check_launch("guided_walk",
               cuda::launch_guided(params, workspace.mutable_data_ptr(), current_stream(query)));
  return {outputs.walk, outputs.walk_lens, outputs.num_pinned, outputs.log_mass, outputs.log_rest};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(art, CUDA, m) {
  m.impl("encode_keys", TORCH_BOX(&encode_keys_cuda));
  m.impl("guided_walk", TORCH_BOX(&guided_walk_cuda));
}

}  // namespace art
