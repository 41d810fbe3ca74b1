#include "cpu/decode_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "ops/allocate.h"
#include "ops/check.h"
#include "ops/decode_attention.h"

namespace art {
namespace {

void launch_cpu(const DecodeArguments& args, const DecodeParams& params, int64_t num_splits) {
  check_values(params, /*duplicates=*/is_checked(args.checked));
  if (params.batch == 0) return;
  const int64_t threads = torch::stable::get_num_threads();
  const cpu::DecodePlan plan = cpu::plan_decode(params, threads, num_splits);
  const Workspace workspace =
      aligned_workspace(args.query, static_cast<int64_t>(plan.workspace_bytes));
  cpu::begin_decode(params, plan, workspace.memory);
  torch::stable::parallel_for(0, plan.num_workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      cpu::run_decode_worker(params, plan, workspace.memory, worker);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(art, CPU, m) {
  m.impl("decode_attention", TORCH_BOX(&Decode<launch_cpu>::decode_attention));
  m.impl("decode_attention.out", TORCH_BOX(&Decode<launch_cpu>::decode_attention_out));
  m.impl("_decode_attention_split", TORCH_BOX(&Decode<launch_cpu>::decode_attention_split));
}

}  // namespace art
