// Decode attention for every GPU, dtype, head size and layout: one thread block per item, plain
// arithmetic in float32. It is the reference among the kernels, made to be right, not fast.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/item.h"
#include "core/online_softmax.h"
#include "core/params.h"
#include "core/termination.h"
#include "cuda/portable/launch.h"
#include "cuda/rows.cuh"

namespace art::cuda::portable {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTileTokens = 64;
constexpr int kHeads = 16;  // query heads that are computed together; more take further rounds

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void store_as(float* to, float x) { *to = x; }
__device__ inline void store_as(__half* to, float x) { *to = __float2half_rn(x); }
__device__ inline void store_as(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }

// Shared memory of one thread block.
struct Shared {
  float* query;        // [kHeads, head_dim], scaled
  float* values;       // [kHeads, value_dim]: weighted sums of the step
  float* scores;       // [kHeads, kTileTokens]
  int64_t* value_row;  // [kTileTokens]: element offset, -1 where the token is not visible
  SoftmaxState step[kHeads];
  FoldFactors factors[kHeads];
};

struct Tile {
  int32_t begin;  // walk slots (unit position * unit_size + offset) of the step
  int32_t end;
};

template <class T>
__device__ void load_query(const DecodeParams& params, const Item& item, int32_t first_head,
                           int32_t heads, Shared& shared) {
  const int64_t head = int64_t{item.kv_head} * params.group_size + first_head;
  const T* query = static_cast<const T*>(params.query) + item.batch * params.query_batch_stride +
                   head * params.query_head_stride;
  for (int32_t i = threadIdx.x; i < heads * params.head_dim; i += kThreads) {
    const int32_t g = i / params.head_dim, d = i % params.head_dim;
    shared.query[i] = to_float(query[g * params.query_head_stride + d]) * params.scale;
  }
}

// One warp per token: the key is read once for all heads.
template <class T>
__device__ void score_tile(const DecodeParams& params, const Item& item, Tile tile,
                           int32_t first_head, int32_t heads, Shared& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int32_t t = warp; t < kTileTokens; t += kWarps) {
    const int32_t slot = tile.begin + t;
    const int32_t token = slot < tile.end ? token_at(params, item, slot) : -1;
    float* scores = shared.scores + t;
    if (token < 0) {
      if (lane < heads) scores[lane * kTileTokens] = -INFINITY;
      if (lane == 0) shared.value_row[t] = -1;
      continue;
    }
    const int64_t page = page_of(params, item, token);
    const int32_t in_page = token % params.page_size;
    if (lane == 0) {
      shared.value_row[t] = row_offset(params.value, page, in_page, item.kv_head);
    }
    const T* key = static_cast<const T*>(params.key.data) +
                   row_offset(params.key, page, in_page, item.kv_head);
    float k[8];
    for (int i = 0; i < 8; ++i) {
      const int32_t d = lane + 32 * i;
      k[i] = d < params.head_dim ? to_float(key[d * params.key.dim_stride]) : 0.0f;
    }
    for (int32_t g = 0; g < heads; ++g) {
      float sum = 0.0f;
      for (int i = 0; i < 8; ++i) {
        const int32_t d = lane + 32 * i;
        if (d < params.head_dim) sum += k[i] * shared.query[g * params.head_dim + d];
      }
      float x = warp_sum(sum);
      if (params.softcap > 0.0f) x = params.softcap * tanhf(x / params.softcap);
      if (params.alibi_slopes != nullptr) {
        const float slope = params.alibi_slopes[item.kv_head * params.group_size + first_head + g];
        x += slope * static_cast<float>(token - (item.visible.end - 1));
      }
      if (lane == 0) scores[g * kTileTokens] = x;
    }
  }
}

// Probabilities of the tile, one warp per head; the step's softmax state takes the tile in.
__device__ inline void exponentiate(int32_t heads, Shared& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int32_t g = warp; g < heads; g += kWarps) {
    float* scores = shared.scores + g * kTileTokens;
    const float x0 = scores[lane], x1 = scores[lane + 32];
    SoftmaxState tile;
    tile.max = warp_max(x0 > x1 ? x0 : x1);
    // We don't want (-inf) - (-inf), since that would give NaN.
    const float reference = tile.max == -INFINITY ? 0.0f : tile.max;
    const float p0 = expf(x0 - reference), p1 = expf(x1 - reference);
    scores[lane] = p0;
    scores[lane + 32] = p1;
    tile.sum = warp_sum(p0 + p1);
    SoftmaxState step = shared.step[g];
    const FoldFactors factors = fold(step, tile);
    __syncwarp();
    if (lane == 0) {
      shared.step[g] = step;
      shared.factors[g] = factors;
    }
  }
}

