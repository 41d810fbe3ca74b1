// Elements of queries and keys as float32, which is exact.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/params.h"

namespace art::cuda {

template <DType kDType>
__device__ float element(const void* data, int64_t at) {
  if constexpr (kDType == DType::kFloat32) return static_cast<const float*>(data)[at];
  if constexpr (kDType == DType::kFloat16) {
    return __half2float(static_cast<const __half*>(data)[at]);
  }
  return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[at]);
}

// For the few elements that are not worth a kernel for each dtype.
__device__ inline float element(const void* data, int64_t at, DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return element<DType::kFloat32>(data, at);
    case DType::kFloat16:
      return element<DType::kFloat16>(data, at);
    default:
      return element<DType::kBFloat16>(data, at);
  }
}

}  // namespace art::cuda
