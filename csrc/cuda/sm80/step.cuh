// One step of an item on tensor cores: its tiles come through cp.async, row by row in walk order,
// and are scored and weighed. What a thread block then does with the step is
// decode_attention.cuh's.
#pragma once

#include "cuda/exponential.cuh"
#include "cuda/sm80/fold.cuh"

namespace art::cuda::sm80 {

constexpr int kScoreStride = 72;  // floats; 8 banks from one head to the next

template <int kDim, int kHeadTiles>
struct Shape {
  static constexpr int kHeads = 8 * kHeadTiles;
  static constexpr int kStages = kDim < 128 ? 3 : 2;
  static constexpr int kSlices = (kDim / 16 + kWarps - 1) / kWarps;  // 16-row tiles of one warp
  // Eight rows that ldmatrix reads together must lie in different banks: 16-byte pieces are
  // exchanged within groups of eight, or where a row is no multiple of that, rows are padded.
  static constexpr bool kSwizzled = kDim % 64 == 0;
  static constexpr int kRowBytes = 2 * kDim + (kSwizzled ? 0 : 16);
  static constexpr int kTileBytes = kTileTokens * kRowBytes;

  __device__ static uint32_t offset(int row, int piece) {
    return row * kRowBytes + 16 * (kSwizzled ? piece ^ (row % 8) : piece);
  }
};

// What is derived from it is formed again for each Block, instead of living through a fold.
__device__ inline int thread_index() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  __builtin_assume(thread >= 0 && thread < kThreads);
  return thread;
}

// Where a token's rows are, and its position; -1: not visible.
struct TokenRows {
  int64_t key;
  int64_t value;
  int32_t position;
};

template <int kDim, int kHeadTiles>
struct Shared {
  using S = Shape<kDim, kHeadTiles>;
  unsigned char keys[S::kStages][S::kTileBytes];
  unsigned char values[S::kStages][S::kTileBytes];
  TokenRows rows[S::kStages + 1][kTileTokens];
  float scores[S::kHeads][kScoreStride];
  float moments[2][kWarps][S::kHeads][3];
  int32_t flag;
};
template <class T, int kDim, int kHeadTiles>
class StepAttention {
 protected:
  using S = Shape<kDim, kHeadTiles>;

  __device__ StepAttention(const DecodeParams& params, const Workspace& workspace,
                           Shared<kDim, kHeadTiles>& shared, const Item& item, int32_t rank)
      : params_(params),
        workspace_(workspace),
        shared_(shared),
        item_(item),
        rank_(rank),
        thread_(thread_index()),
        warp_(thread_ / 32),
        lane_(thread_ % 32) {
    const int32_t step_tokens = item.steps.units_per_block * params.unit_size;
    tiles_per_step_ = (step_tokens + kTileTokens - 1) / kTileTokens;
  }

  __device__ int32_t step_of(int32_t local) const { return local * workspace_.crew + rank_; }

  // ---- loading