template <class T>
__device__ void weigh_tile(const DecodeParams& params, int32_t heads, Shared& shared) {
  const T* values = static_cast<const T*>(params.value.data);
  for (int32_t i = threadIdx.x; i < heads * params.value_dim; i += kThreads) {
    const int32_t g = i / params.value_dim, d = i % params.value_dim;
    const float* p = shared.scores + g * kTileTokens;
    float sum = 0.0f;
    for (int t = 0; t < kTileTokens; ++t) {
      const int64_t row = shared.value_row[t];
      if (row >= 0) sum += p[t] * to_float(values[row + d]);
    }
    const FoldFactors factors = shared.factors[g];
    shared.values[i] = shared.values[i] * factors.running + sum * factors.incoming;
  }
}

template <class T>
__device__ void compute_step(const DecodeParams& params, const Item& item, int32_t step,
                             int32_t first_head, int32_t heads, Shared& shared) {
  for (int32_t i = threadIdx.x; i < heads * params.value_dim; i += kThreads) shared.values[i] = 0;
  if (threadIdx.x < heads) shared.step[threadIdx.x] = SoftmaxState();
  const auto positions = item.steps.positions(step);
  const int32_t end = positions.end * params.unit_size;
  for (int32_t slot = positions.begin * params.unit_size; slot < end; slot += kTileTokens) {
    __syncthreads();
    score_tile<T>(params, item, {slot, end}, first_head, heads, shared);
    __syncthreads();
    exponentiate(heads, shared);
    __syncthreads();
    weigh_tile<T>(params, heads, shared);
  }
  __syncthreads();
}

// Inner products over one head, for all lanes of the warp. Both vectors are multiplied by `scale`,
// a power of two.
__device__ inline IncrementMoments moments_of(const FoldFactors& factors,
                                              const IncrementWeights& weights, const float* running,
                                              const float* incoming, int32_t dim, float scale) {
  const float before = factors.running * scale, block = factors.incoming * weights.keep * scale;
  IncrementMoments moments = {};
  for (int32_t i = threadIdx.x % 32; i < dim; i += 32) {
    const float a = running[i] * before;
    const float d = incoming[i] * block - a * weights.share;
    moments.aa += a * a;
    moments.ad += a * d;
    moments.dd += d * d;
  }
  return {warp_sum(moments.aa), warp_sum(moments.ad), warp_sum(moments.dd)};
}

__device__ inline float largest_of(const FoldFactors& factors, const IncrementWeights& weights,
                                   const float* running, const float* incoming, int32_t dim) {
  float largest = 0.0f;
  for (int32_t i = threadIdx.x % 32; i < dim; i += 32) {
    const float a = running[i] * factors.running;
    const float d = incoming[i] * factors.incoming * weights.keep - a * weights.share;
    largest = fmaxf(largest, fmaxf(fabsf(a), fabsf(d)));
  }
  return warp_max(largest);
}

// Folds the step into the running output, one warp per head (always the same one, so that it reads
// what it wrote). Returns whether this thread's heads were all stable.
__device__ inline bool fold_step(const DecodeParams& params, const Item& item, int32_t first_head,
                                 int32_t heads, bool compare, const Shared& shared,
                                 SoftmaxState* running_softmax, float* running_values) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t dim = params.value_dim;
  const StabilityThresholds thresholds = thresholds_of(params, item);
  bool stable = true;
  for (int32_t g = warp; g < heads; g += kWarps) {
    const SoftmaxState incoming = shared.step[g];
    const SoftmaxState before = running_softmax[first_head + g];
    SoftmaxState after = before;
    const FoldFactors factors = fold(after, incoming);
    float* running = running_values + int64_t{first_head + g} * dim;
    const float* values = shared.values + g * dim;
    if (compare) {
      const float* sink = sink_of(params, item, first_head + g);
      const IncrementWeights weights = increment_weights(before, incoming, after, factors, sink);
      IncrementMoments moments = moments_of(factors, weights, running, values, dim, 1.0f);
      if (!in_range(moments)) {
        const float scale = moment_scale(largest_of(factors, weights, running, values, dim));
        moments = moments_of(factors, weights, running, values, dim, scale);
      }
      stable = stable && is_stable(output_change(moments), thresholds);
    }
    for (int32_t d = lane; d < dim; d += 32) {
      running[d] = running[d] * factors.running + values[d] * factors.incoming;
    }
    __syncwarp();
    if (lane == 0) running_softmax[first_head + g] = after;
    __syncwarp();
  }
  return stable;
}

// Whether every head has little enough left after an entry of the walk. Called by the whole thread
// block, behind a barrier that follows the fold.
__device__ inline bool is_group_covered(const DecodeParams& params, const Item& item, int32_t entry,
                                        const SoftmaxState* softmax) {
  bool covered = true;
  for (int32_t g = threadIdx.x; g < params.group_size; g += kThreads) {
    covered = covered && is_head_covered(params, item, g, entry, softmax[g]);
  }
  return __syncthreads_and(covered);
}

