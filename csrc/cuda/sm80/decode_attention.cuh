// Decode attention on tensor cores for sm_80 and newer. A thread block computes one item, or every
// crew-th step of it; keys are the rows of the matrix products and query heads the columns, so any
// GQA ratio up to 16 runs the same code. Keys and values arrive through cp.async, row by row in
// walk order.
#pragma once

#include "cuda/sm80/fold.cuh"

namespace art::cuda::sm80 {

constexpr int kScoreStride = 72;  // floats; 8 banks from one head to the next
constexpr float kLog2e = 1.4426950408889634f;

__device__ inline float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

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
class Block {
  using S = Shape<kDim, kHeadTiles>;

 public:
  __device__ Block(const DecodeParams& params, const Workspace& workspace,
                   Shared<kDim, kHeadTiles>& shared, int32_t index, int32_t rank, const Item& item)
      : params_(params),
        workspace_(workspace),
        shared_(shared),
        item_(item),
        index_(index),
        rank_(rank),
        thread_(thread_index()),
        warp_(thread_ / 32),
        lane_(thread_ % 32) {
    const int32_t step_tokens = item.steps.units_per_block * params.unit_size;
    tiles_per_step_ = (step_tokens + kTileTokens - 1) / kTileTokens;
    const int32_t steps = item.steps.num_steps;
    num_local_ = steps > rank ? (steps - rank - 1) / workspace.crew + 1 : 0;
  }

  // Works through the tiles from `tile` on. Returns the wave that has to be folded before it goes
  // on, or -1 at the end.
  __device__ int32_t run(int32_t& tile) {
    load_query();
    const int32_t num_tiles = num_local_ * tiles_per_step_;
    if (tile == 0) start_pipeline(num_tiles);
    while (tile < num_tiles) {
      wait_copies<S::kStages - 2>();
      __syncthreads();
      advance_pipeline(tile, num_tiles);
      const bool first = tile % tiles_per_step_ == 0;
      const bool last = tile % tiles_per_step_ == tiles_per_step_ - 1;
      score(tile);
      __syncthreads();
      if (first && workspace_.crew == 1 && decide()) break;
      weigh(tile, first);
      const int32_t local = tile++ / tiles_per_step_;
      if (!last) continue;
      if (workspace_.crew == 1) {
        fold_step(local);
        continue;
      }
      const Next next = store_step(local);
      if (next != Next::kTile) return next == Next::kFold ? wave_of(local) : -1;
    }
    if (workspace_.crew > 1) return -1;
    __syncthreads();
    if (stop_block_ < 0) decide();
    write_output();
    return -1;
  }

 private:
  enum class Next { kTile, kFold, kEnd };

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

  // ---- folding, one thread block per item

  __device__ bool compares(int32_t step) const {
    return params_.use_stability && item_.steps.block_of(step) > 0;
  }

  __device__ void fold_step(int32_t step) {
    const bool compare = compares(step);
    pending_step_ = step;
#pragma unroll
    for (int ht = 0; ht < kHeadTiles; ++ht) {
      const SoftmaxState before = running_[ht];
      const FoldFactors factors = fold(running_[ht], step_[ht]);
      const int32_t g = 8 * ht + lane_ / 4;
      const float* sink = g < params_.group_size ? sink_of(params_, item_, g) : nullptr;
      const IncrementWeights weights =
          increment_weights(before, step_[ht], running_[ht], factors, sink);
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        fold_column(ht, column, factors, weights, compare, step);
      }
    }
  }

