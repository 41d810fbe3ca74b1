#include <atomic>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/encode_keys.h"
#include "cpu/guided_walk.h"
#include "ops/allocate.h"
#include "ops/key_codes.h"

namespace art {
namespace {

// Calls run(worker, item) for all items from any number of threads: a worker takes the next item
// that is left.
template <class Run>
void share(int64_t num_items, int64_t num_workers, const Run& run) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, num_workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t item; (item = next.fetch_add(1)) < num_items;) run(worker, item);
    }
  });
}

void encode_on_cpu(const EncodeArguments&, const EncodeParams& params) {
  check_values(params);
  const int64_t items = int64_t{params.cache.batch} * params.cache.num_kv_heads;
  const int64_t threads = torch::stable::get_num_threads();
  share(items, items < threads ? items : threads,
        [&](int64_t, int64_t item) { cpu::encode_item(params, item); });
}

void guide_on_cpu(const GuidedArguments& args, const GuidedParams& params, int64_t) {
  check_values(params);
  const int64_t items = int64_t{params.attention.batch} * params.attention.num_kv_heads;
  const int64_t workers = cpu::guided_workers(params, torch::stable::get_num_threads());
  const int64_t bytes = static_cast<int64_t>(cpu::guided_bytes(params));
  const Workspace workspace = aligned_workspace(args.query, bytes * workers);
  share(items, workers, [&](int64_t worker, int64_t item) {
    cpu::guide_item(params, item, workspace.memory + worker * bytes);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(art, CPU, m) {
  m.impl("encode_keys", TORCH_BOX(&encode_keys<encode_on_cpu>));
  m.impl("guided_walk", TORCH_BOX(&guided_walk<guide_on_cpu>));
  m.impl("_guided_walk_split", TORCH_BOX(&guided_walk_split<guide_on_cpu>));
}

}  // namespace art
