#include "cpu/append_kv.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "ops/append_kv.h"

namespace art {
namespace {

void append_kv_cpu(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache,
                   Tensor slot_mapping, std::optional<Tensor> key_scale,
                   std::optional<Tensor> value_scale) {
  const AppendPair pair =
      check_append(key, value, key_cache, value_cache, slot_mapping, key_scale, value_scale);
  check_slots(pair.key, key_cache.size(0));
  constexpr int64_t kTokensPerThread = 64;
  torch::stable::parallel_for(0, key.size(0), kTokensPerThread, [&](int64_t begin, int64_t end) {
    cpu::append_rows(pair.key, begin, end);
    cpu::append_rows(pair.value, begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(art, CPU, m) { m.impl("append_kv", TORCH_BOX(&append_kv_cpu)); }

}  // namespace art
