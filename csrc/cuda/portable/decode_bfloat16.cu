#include "cuda/portable/decode_attention.cuh"

namespace art::cuda::portable {
cudaError_t launch_bfloat16(const DecodeParams& params, const Workspace& workspace,
                            cudaStream_t stream) {
  return launch<__nv_bfloat16>(params, workspace, stream);
}
}  // namespace art::cuda::portable