  __device__ void fold_column(int ht, int column, const FoldFactors& factors,
                              const IncrementWeights& weights, bool compare, int32_t step) {
    const FoldFactors of_head = {of_column(factors.running, column),
                                 of_column(factors.incoming, column)};
    const IncrementWeights increment = {of_column(weights.keep, column),
                                        of_column(weights.share, column)};
    const float scale = of_column(scale_[ht], column);
    float sums[3] = {};
#pragma unroll
    for (int i = 0; i < 2 * S::kSlices; ++i) {
      float& value = values_[ht][i / 2][i % 2 * 2 + column];
      const FoldedElement element(value, step_values_[ht][i / 2][i % 2 * 2 + column], of_head);
      value = element.after();
      const float a = element.before * scale, d = element.change(increment, scale);
      sums[0] += a * a;
      sums[1] += a * d;
      sums[2] += d * d;
    }
    if (!params_.use_stability) return;
    if (!compare) sums[0] = largest_in_column(column, ht);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      for (int other = 4; other <= 16; other *= 2) {
        const float y = __shfl_xor_sync(~0u, sums[i], other);
        sums[i] = compare ? sums[i] + y : fmaxf(sums[i], y);
      }
      if (lane_ < 4) {
        shared_.moments[step % 2][warp_][8 * ht + 2 * lane_ + column][i] = sums[i];
      }
    }
  }

  __device__ float largest_in_column(int column, int ht) const {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 2 * S::kSlices; ++i) {
      largest = fmaxf(largest, fabsf(values_[ht][i / 2][i % 2 * 2 + column]));
    }
    return largest;
  }

  // The decision about the last folded step, one barrier after its moments were written. Every
  // warp sees all heads and comes to the same result.
  __device__ bool decide() {
    if (pending_step_ < 0) return false;
    const int32_t step = pending_step_;
    pending_step_ = -1;
    const bool settled = params_.use_stability && completes_patience(step);
    const bool covered =
        params_.use_residual && item_.steps.completes_block(step) && is_group_covered(step);
    if (!stops(settled, covered, params_.all_agree)) return false;
    stop_block_ = item_.steps.block_of(step);
    num_read_ = step + 1;
    return true;
  }

  __device__ bool completes_patience(int32_t step) {
    const bool compare = compares(step);
    const StabilityThresholds thresholds = thresholds_of(params_, item_);
    bool stable = true;
#pragma unroll
    for (int ht = 0; ht < kHeadTiles; ++ht) {
      const int32_t g = 8 * ht + lane_ / 4;
      float sums[3] = {};
      for (int warp = 0; warp < kWarps; ++warp) {
        const float* part = shared_.moments[step % 2][warp][g];
        for (int i = 0; i < 3; ++i) sums[i] = compare ? sums[i] + part[i] : fmaxf(sums[i], part[i]);
      }
      if (!compare) {
        // The starting output sets the scale that keeps the squares in range.
        scale_[ht] = moment_scale(sums[0]);
        continue;
      }
      const OutputChange change = output_change({sums[0], sums[1], sums[2]});
      stable = stable && (g >= params_.group_size || is_stable(change, thresholds));
      if (sums[0] > 1e20f || sums[0] < 1e-20f) scale_[ht] *= moment_scale(sqrtf(sums[0]));
    }
    return compare && patience_.completes(__all_sync(~0u, stable), params_.patience);
  }

  // Whether every head has little enough left. The running states are still those after the step.
  __device__ bool is_group_covered(int32_t step) const {
    const int32_t entry = last_entry_of(item_, step, kept_units_of(params_, workspace_));
    bool covered = true;
#pragma unroll
    for (int ht = 0; ht < kHeadTiles; ++ht) {
      const int32_t g = 8 * ht + lane_ / 4;
      if (g >= params_.group_size) continue;
      covered = covered && is_head_covered(params_, item_, g, entry, running_[ht]);
    }
    return __all_sync(~0u, covered);
  }

  __device__ void write_output() {
    const int32_t first_head = item_.kv_head * params_.group_size;
    const int64_t first_row = int64_t{item_.batch} * params_.num_q_heads + first_head;
#pragma unroll
    for (int ht = 0; ht < kHeadTiles; ++ht) {
      const int32_t own = 8 * ht + lane_ / 4;
      const bool exists = own < params_.group_size;
      const float total = running_[ht].sum +
                          sink_mass(running_[ht], exists ? sink_of(params_, item_, own) : nullptr);
      if (exists && thread_ % 4 == 0 && warp_ == 0) {
        params_.lse[first_row + own] = log_sum_exp(running_[ht]);
      }
#pragma unroll
      for (int i = 0; i < 4 * S::kSlices; ++i) {
        const float denominator = of_column(total, i % 2), sum = of_column(running_[ht].sum, i % 2);
        const int32_t g = 8 * ht + 2 * (lane_ % 4) + i % 2;
        const int32_t d = 16 * (i / 4 * kWarps + warp_) + lane_ / 4 + 8 * (i % 4 / 2);
        if (g >= params_.group_size || d >= kDim) continue;
        // Nothing read leaves 0 / 0, which is defined as zero.
        const float value = sum == 0.0f ? 0.0f : values_[ht][i / 4][i % 4] / denominator;
        static_cast<T*>(params_.out)[(first_row + g) * kDim + d] = Mma<T>::round(value);
      }
    }
    count_tokens(params_, item_, stop_block_ < 0 ? item_.steps.num_steps : num_read_,
                 params_.tokens_read + index_);
    if (thread_ == 0) params_.stop_block[index_] = stop_block_;
  }

  // ---- handing over, several thread blocks per item

  __device__ int32_t wave_of(int32_t local) const { return step_of(local) / workspace_.wave_steps; }

  // Stores the step for the fold of its wave.
  __device__ Next store_step(int32_t local) {
    const int32_t step = step_of(local), wave = wave_of(local);
    CrewState& state = workspace_.state[index_];
    if (thread_ == 0) {
      // The ring slot is free once the wave that used it last is folded.
      int32_t folded;
      while ((folded = load_acquire(&state.folded_waves)) <= wave - kRingWaves) __nanosleep(100);
      shared_.flag = folded;
    }
    __syncthreads();
    if (shared_.flag == kFinished) return Next::kEnd;
    const int64_t slot =
        (int64_t{index_} * kRingWaves + wave % kRingWaves) * workspace_.wave_steps +
        step % workspace_.wave_steps;
    write_step(workspace_.ring_softmax + slot * params_.group_size,
               workspace_.ring_values + slot * params_.group_size * kDim);
    const bool last_of_wave = local + 1 == num_local_ || wave_of(local + 1) != wave;
    return last_of_wave ? arrive(state, wave) : Next::kTile;
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

  // The last of the crew to finish a wave folds it. Waves are folded in order; whoever folds the
  // one before is running, so the wait ends.
  __device__ Next arrive(CrewState& state, int32_t wave) {
    __syncthreads();
    if (thread_ == 0) {
      const int32_t left = item_.steps.num_steps - wave * workspace_.wave_steps;
      const int32_t expected = left < workspace_.crew ? left : workspace_.crew;
      int32_t* arrivals = workspace_.arrivals + int64_t{index_} * workspace_.max_waves + wave;
      const bool folds = add_acq_rel(arrivals, 1) + 1 == expected;
      int32_t folded = -1;
      while (folds && (folded = load_acquire(&state.folded_waves)) < wave) __nanosleep(50);
      shared_.flag = folded;
    }
    __syncthreads();
    if (shared_.flag == wave) return Next::kFold;
    return shared_.flag == kFinished ? Next::kEnd : Next::kTile;
  }

  const DecodeParams& params_;
  const Workspace& workspace_;
  Shared<kDim, kHeadTiles>& shared_;
  const Item& item_;
  const int32_t index_, rank_;
  const int thread_, warp_, lane_;
  int32_t tiles_per_step_;
  int32_t num_local_;
  uint32_t query_[kHeadTiles][kDim / 16][2];
  SoftmaxState step_[kHeadTiles];                 // of head 8 * ht + lane / 4
  float step_values_[kHeadTiles][S::kSlices][4];  // of heads 8 * ht + 2 * (lane % 4) + {0, 1}
  SoftmaxState running_[kHeadTiles];
  float values_[kHeadTiles][S::kSlices][4] = {};
  float scale_[kHeadTiles] = {};
  PatienceCounter patience_;
  int32_t pending_step_ = -1;
  int32_t stop_block_ = -1;
  int32_t num_read_ = 0;
};

