#include "cuda/append_kv.h"

#include <algorithm>
#include <cstdint>

namespace art::cuda {
namespace {

constexpr int kThreads = 256;

// The rows of keys or values: a piece is at pointer + sum of index * stride. Strides are in bytes.
struct Rows {
  const char* source;  // [num_tokens, heads, pieces]
  int64_t source_token;
  int64_t source_head;
  int64_t source_piece;
  char* cache;  // [num_pages, page_size, heads, pieces]
  int64_t cache_page;
  int64_t cache_token;
  int64_t cache_head;
  int64_t cache_piece;
  int32_t pieces;
};

// What is copied in pieces of one size. A column is one piece of one head, for all tokens.
struct Copy {
  Rows rows[2];          // no pieces: nothing
  const int64_t* slots;  // [num_tokens, heads]
  int64_t slots_token;
  int64_t slots_head;
  int64_t num_slots;
  int64_t num_tokens;
  int64_t page_size;
  int32_t columns_per_head;
  int32_t num_columns;
};

// A division by what is no constant takes about 20 instructions in 32 bits and 100 in 64.
__device__ int64_t page_of(const Copy& copy, int64_t slot) {
  if (copy.num_slots > UINT32_MAX) return slot / copy.page_size;
  return static_cast<uint32_t>(slot) / static_cast<uint32_t>(copy.page_size);
}

// Each thread copies one column of kTokens tokens. All that it reads is under way before it waits
// for a slot to tell where the first piece goes.
template <class Piece, int kTokens>
__global__ void __launch_bounds__(kThreads) append_kernel(const __grid_constant__ Copy copy) {
  const int32_t column = static_cast<int32_t>(blockIdx.y * blockDim.x + threadIdx.x);
  if (column >= copy.num_columns) return;
  const int32_t head = column / copy.columns_per_head, piece = column % copy.columns_per_head;
  const int64_t first = int64_t{blockIdx.x} * blockDim.y * kTokens + threadIdx.y;
  int64_t slots[kTokens];
  Piece pieces[kTokens][2] = {};
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    const int64_t token = first + i * static_cast<int64_t>(blockDim.y);
    slots[i] = -1;
    if (token >= copy.num_tokens) continue;
    slots[i] = copy.slots[token * copy.slots_token + head * copy.slots_head];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const Rows& rows = copy.rows[n];
      if (piece >= rows.pieces) continue;
      pieces[i][n] =
          *reinterpret_cast<const Piece*>(rows.source + token * rows.source_token +
                                          head * rows.source_head + piece * rows.source_piece);
    }
  }
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    if (slots[i] < 0 || slots[i] >= copy.num_slots) continue;
    const int64_t page = page_of(copy, slots[i]), in_page = slots[i] - page * copy.page_size;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const Rows& rows = copy.rows[n];
      if (piece >= rows.pieces) continue;
      char* row = rows.cache + page * rows.cache_page + in_page * rows.cache_token;
      *reinterpret_cast<Piece*>(row + head * rows.cache_head + piece * rows.cache_piece) =
          pieces[i][n];
    }
  }
}

template <class Piece, int kTokens>
cudaError_t launch(const Copy& copy, cudaStream_t stream) {
  const unsigned width = std::min(copy.num_columns, kThreads);
  const dim3 block(width, kThreads / width);
  const int64_t tokens_per_block = int64_t{block.y} * kTokens;
  const int64_t blocks = (copy.num_tokens + tokens_per_block - 1) / tokens_per_block;
  const dim3 grid(static_cast<unsigned>(blocks), (copy.num_columns + width - 1) / width);
  append_kernel<Piece, kTokens><<<grid, block, 0, stream>>>(copy);
  return cudaGetLastError();
}

cudaError_t launch_pieces(const Copy& copy, int64_t piece_bytes, cudaStream_t stream) {
  // From here on a quarter of the threads still fills every GPU.
  constexpr int64_t kManyPieces = 1 << 20;
  const bool many = copy.num_tokens * copy.num_columns >= kManyPieces;
  switch (piece_bytes) {
    case 1:
      return launch<uint8_t, 1>(copy, stream);
    case 2:
      return launch<uint16_t, 1>(copy, stream);
    case 4:
      return launch<uint32_t, 1>(copy, stream);
    case 8:
      return launch<uint64_t, 1>(copy, stream);
    case 16:
      return many ? launch<uint4, 4>(copy, stream) : launch<uint4, 1>(copy, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

// 16 bytes where rows are contiguous and aligned, else single elements.
int64_t piece_bytes_of(const AppendParams& params) {
  constexpr int64_t kBytes = sizeof(uint4);
  const int64_t addresses =
      reinterpret_cast<intptr_t>(params.source) | reinterpret_cast<intptr_t>(params.cache);
  const int64_t strides = params.source_token_stride | params.source_head_stride |
                          params.page_stride | params.token_stride | params.head_stride |
                          params.dim;
  const bool aligned = params.source_dim_stride == 1 && params.dim_stride == 1 &&
                       addresses % kBytes == 0 && strides * params.element_size % kBytes == 0;
  return aligned ? kBytes : params.element_size;
}

Rows rows_of(const AppendParams& params, int64_t piece_bytes) {
  const int64_t size = params.element_size;
  return {static_cast<const char*>(params.source),
          params.source_token_stride * size,
          params.source_head_stride * size,
          params.source_dim_stride * piece_bytes,
          static_cast<char*>(params.cache),
          params.page_stride * size,
          params.token_stride * size,
          params.head_stride * size,
          params.dim_stride * piece_bytes,
          static_cast<int32_t>(params.dim * size / piece_bytes)};
}

cudaError_t launch_rows(const AppendParams& params, int64_t num_pages, int64_t piece_bytes,
                        const Rows& first, const Rows& second, cudaStream_t stream) {
  const int32_t columns_per_head = std::max(first.pieces, second.pieces);
  const int32_t num_columns = columns_per_head * static_cast<int32_t>(params.num_kv_heads);
  if (num_columns == 0) return cudaSuccess;
  const Copy copy = {{first, second},
                     params.slots,
                     params.slots_token_stride,
                     params.slots_head_stride,
                     num_pages * params.page_size,
                     params.num_tokens,
                     params.page_size,
                     columns_per_head,
                     num_columns};
  return launch_pieces(copy, piece_bytes, stream);
}

}  // namespace

cudaError_t launch_append(const AppendParams& key, const AppendParams& value, int64_t num_pages,
                          cudaStream_t stream) {
  if (key.num_tokens == 0) return cudaSuccess;
  const int64_t key_bytes = piece_bytes_of(key), value_bytes = piece_bytes_of(value);
  const Rows keys = rows_of(key, key_bytes), values = rows_of(value, value_bytes);
  if (key_bytes == value_bytes) {
    return launch_rows(key, num_pages, key_bytes, keys, values, stream);
  }
  const cudaError_t error = launch_rows(key, num_pages, key_bytes, keys, {}, stream);
  if (error != cudaSuccess) return error;
  return launch_rows(value, num_pages, value_bytes, values, {}, stream);
}

}  // namespace art::cuda
