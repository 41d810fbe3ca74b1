#include "cuda/sm90/instance.cuh"

namespace art::cuda::sm90 {
template Entries entries<DType::kBFloat16, 96>(int32_t, bool);
}  // namespace art::cuda::sm90
