#include "cuda/sm80/decode_attention.cuh"

namespace art::cuda::sm80 {
cudaError_t run_bfloat16_192(const DecodeParams& params, const Workspace& workspace,
                             cudaStream_t stream, int* blocks) {
  return run<__nv_bfloat16, 192>(params, workspace, stream, blocks);
}
}  // namespace art::cuda::sm80
