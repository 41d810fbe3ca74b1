#include "cuda/append_kv.h"

#include <cstdint>

namespace art::cuda {
namespace {

constexpr int kThreads = 256;

// One thread per piece of `Piece` bytes of one (token, head) row.
template <class Piece>
__global__ void __launch_bounds__(kThreads)
    append_kernel(const __grid_constant__ AppendParams params, int64_t num_slots,
                  int64_t pieces_per_row) {
  const int64_t total = params.num_tokens * params.num_kv_heads * pieces_per_row;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  const int64_t elements = sizeof(Piece) / params.element_size;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < total; i += step) {
    const int64_t d = i % pieces_per_row * elements, row = i / pieces_per_row;
    const int64_t head = row % params.num_kv_heads, token = row / params.num_kv_heads;
    const int64_t slot =
        params.slots[token * params.slots_token_stride + head * params.slots_head_stride];
    if (slot < 0 || slot >= num_slots) continue;
    const int64_t from = token * params.source_token_stride + head * params.source_head_stride +
                         d * params.source_dim_stride;
    const int64_t to = slot / params.page_size * params.page_stride +
                       slot % params.page_size * params.token_stride + head * params.head_stride +
                       d * params.dim_stride;
    *reinterpret_cast<Piece*>(static_cast<char*>(params.cache) + to * params.element_size) =
        *reinterpret_cast<const Piece*>(static_cast<const char*>(params.source) +
                                        from * params.element_size);
  }
}

template <class Piece>
cudaError_t launch(const AppendParams& params, int64_t num_slots, cudaStream_t stream) {
  const int64_t pieces = params.dim * params.element_size / static_cast<int64_t>(sizeof(Piece));
  const int64_t total = params.num_tokens * params.num_kv_heads * pieces;
  constexpr int64_t kMaxBlocks = 1 << 16;
  const int64_t wanted = (total + kThreads - 1) / kThreads;
  const int64_t blocks = wanted < kMaxBlocks ? wanted : kMaxBlocks;
  append_kernel<Piece><<<blocks, kThreads, 0, stream>>>(params, num_slots, pieces);
  return cudaGetLastError();
}

bool rows_are_aligned(const AppendParams& params, int64_t bytes) {
  const int64_t elements = bytes / params.element_size;
  const int64_t addresses =
      reinterpret_cast<intptr_t>(params.source) | reinterpret_cast<intptr_t>(params.cache);
  const int64_t strides = params.source_token_stride | params.source_head_stride |
                          params.page_stride | params.token_stride | params.head_stride |
                          params.dim;
  return params.source_dim_stride == 1 && params.dim_stride == 1 && addresses % bytes == 0 &&
         strides % elements == 0;
}

}  // namespace

cudaError_t launch_append(const AppendParams& params, int64_t num_pages, cudaStream_t stream) {
  if (params.num_tokens == 0) return cudaSuccess;
  const int64_t num_slots = num_pages * params.page_size;
  if (rows_are_aligned(params, sizeof(uint4))) return launch<uint4>(params, num_slots, stream);
  if (params.element_size == 2) return launch<uint16_t>(params, num_slots, stream);
  return launch<uint32_t>(params, num_slots, stream);
}

}  // namespace art::cuda
