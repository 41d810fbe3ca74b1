// Describes a paged cache to the copy engine of sm_90.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/params.h"

namespace art::cuda::sm90 {

constexpr int kBoxTokens = 16;

// Channels that lie side by side in shared memory; a row is cut into such chunks.
constexpr int chunk_dims(int head_dim) { return head_dim % 64 == 0 ? 64 : 32; }

// Whether the copy engine can read the cache at all.
inline bool is_mappable(const PagedCache& cache, const DecodeParams& params) {
  constexpr int64_t kAlignment = 8;  // elements: 16 bytes
  constexpr int64_t kLimit = int64_t{1} << 38;
  const auto fits = [](int64_t stride, int64_t count) {
    return count == 1 || (stride > 0 && stride % kAlignment == 0 && stride < kLimit);
  };
  return reinterpret_cast<uintptr_t>(cache.data) % 16 == 0 && cache.dim_stride == 1 &&
         params.num_pages < (int64_t{1} << 31) && fits(cache.page_stride, params.num_pages) &&
         fits(cache.token_stride, params.page_size) &&
         (cache.head_stride == 0 || fits(cache.head_stride, params.num_kv_heads));
}

// [pages, heads, chunks, tokens, channels of a chunk], read in boxes of 16 tokens and all chunks.
// Tokens past the end of a page read as zeros.
inline cudaError_t encode_map(const PagedCache& cache, const DecodeParams& params,
                              CUtensorMap* map) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                               12000, cudaEnableDefault, &found);
    return error == cudaSuccess ? reinterpret_cast<Encode>(entry) : nullptr;
  }();
  if (encode == nullptr) return cudaErrorNotSupported;

  const cuuint32_t chunk = chunk_dims(params.head_dim);
  const cuuint32_t chunks = params.head_dim / chunk;
  constexpr cuuint64_t kBytes = 2;
  // A stride nobody steps along only has to be a valid one.
  const auto stride = [](int64_t elements, int64_t count) -> cuuint64_t {
    return count == 1 ? 16 : static_cast<cuuint64_t>(elements) * kBytes;
  };
  // All heads in one place (a pool for each head, with tables of its own) are a single one.
  const int64_t heads = cache.head_stride == 0 ? 1 : params.num_kv_heads;
  const cuuint64_t dims[5] = {chunk, static_cast<cuuint64_t>(params.page_size), chunks,
                              static_cast<cuuint64_t>(heads),
                              static_cast<cuuint64_t>(params.num_pages)};
  const cuuint64_t strides[4] = {stride(cache.token_stride, params.page_size), chunk * kBytes,
                                 stride(cache.head_stride, heads),
                                 stride(cache.page_stride, params.num_pages)};
  const cuuint32_t box[5] = {chunk, kBoxTokens, chunks, 1, 1};
  const cuuint32_t element_strides[5] = {1, 1, 1, 1, 1};
  const CUresult result = encode(
      map,
      params.dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                      : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      5, const_cast<void*>(cache.data), dims, strides, box, element_strides,
      // Fetching 256 bytes ahead costs 7 % on an H200: the copies already ask for whole rows.
      CU_TENSOR_MAP_INTERLEAVE_NONE,
      chunk == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace art::cuda::sm90
