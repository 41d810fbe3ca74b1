#include "cuda/sm80/decode_attention.cuh"

namespace art::cuda::sm80 {
cudaError_t run_float16_64(const DecodeParams& params, const Workspace& workspace,
                           cudaStream_t stream, int* blocks) {
  return run<__half, 64>(params, workspace, stream, blocks);
}
}  // namespace art::cuda::sm80