template <class T, int kDim, int kHeadTiles>
__global__ void __launch_bounds__(kThreads, kDim <= 128 && kHeadTiles == 1 ? 3 : 2)
    decode_kernel(const __grid_constant__ DecodeParams params,
                  const __grid_constant__ Workspace workspace) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<kDim, kHeadTiles>*>(memory);
  const int32_t index = blockIdx.x / workspace.crew, rank = blockIdx.x % workspace.crew;
  const TokenRange visible = visible_of(params, index);
  const int32_t pinned = num_pinned_of(params, index);
  const KeptUnits kept = kept_units_of(params, workspace);
  const Walk walk = params.walk_order == WalkOrder::kExplicit
                        ? visible_walk<kThreads>(params, index, visible, kept)
                        : built_in_walk(params.walk_order, visible, params.unit_size, pinned);
  const Item item = make_item(params, index, visible, walk);
  if (workspace.crew > 1 && item.steps.num_steps == 0 && rank == 0) {
    for (int32_t g = threadIdx.x / 32; g < params.group_size; g += kWarps) {
      write_head<T, kDim>(params, item, g, {});
    }
    if (threadIdx.x == 0) params.tokens_read[index] = 0, params.stop_block[index] = -1;
  }
  int32_t tile = 0, wave = 0;
  do {
    // A fold takes nearly all registers, so of a Block only the copies under way live through it.
    wave = Block<T, kDim, kHeadTiles>(params, workspace, shared, index, rank, item).run(tile);
  } while (wave >= 0 && !fold_wave<T, kDim>(params, workspace, item, index, wave));
}

template <class T, int kDim, int kHeadTiles>
cudaError_t run_heads(const DecodeParams& params, const Workspace& workspace, cudaStream_t stream,
                      int* blocks) {
  constexpr int kBytes = sizeof(Shared<kDim, kHeadTiles>);
  const auto kernel = decode_kernel<T, kDim, kHeadTiles>;
  if (blocks != nullptr) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (error != cudaSuccess) return error;
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, kThreads, kBytes);
  }
  const unsigned grid = static_cast<unsigned>(params.batch) * params.num_kv_heads * workspace.crew;
  kernel<<<grid, kThreads, kBytes, stream>>>(params, workspace);
  return cudaGetLastError();
}

template <class T, int kDim>
cudaError_t run(const DecodeParams& params, const Workspace& workspace, cudaStream_t stream,
                int* blocks) {
  if (params.group_size <= 8) return run_heads<T, kDim, 1>(params, workspace, stream, blocks);
  return run_heads<T, kDim, 2>(params, workspace, stream, blocks);
}

}  // namespace art::cuda::sm80
