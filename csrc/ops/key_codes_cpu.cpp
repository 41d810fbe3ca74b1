#include <atomic>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/arena.h"
#include "cpu/encode_keys.h"
#include "cpu/guided_walk.h"
#include "ops/key_codes.h"

namespace art {
namespace {

// Calls run(index) for all indices from any number of threads, each taking the next that is left.
template <class Run>
void share(int64_t num_items, int64_t num_workers, const Run& run) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, num_workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t item; (item = next.fetch_add(1)) < num_items;) run(worker, item);
    }
  });
}

void encode_keys_cpu(Tensor key_cache, Tensor block_table, Tensor seq_lens, Tensor key_codes,
                     Tensor code_table, std::optional<Tensor> coded_lens,
                     std::optional<bool> checked) {
  const EncodeParams params =
      check_encode({key_cache, block_table, seq_lens, key_codes, code_table, coded_lens, checked});
  check_values(params);
  const int64_t items = int64_t{params.cache.batch} * params.cache.num_kv_heads;
  const int64_t threads = torch::stable::get_num_threads();
  share(items, items < threads ? items : threads,
        [&](int64_t, int64_t item) { cpu::encode_item(params, item); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> guided_walk_cpu(
    Tensor query, Tensor key_cache, Tensor block_table, Tensor seq_lens, Tensor key_codes,
    Tensor code_table, std::optional<double> scale, double softcap,
    std::optional<Tensor> attn_sinks, int64_t sliding_window, std::optional<Tensor> alibi_slopes,
    std::optional<Tensor> seq_starts, std::optional<bool> checked, bool rest) {
  const GuidedArguments args = {query,        key_cache,  block_table, seq_lens,   key_codes,
                                code_table,   scale,      softcap,     attn_sinks, sliding_window,
                                alibi_slopes, seq_starts, checked,     rest};
  GuidedParams params = check_guided(args);
  check_values(params);
  const GuidedOutputs outputs = allocate_outputs(args, params);
  const int64_t items = int64_t{params.attention.batch} * params.attention.num_kv_heads;
  const int64_t workers = cpu::guided_workers(params, torch::stable::get_num_threads());
  constexpr int64_t kAlignment = cpu::Arena::kAlignment;
  const int64_t bytes = static_cast<int64_t>(cpu::guided_bytes(params));
  const Tensor workspace = torch::stable::new_empty(query, {bytes * workers + kAlignment},
                                                    torch::headeronly::ScalarType::Byte);
  const auto address = reinterpret_cast<uintptr_t>(workspace.mutable_data_ptr());
  char* const memory =
      reinterpret_cast<char*>((address + kAlignment - 1) / kAlignment * kAlignment);
  share(items, workers, [&](int64_t worker, int64_t item) {
    cpu::guide_item(params, item, memory + worker * bytes);
  });
  return {outputs.walk, outputs.walk_lens, outputs.num_pinned, outputs.log_mass, outputs.log_rest};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(art, CPU, m) {
  m.impl("encode_keys", TORCH_BOX(&encode_keys_cpu));
  m.impl("guided_walk", TORCH_BOX(&guided_walk_cpu));
}

}  // namespace art