template <class T>
__device__ void write_output(const DecodeParams& params, const Item& item,
                             const SoftmaxState* softmax, const float* values) {
  const int64_t first =
      (int64_t{item.batch} * params.num_kv_heads + item.kv_head) * params.group_size;
  for (int32_t i = threadIdx.x; i < params.group_size * params.value_dim; i += kThreads) {
    const int32_t g = i / params.value_dim, d = i % params.value_dim;
    const SoftmaxState state = softmax[g];
    const float total = state.sum + sink_mass(state, sink_of(params, item, g));
    // Nothing read leaves 0 / 0, which is defined as zero.
    const float value = state.sum == 0.0f ? 0.0f : values[i] / total;
    store_as(static_cast<T*>(params.out) + first * params.value_dim + i, value);
    if (d == 0) params.lse[first + g] = log_sum_exp(state);
  }
}

__device__ inline int32_t tokens_of(const DecodeParams& params, const Item& item, int32_t step) {
  const auto positions = item.steps.positions(step);
  int32_t tokens = 0;
  for (int32_t i = positions.begin; i < positions.end; ++i) {
    tokens += unit_tokens(item.walk.unit_at(i), params.unit_size, item.visible).size();
  }
  return tokens;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    decode_kernel(const __grid_constant__ DecodeParams params, const Workspace workspace) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    shared.value_row = reinterpret_cast<int64_t*>(&shared + 1);
    shared.scores = reinterpret_cast<float*>(shared.value_row + kTileTokens);
    shared.query = shared.scores + kHeads * kTileTokens;
    shared.values = shared.query + kHeads * params.head_dim;
  }
  const int64_t index = blockIdx.x, first_unit = index * params.max_units;
  TokenRange visible = visible_of(params, index);
  const int32_t pinned = num_pinned_of(params, index);
  const KeptUnits kept = {workspace.kept_units + first_unit,
                          params.use_residual ? workspace.kept_entries + first_unit : nullptr};
  const Walk walk = params.walk_order == WalkOrder::kExplicit
                        ? visible_walk<kThreads>(params, index, visible, kept)
                        : built_in_walk(params.walk_order, visible, params.unit_size, pinned);
  const Item item = make_item(params, index, visible, walk);
  SoftmaxState* softmax = workspace.softmax + index * params.group_size;
  float* values = workspace.values + index * params.group_size * params.value_dim;
  for (int32_t i = threadIdx.x; i < params.group_size * params.value_dim; i += kThreads) {
    values[i] = 0.0f;
    if (i < params.group_size) softmax[i] = SoftmaxState();
  }
  __syncthreads();

  PatienceCounter patience;
  int32_t stop_block = -1, tokens_read = 0;
  for (int32_t step = 0; step < item.steps.num_steps && stop_block < 0; ++step) {
    const int32_t block = item.steps.block_of(step);
    const bool compare = params.use_stability && block > 0;
    bool stable = true;
    for (int32_t g = 0; g < params.group_size; g += kHeads) {
      const int32_t heads = params.group_size - g < kHeads ? params.group_size - g : kHeads;
      if (step == 0 || params.group_size > kHeads) {
        load_query<T>(params, item, g, heads, shared);
      }
      compute_step<T>(params, item, step, g, heads, shared);
      stable = fold_step(params, item, g, heads, compare, shared, softmax, values) && stable;
      __syncthreads();
    }
    if (threadIdx.x == 0) tokens_read += tokens_of(params, item, step);
    stable = __syncthreads_and(stable);
    const bool settled = compare && patience.completes(stable, params.patience);
    bool covered = false;
    if (params.use_residual && item.steps.completes_block(step)) {
      covered = is_group_covered(params, item, last_entry_of(item, step, kept), softmax);
    }
    if (stops(settled, covered, params.all_agree)) stop_block = block;
  }
  write_output<T>(params, item, softmax, values);
  if (threadIdx.x == 0) {
    params.tokens_read[index] = tokens_read;
    params.stop_block[index] = stop_block;
  }
}

template <class T>
cudaError_t launch(const DecodeParams& params, const Workspace& workspace, cudaStream_t stream) {
  const size_t shared_bytes =
      sizeof(Shared) + kTileTokens * sizeof(int64_t) +
      sizeof(float) * kHeads * (kTileTokens + params.head_dim + params.value_dim);
  const unsigned items = static_cast<unsigned>(params.batch) * params.num_kv_heads;
  decode_kernel<T><<<items, kThreads, shared_bytes, stream>>>(params, workspace);
  return cudaGetLastError();
}

}  // namespace art::cuda::portable