  __device__ void load_query() {
    const T* query = static_cast<const T*>(params_.query) +
                     item_.batch * params_.query_batch_stride +
                     int64_t{item_.kv_head} * params_.group_size * params_.query_head_stride;
#pragma unroll
    for (int ht = 0; ht < kHeadTiles; ++ht) {
      const int32_t g = 8 * ht + lane_ / 4;
      const T* row = query + g * params_.query_head_stride + 2 * (lane_ % 4);
#pragma unroll
      for (int ks = 0; ks < kDim / 16; ++ks) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const auto* pair = reinterpret_cast<const uint32_t*>(row + 16 * ks + 8 * half);
          query_[ht][ks][half] = g < params_.group_size ? *pair : 0;
        }
      }
    }
  }

  __device__ void find_rows(int32_t tile) {
    if (thread_ >= kTileTokens) return;
    const auto positions = item_.steps.positions(step_of(tile / tiles_per_step_));
    const int32_t slot =
        positions.begin * params_.unit_size + tile % tiles_per_step_ * kTileTokens + thread_;
    const bool exists = slot < positions.end * params_.unit_size;
    const int32_t token = exists ? token_at(params_, item_, slot) : -1;
    TokenRows rows = {-1, -1, token};
    if (token >= 0) {
      const int64_t page = page_of(params_, item_, token);
      const int32_t in_page = token % params_.page_size;
      rows.key = row_offset(params_.key, page, in_page, item_.kv_head);
      rows.value = row_offset(params_.value, page, in_page, item_.kv_head);
    }
    shared_.rows[tile % (S::kStages + 1)][thread_] = rows;
  }

  // Rows that are not visible become zeros: nothing is read, and no NaN can reach a product.
  __device__ void copy_tile(int32_t tile) {
    constexpr int kPieces = kDim / 8;  // of 16 bytes in a row
    const TokenRows* rows = shared_.rows[tile % (S::kStages + 1)];
    unsigned char* keys = shared_.keys[tile % S::kStages];
    unsigned char* values = shared_.values[tile % S::kStages];
    const T* key_data = static_cast<const T*>(params_.key.data);
    const T* value_data = static_cast<const T*>(params_.value.data);
#pragma unroll
    for (int i = thread_; i < kTileTokens * kPieces; i += kThreads) {
      const int t = i / kPieces, piece = i % kPieces;
      const int64_t row = rows[t].key;
      const T* from = key_data + (row < 0 ? 0 : row) + 8 * piece;
      copy_async(keys + S::offset(t, piece), from, row >= 0);
    }
#pragma unroll
    for (int i = thread_; i < kTileTokens * kPieces; i += kThreads) {
      const int t = i / kPieces, piece = i % kPieces;
      const int64_t row = rows[t].value;
      const T* from = value_data + (row < 0 ? 0 : row) + 8 * piece;
      copy_async(values + S::offset(t, piece), from, row >= 0);
    }
  }

  __device__ void start_pipeline(int32_t num_tiles) {
    for (int32_t tile = 0; tile < S::kStages && tile < num_tiles; ++tile) find_rows(tile);
    __syncthreads();
    for (int32_t tile = 0; tile < S::kStages - 1; ++tile) {
      if (tile < num_tiles) copy_tile(tile);
      commit_copies();
    }
  }

  // Starts the copy of the tile that takes the stage just left, whose rows are known since the
  // last barrier, and finds the rows of the tile after it.
  __device__ void advance_pipeline(int32_t tile, int32_t num_tiles) {
    if (tile + S::kStages - 1 < num_tiles) copy_tile(tile + S::kStages - 1);
    commit_copies();
    if (tile + S::kStages < num_tiles) find_rows(tile + S::kStages);
  }

  // ---- attention within a step

  // Each warp scores 16 tokens for all heads.
  __device__ void score(int32_t tile) {
    const unsigned char* keys = shared_.keys[tile % S::kStages];
    const TokenRows* rows = shared_.rows[tile % (S::kStages + 1)];
    const uint32_t from = shared_address(keys);
    const int row = 16 * warp_ + lane_ % 16;
    float sums[kHeadTiles][4] = {};
#pragma unroll
    for (int ks = 0; ks < kDim / 16; ++ks) {
      uint32_t k[4];
      load_matrix(k, from + S::offset(row, 2 * ks + lane_ / 16));
#pragma unroll
      for (int ht = 0; ht < kHeadTiles; ++ht) {
        Mma<T>::run(sums[ht], k, query_[ht][ks][0], query_[ht][ks][1]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4 * kHeadTiles; ++i) {
      const int t = 16 * warp_ + lane_ / 4 + 8 * (i % 4 / 2);
      const int g = 8 * (i / 4) + 2 * (lane_ % 4) + i % 2;
      shared_.scores[g][t] = adjusted(sums[i / 4][i % 4], rows[t].position, g);
    }
  }

  __device__ float adjusted(float dot, int32_t position, int32_t g) const {
    float x = dot * params_.scale;
    if (params_.softcap > 0.0f) x = params_.softcap * tanhf(x / params_.softcap);
    if (params_.alibi_slopes != nullptr && g < params_.group_size) {
      const float slope = params_.alibi_slopes[item_.kv_head * params_.group_size + g];
      x += slope * static_cast<float>(position - (item_.visible.end - 1));
    }
    return position < 0 ? -INFINITY : x;
  }

  // Probabilities and weighted values of one tile. Every warp exponentiates all tokens for itself
  // (each lane those of head lane / 4 that its products need), which saves a barrier.
  __device__ void weigh(int32_t tile, bool first) {
    uint32_t p[kHeadTiles][kTileTokens / 16][2];
#pragma unroll
    for (int ht = 0; ht < kHeadTiles; ++ht) exponentiate(ht, first, p[ht]);
    const unsigned char* values = shared_.values[tile % S::kStages];
    const int token = lane_ % 8 + 8 * (lane_ / 16);
    const uint32_t from = shared_address(values);
#pragma unroll
    for (int slice = 0; slice < S::kSlices; ++slice) {
      const int rows = slice * kWarps + warp_;
      if (rows >= kDim / 16) break;
#pragma unroll
      for (int ks = 0; ks < kTileTokens / 16; ++ks) {
        uint32_t v[4];
        load_matrix_transposed(v, from + S::offset(16 * ks + token, 2 * rows + lane_ / 8 % 2));
#pragma unroll
        for (int ht = 0; ht < kHeadTiles; ++ht) {
          Mma<T>::run(step_values_[ht][slice], v, p[ht][ks][0], p[ht][ks][1]);
        }
      }
    }
  }

  __device__ void exponentiate(int ht, bool first, uint32_t (&p)[kTileTokens / 16][2]) {
    const float* scores = shared_.scores[8 * ht + lane_ / 4] + 2 * (lane_ % 4);
    float x[kTileTokens / 16][4];
    float max = -INFINITY;
#pragma unroll
    for (int ks = 0; ks < kTileTokens / 16; ++ks) {
      const float2 low = *reinterpret_cast<const float2*>(scores + 16 * ks);
      const float2 high = *reinterpret_cast<const float2*>(scores + 16 * ks + 8);
      x[ks][0] = low.x, x[ks][1] = low.y, x[ks][2] = high.x, x[ks][3] = high.y;
#pragma unroll
      for (int i = 0; i < 4; ++i) max = x[ks][i] > max ? x[ks][i] : max;
    }
    for (int other = 1; other <= 2; other *= 2) {
      max = fmaxf(max, __shfl_xor_sync(~0u, max, other));
    }
    SoftmaxState& step = step_[ht];
    if (first) step = SoftmaxState();
    max = fmaxf(max, step.max);
    // We don't want (-inf) - (-inf), since that would give NaN.
    const float reference = max == -INFINITY ? 0.0f : max;
    float sum = 0.0f;
#pragma unroll
    for (int ks = 0; ks < kTileTokens / 16; ++ks) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[ks][i] = exp2_approximate((x[ks][i] - reference) * kLog2e);
      // The sum takes the rounded probabilities, as the products do.
      p[ks][0] = Mma<T>::pack(x[ks][0], x[ks][1]);
      p[ks][1] = Mma<T>::pack(x[ks][2], x[ks][3]);
      sum += (x[ks][0] + x[ks][1]) + (x[ks][2] + x[ks][3]);
    }
    for (int other = 1; other <= 2; other *= 2) sum += __shfl_xor_sync(~0u, sum, other);
    const float kept = first ? 0.0f : exp2_approximate((step.max - reference) * kLog2e);
    step.sum = step.sum * kept + sum;
    step.max = max;
    const float kept_of[2] = {of_column(kept, 0), of_column(kept, 1)};
#pragma unroll
    for (int i = 0; i < 4 * S::kSlices; ++i) {
      float& value = step_values_[ht][i / 4][i % 4];
      value = first ? 0.0f : value * kept_of[i % 2];
    }
  }

  // What the lanes of head 2 * (lane % 4) + column hold: the heads of this lane's products.
  __device__ float of_column(float x, int column) const {
    return __shfl_sync(~0u, x, 4 * (2 * (lane_ % 4) + column));
  }

  __device__ void write_step(SoftmaxState* softmax, float* values) {
#pragma unroll
    for (int ht = 0; ht < kHeadTiles; ++ht) {
      const int32_t own = 8 * ht + lane_ / 4;
      if (warp_ == 0 && lane_ % 4 == 0 && own < params_.group_size) softmax[own] = step_[ht];
#pragma unroll
      for (int i = 0; i < 4 * S::kSlices; ++i) {
        const int32_t g = 8 * ht + 2 * (lane_ % 4) + i % 2;
        const int32_t d = 16 * (i / 4 * kWarps + warp_) + lane_ / 4 + 8 * (i % 4 / 2);
        if (g < params_.group_size && d < kDim)
          values[g * kDim + d] = step_values_[ht][i / 4][i % 4];
      }
    }
  }
  const DecodeParams& params_;
  const Workspace& workspace_;
  Shared<kDim, kHeadTiles>& shared_;
  const Item& item_;
  const int32_t rank_;
  const int thread_, warp_, lane_;
  int32_t tiles_per_step_;
  SoftmaxState step_[kHeadTiles];                 // of head 8 * ht + lane / 4
  float step_values_[kHeadTiles][S::kSlices][4];  // of heads 8 * ht + 2 * (lane % 4) + {0, 1}

 private:
  uint32_t query_[kHeadTiles][kDim / 16][2];
};

}  // namespace art::cuda::sm80
