// Attention of one warp over one tile of 64 tokens: the part that every schedule shares. A warp
// computes a whole step by itself, so steps run side by side without a barrier between warps. Keys
// are the rows of the first product and query heads the columns; the values' channels are the rows
// of the second. So any GQA ratio runs the same code.
#pragma once

#include <math_constants.h>

#include "core/online_softmax.h"
#include "core/params.h"
#include "core/walk.h"
#include "cuda/exponential.cuh"
#include "cuda/sm90/async.cuh"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/tensor_map.h"

namespace art::cuda::sm90 {

using sm80::Mma;

constexpr int kBoxes = kTileTokens / kBoxTokens;

template <int kDim>
struct TileShape {
  static constexpr int kChunkDims = chunk_dims(kDim);
  static constexpr int kChunkPieces = kChunkDims / 8;  // pieces of 16 bytes in a row of a chunk
  static constexpr int kChunkBytes = kBoxTokens * kChunkDims * 2;
  static constexpr int kBoxBytes = kBoxTokens * kDim * 2;
  static constexpr int kTileBytes = kBoxes * kBoxBytes;  // of keys, and again of values
  static constexpr int kRowTiles = kDim / 16;            // of the second product

  // Where a 16-byte piece of a token lies in its box: [chunk][token][piece], the pieces exchanged
  // as the copy engine does it.
  __device__ static uint32_t offset(int token, int piece) {
    const int chunk = piece / kChunkPieces, in_chunk = piece % kChunkPieces;
    const int swizzle = kChunkPieces == 8 ? token % 8 : token / 2 % 4;
    return chunk * kChunkBytes + token * (kChunkDims * 2) + 16 * (in_chunk ^ swizzle);
  }
};

// What lies in a stage, written by the producer.
struct TileInfo {
  int32_t step;               // -1: nothing lies there, and nothing will follow
  int32_t box_token[kBoxes];  // first token of each box; negative: no box
  TokenRange visible;
  int32_t tokens;  // visible ones

  __device__ bool is_full() const { return tokens == kTileTokens; }
  // The token at a row, or -1 where none is visible.
  __device__ int32_t token_at(int row) const {
    const int32_t first = box_token[row / kBoxTokens], token = first + row % kBoxTokens;
    return first >= 0 && token >= visible.begin && token < visible.end ? token : -1;
  }
};

// Query rows in shared memory, padded so that eight of them lie in different banks.
template <class T, int kDim, int kHeadTiles>
struct QueryTile {
  static constexpr int kStride = kDim + 8;
  alignas(16) T rows[8 * kHeadTiles][kStride];

  // Called by `num_threads` threads; heads that do not exist become zeros.
  __device__ void load(const DecodeParams& params, int32_t batch, int32_t first_head,
                       int32_t num_heads, int thread, int num_threads) {
    const T* query = static_cast<const T*>(params.query) + batch * params.query_batch_stride +
                     first_head * params.query_head_stride;
#pragma unroll  // all loads are on their way before the first has arrived
    for (int i = thread; i < 8 * kHeadTiles * kDim / 2; i += num_threads) {
      const int g = i / (kDim / 2), d = 2 * (i % (kDim / 2));
      const auto* pair =
          reinterpret_cast<const uint32_t*>(query + g * params.query_head_stride + d);
      *reinterpret_cast<uint32_t*>(&rows[g][d]) = g < num_heads ? *pair : 0;
    }
  }

  // Columns of the products for channels [32 pair, 32 pair + 32).
  __device__ void columns(int head_tile, int pair, uint32_t (&to)[4]) const {
    const int lane = threadIdx.x % 32;
    sm80::load_matrix(to,
                      shared_address(&rows[8 * head_tile + lane % 8][32 * pair + lane / 8 * 8]));
  }
};

// The result of a step for the two heads 8 * tile + 2 * (lane % 4) + {0, 1} of each head tile:
// softmax state, and the rows 16 * i + lane / 4 + {0, 8} of the weighted values, as
// values[tile][i][2 * (row is the second) + head].
template <int kDim, int kHeadTiles>
struct Partial {
  SoftmaxState softmax[kHeadTiles][2];
  float values[kHeadTiles][kDim / 16][4];
};

// Over the lanes that hold the same heads.
__device__ inline float head_sum(float x) {
#pragma unroll
  for (int other = 4; other <= 16; other *= 2) x += __shfl_xor_sync(~0u, x, other);
  return x;
}
__device__ inline float head_max(float x) {
#pragma unroll
  for (int other = 4; other <= 16; other *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, other));
  return x;
}

template <class T, int kDim, int kHeadTiles>
class TileAttention {
  using S = TileShape<kDim>;
  using Scores = float[kBoxes][4];  // of one head tile

 public:
  __device__ explicit TileAttention(const DecodeParams& params)
      : params_(params), lane_(threadIdx.x % 32) {}

  // Adds a tile to the partial result; `is_first`: of the step.
  __device__ void run(int32_t kv_head, const QueryTile<T, kDim, kHeadTiles>& query,
                      const unsigned char* keys, unsigned char* values, const TileInfo& info,
                      bool is_first, Partial<kDim, kHeadTiles>& partial) const {
    uint32_t p[kBoxes][kHeadTiles][2];
    // One head tile after the other: reading the keys again is cheaper than running out of
    // registers.
#pragma unroll
    for (int ht = 0; ht < kHeadTiles; ++ht) {
      Scores scores = {};
      score(query, ht, shared_address(keys), scores);
      adjust(info, kv_head, ht, scores);
      exponentiate(ht, is_first, scores, p, partial);
    }
    if (!info.is_full()) clear_invisible(info, values);
    weigh(shared_address(values), p, partial);
  }

