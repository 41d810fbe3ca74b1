#include "cuda/portable/decode_attention.cuh"

namespace art::cuda::portable {
cudaError_t launch_float32(const DecodeParams& params, const Workspace& workspace,
                           cudaStream_t stream) {
  return launch<float>(params, workspace, stream);
}
}  // namespace art::cuda::portable
