#include "cuda/sm90/instance.cuh"

namespace art::cuda::sm90 {
template Entries entries<DType::kFloat16, 64>(int32_t, bool);
}  // namespace art::cuda::sm90