 private:
  __device__ void score(const QueryTile<T, kDim, kHeadTiles>& query, int ht, uint32_t keys,
                        Scores& scores) const {
    const int row = lane_ % 16;
#pragma unroll
    for (int pair = 0; pair < kDim / 32; ++pair) {
      uint32_t q[4];
      query.columns(ht, pair, q);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int box = 0; box < kBoxes; ++box) {
          uint32_t k[4];
          sm80::load_matrix(
              k, keys + box * S::kBoxBytes + S::offset(row, 4 * pair + 2 * half + lane_ / 16));
          Mma<T>::run(scores[box], k, q[2 * half], q[2 * half + 1]);
        }
      }
    }
  }

  // From dot products to logits; -inf where no token is visible.
  __device__ void adjust(const TileInfo& info, int32_t kv_head, int ht, Scores& scores) const {
#pragma unroll
    for (int i = 0; i < 4 * kBoxes; ++i) scores[i / 4][i % 4] *= params_.scale;
    if (info.is_full() && params_.softcap <= 0.0f && params_.alibi_slopes == nullptr) return;
#pragma unroll
    for (int i = 0; i < 4 * kBoxes; ++i) {
      float& x = scores[i / 4][i % 4];
      const int32_t token = info.token_at(i / 4 * kBoxTokens + lane_ / 4 + 8 * (i % 4 / 2));
      const int32_t g = 8 * ht + 2 * (lane_ % 4) + i % 2;
      if (params_.softcap > 0.0f) x = params_.softcap * tanhf(x / params_.softcap);
      if (params_.alibi_slopes != nullptr && g < params_.group_size) {
        const float distance = static_cast<float>(token - (info.visible.end - 1));
        x += params_.alibi_slopes[kv_head * params_.group_size + g] * distance;
      }
      if (token < 0) x = -CUDART_INF_F;
    }
  }

  // Turns logits into probabilities against the step's maximum, as columns of the second product.
  __device__ void exponentiate(int ht, bool is_first, Scores& scores,
                               uint32_t (&p)[kBoxes][kHeadTiles][2],
                               Partial<kDim, kHeadTiles>& partial) const {
    float max[2] = {-CUDART_INF_F, -CUDART_INF_F}, offset[2], sum[2] = {}, kept[2];
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {
#pragma unroll
      for (int i = 0; i < 4; ++i) max[i % 2] = fmaxf(max[i % 2], scores[box][i]);
    }
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      SoftmaxState& state = partial.softmax[ht][column];
      if (is_first) state = SoftmaxState();
      max[column] = fmaxf(head_max(max[column]), state.max);
      // We don't want (-inf) - (-inf), since that would give NaN.
      const float reference = max[column] == -CUDART_INF_F ? 0.0f : max[column];
      offset[column] = -reference * kLog2e;
      kept[column] = is_first ? 0.0f : exp2_approximate(fmaf(state.max, kLog2e, offset[column]));
    }
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float low = exp2_approximate(fmaf(scores[box][2 * row], kLog2e, offset[0]));
        float high = exp2_approximate(fmaf(scores[box][2 * row + 1], kLog2e, offset[1]));
        // The sum takes the rounded probabilities, as the products do.
        p[box][ht][row] = transposed(Mma<T>::pack(low, high));
        sum[0] += low;
        sum[1] += high;
      }
    }
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      SoftmaxState& state = partial.softmax[ht][column];
      state.sum = state.sum * kept[column] + head_sum(sum[column]);
      state.max = max[column];
    }
#pragma unroll
    for (int i = 0; i < 4 * S::kRowTiles; ++i) {
      float& value = partial.values[ht][i / 4][i % 4];
      value = is_first ? 0.0f : value * kept[i % 2];
    }
  }

  // A NaN among values that nobody may see would survive the multiplication by zero.
  __device__ void clear_invisible(const TileInfo& info, unsigned char* values) const {
    for (int row = 0; row < kTileTokens; ++row) {
      if (info.token_at(row) >= 0) continue;
      unsigned char* box = values + row / kBoxTokens * S::kBoxBytes;
      for (int piece = lane_; piece < kDim / 8; piece += 32) {
        *reinterpret_cast<uint4*>(box + S::offset(row % kBoxTokens, piece)) = {};
      }
    }
    // The copy engine writes there next.
    fence_copy_engine_shared();
    __syncwarp();
  }

  __device__ void weigh(uint32_t values, const uint32_t (&p)[kBoxes][kHeadTiles][2],
                        Partial<kDim, kHeadTiles>& partial) const {
    const int row = lane_ % 8 + 8 * (lane_ / 16);
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {
#pragma unroll
      for (int i = 0; i < S::kRowTiles; ++i) {
        uint32_t v[4];
        sm80::load_matrix_transposed(
            v, values + box * S::kBoxBytes + S::offset(row, 2 * i + lane_ / 8 % 2));
#pragma unroll
        for (int ht = 0; ht < kHeadTiles; ++ht) {
          Mma<T>::run(partial.values[ht][i], v, p[box][ht][0], p[box][ht][1]);
        }
      }
    }
  }

  const DecodeParams& params_;
  const int lane_;
};

}  // namespace art::cuda::sm90
