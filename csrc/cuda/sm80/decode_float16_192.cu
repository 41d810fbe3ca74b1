#include "cuda/sm80/decode_attention.cuh"

namespace art::cuda::sm80 {
cudaError_t run_float16_192(const DecodeParams& params, const Workspace& workspace,
                            cudaStream_t stream, int* blocks) {
  return run<__half, 192>(params, workspace, stream, blocks);
}
}  // namespace art::cuda::sm80
