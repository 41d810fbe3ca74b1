#include "cuda/append_kv.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "ops/append_kv.h"
#include "ops/cuda_call.h"

namespace art {
namespace {

void append_kv_cuda(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache,
                    Tensor slot_mapping, std::optional<Tensor> key_scale,
                    std::optional<Tensor> value_scale) {
  const AppendPair pair =
      check_append(key, value, key_cache, value_cache, slot_mapping, key_scale, value_scale);
  const torch::stable::accelerator::DeviceGuard guard(key.get_device_index());
  if (checked_by_environment()) {
    const Tensor slots = on_host(slot_mapping);
    AppendParams host = pair.key;
    host.slots = slots.const_data_ptr<int64_t>();
    host.slots_token_stride = slots.stride(0);
    host.slots_head_stride = slots.dim() == 2 ? slots.stride(1) : 0;
    check_slots(host, key_cache.size(0));
  }
  check_launch("append_kv",
               cuda::launch_append(pair.key, pair.value, key_cache.size(0), current_stream(key)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(art, CUDA, m) { m.impl("append_kv", TORCH_BOX(&append_kv_cuda)); }

}  // namespace art
