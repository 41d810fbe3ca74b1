// Decode attention over one step of a walk, for one KV head and all its query heads: every key and
// value is loaded once for the whole group. The only CPU implementation of the algorithm; included
// by each SIMD target inside its own namespace, after simd-inl.h.

namespace {

// Rows of one tile: only visible tokens, so nothing has to be masked and no other memory is read.
template <class T>
struct Tile {
  const T* keys[kScoreStride];
  const T* values[kScoreStride];
  int32_t positions[kTileTokens];
  int32_t num_tokens = 0;
  const T* next_keys[kTileTokens];  // of the tile after it, as far as known
  int32_t num_next_keys = 0;
  TileScales<T> scales;

  // Whole vectors of rows are computed; the repeated rows get no weight.
  void pad() {
    for (int32_t i = num_tokens; i < round_up(num_tokens, kTilePadding); ++i) {
      keys[i] = keys[num_tokens - 1];
      values[i] = values[num_tokens - 1];
    }
    scales.pad(num_tokens);
  }
};

ART_INLINE int32_t padded(int32_t dim) { return round_up(dim, kRowAlignment); }

// Elements of a row of values that are ever written; those from here to padded() are not.
ART_INLINE int32_t whole_vectors(int32_t dim) { return round_up(dim, kLanes); }

// How logits are summed: keys, as floats, by scaled queries. A target with instructions for it says
// more about an element type in a specialisation.
template <class T>
struct Dot {
  static constexpr int kWidth = kLanes;  // elements at a time
  static constexpr bool kScaled = true;
  using Query = float;
  using Keys = VecF;

  static int32_t row(int32_t head_dim) { return padded(head_dim); }
  static const Query* queries(const Scratch& scratch) { return scratch.query; }
  static void load_query(const DecodeParams&, const T*, int32_t, Scratch&) {}

  ART_INLINE static Keys load_keys(const T* from) { return load(from); }
  ART_INLINE static Keys load_rest(const T* from, int32_t) { return load_half(from); }
  ART_INLINE static VecF add(VecF sum, Keys keys, const Query* query) {
    return sum + keys * load(query);
  }
};
template <class T, class Query>
void load_query_as(const DecodeParams& params, const Item& item, Scratch& scratch) {
  const int32_t row = padded(params.head_dim);
  const int32_t rows = round_up(params.group_size, kHeadsPerPass);
  __builtin_memset(scratch.query, 0, sizeof(float) * rows * row);
  for (int32_t g = 0; g < params.group_size; ++g) {
    const int64_t head = int64_t{item.kv_head} * params.group_size + g;
    const Query* from = static_cast<const Query*>(params.query) +
                        item.batch * params.query_batch_stride + head * params.query_head_stride;
    for (int32_t d = 0; d < params.head_dim; d += 8) {
      const auto eight = load_n<8>(from + d) * params.scale;
      __builtin_memcpy(scratch.query + g * row + d, &eight, sizeof(eight));
    }
    if constexpr (__is_same(T, Query)) Dot<T>::load_query(params, from, g, scratch);
  }
}

// Calls run(Query()) with the type of query and out of a cache of T.
template <class T, class Run>
ART_INLINE void with_query_type(const DecodeParams& params, const Run& run) {
  if constexpr (__is_same(T, int8_t)) {
    switch (params.query_dtype) {
      case DType::kFloat32:
        return run(float());
      case DType::kFloat16:
        return run(Float16());
      default:
        return run(BFloat16());
    }
  } else {
    run(T());
  }
}

template <class T>
void load_query(const DecodeParams& params, const Item& item, Scratch& scratch) {
  with_query_type<T>(params,
                     [&](auto query) { load_query_as<T, decltype(query)>(params, item, scratch); });
}

// Keys whose token dimension is contiguous become rows: correct, not fast.
template <class T>
void copy_keys(const DecodeParams& params, Tile<T>& tile, T* rows) {
  for (int32_t i = 0; i < tile.num_tokens; ++i) {
    T* row = rows + int64_t{i} * params.head_dim;
    for (int32_t d = 0; d < params.head_dim; ++d) row[d] = tile.keys[i][d * params.key.dim_stride];
    tile.keys[i] = row;
  }
}

// Rows that will be needed soon, in memory order. To the second-level cache: a tile of keys and
// one of values may fill the first.
template <class T>
ART_INLINE void prefetch_rows(const T* const* rows, int32_t num_rows, int32_t dim) {
  constexpr int32_t kLine = 64 / sizeof(T);
  for (int32_t i = 0; i < num_rows; ++i) {
    for (int32_t d = 0; d < dim; d += kLine) __builtin_prefetch(rows[i] + d, 0, 2);
  }
}

// scores[h, t] = <query h, key t>, for kHeads heads and all tokens of the tile. kLanes sums run at
// a time, so that one transposed addition finishes them all. Each key is read from end to end
// before the next: reading several side by side halves the bandwidth.
template <class T, int kHeads>
ART_INLINE void score_heads(const Tile<T>& tile, int32_t head_dim, int32_t prefetch_dim,
                            float scale, const typename Dot<T>::Query* query, float* scores) {
  constexpr int kTokens = kLanes / kHeads, kWidth = Dot<T>::kWidth;
  const int32_t row = Dot<T>::row(head_dim);
  const int32_t whole = head_dim / kWidth * kWidth;
  for (int32_t t0 = 0; t0 < tile.num_tokens; t0 += kTokens) {
    VecF sums[kLanes] = {};
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
      prefetch_rows(tile.values + t0 + t, 1, prefetch_dim);
      const T* key = tile.keys[t0 + t];
      const auto add_chunk = [&](int32_t d, typename Dot<T>::Keys keys) ART_ALWAYS_INLINE {
#pragma GCC unroll 16
        for (int h = 0; h < kHeads; ++h) {
          VecF& sum = sums[h * kTokens + t];
          sum = Dot<T>::add(sum, keys, query + h * row + d);
        }
      };
      for (int32_t d = 0; d < whole; d += kWidth) add_chunk(d, Dot<T>::load_keys(key + d));
      if (whole < head_dim) add_chunk(whole, Dot<T>::load_rest(key + whole, head_dim - whole));
    }
    VecF result = transpose_add(sums);
    if constexpr (!Dot<T>::kScaled) result *= scale;
    for (int h = 0; h < kHeads; ++h) {
      __builtin_memcpy(scores + h * kScoreStride + t0,
                       reinterpret_cast<const char*>(&result) + h * kTokens * sizeof(float),
                       kTokens * sizeof(float));
    }
  }
}

template <class T>
void score_tile(const DecodeParams& params, const Tile<T>& tile, Scratch& scratch) {
  const int32_t row = Dot<T>::row(params.head_dim);
  for (int32_t g = 0; g < params.group_size;) {
    const int32_t left = params.group_size - g;
    const auto* query = Dot<T>::queries(scratch) + g * row;
    float* scores = scratch.scores + g * kScoreStride;
    // The values are fetched while the first heads' scores are computed.
    const int32_t prefetch_dim = g == 0 ? params.value_dim : 0;
    if (left >= 3) {  // three heads and a row of zeros beat two passes over the keys
      score_heads<T, 4>(tile, params.head_dim, prefetch_dim, params.scale, query, scores);
      g += 4;
    } else if (left == 2) {
      score_heads<T, 2>(tile, params.head_dim, prefetch_dim, params.scale, query, scores);
      g += 2;
    } else {
      score_heads<T, 1>(tile, params.head_dim, prefetch_dim, params.scale, query, scores);
      g += 1;
    }
  }
}

// Soft cap and ALiBi, in this order.
void adjust_scores(const DecodeParams& params, const Item& item, const int32_t* positions,
                   int32_t num_tokens, int32_t g, float* scores) {
  if (params.softcap > 0.0f) {
    for (int32_t t = 0; t < num_tokens; ++t) {
      scores[t] = params.softcap * __builtin_tanhf(scores[t] / params.softcap);
    }
  }
  if (params.alibi_slopes != nullptr) {
    const float slope = params.alibi_slopes[item.kv_head * params.group_size + g];
    for (int32_t t = 0; t < num_tokens; ++t) {
      scores[t] += slope * static_cast<float>(positions[t] - (item.visible.end - 1));
    }
  }
}

// Turns the scores of one head into probabilities relative to the tile's maximum.
SoftmaxState exponentiate(float* scores, int32_t num_tokens) {
  const int32_t rounded = round_up(num_tokens, kTilePadding);
  for (int32_t t = num_tokens; t < rounded; ++t) scores[t] = -__builtin_inff();
  VecF max = load(scores);
  for (int32_t t = kLanes; t < rounded; t += kLanes) {
    const VecF x = load(scores + t);
    max = x > max ? x : max;
  }
  SoftmaxState state;
  state.max = reduce_max(max);
  // We don't want (-inf) - (-inf), since that would give NaN.
  const float reference = state.max == -__builtin_inff() ? 0.0f : state.max;
  VecF sum = {};
  for (int32_t t = 0; t < rounded; t += kLanes) {
    const VecF p = exp_nonpositive(load(scores + t) - reference);
    store(scores + t, p);
    sum += p;
  }
  state.sum = reduce_add(sum);
  return state;
}

// values[g, :] (+)= sum over kRows tokens of p[g, t] * value t. Whole rows are read in order, each
// element once for all heads.
template <class T, int kRows, bool kFirst, class Prefetch>
ART_INLINE void weigh_rows(const T* const* rows, int32_t value_dim, const float* probabilities,
                           int32_t group_size, float* values, const Prefetch& prefetch) {
  const int32_t row = padded(value_dim);
  const auto add_chunk = [&](int32_t d, auto load_chunk) ART_ALWAYS_INLINE {
    prefetch(d / kLanes);
    VecF v[kRows];
#pragma GCC unroll 16
    for (int t = 0; t < kRows; ++t) v[t] = load_chunk(rows[t] + d);
    for (int32_t g = 0; g < group_size; ++g) {
      const float* p = probabilities + g * kScoreStride;
      float* out = values + g * row + d;
      VecF sum = kFirst ? VecF{} : load(out);
#pragma GCC unroll 16
      for (int t = 0; t < kRows; ++t) sum += v[t] * p[t];
      store(out, sum);
    }
  };
  const int32_t whole = value_dim / kLanes * kLanes;
  for (int32_t d = 0; d < whole; d += kLanes) {
    add_chunk(d, [](const T* from) ART_ALWAYS_INLINE { return load(from); });
  }
  if (whole < value_dim) {
    add_chunk(whole, [](const T* from) ART_ALWAYS_INLINE { return load_half(from); });
  }
}

template <class T>
void weigh_tile(const DecodeParams& params, const Tile<T>& tile, const float* probabilities,
                float* values) {
  constexpr int kRows = kLanes == 16 ? 16 : 8;
  const int32_t dim = params.value_dim, heads = params.group_size;
  // Keys are fetched while values are computed with, some rows at each chunk of values.
  const int32_t rows_at_once = (kRows * kLanes + dim - 1) / dim;
  const auto prefetch_keys = [&](int32_t begin) {
    return [&tile, &params, begin, rows_at_once](int32_t chunk) ART_ALWAYS_INLINE {
      const int32_t from = chunk * rows_at_once, to = from + rows_at_once;
      const int32_t end = begin + (to < kRows ? to : kRows);
      const int32_t last = end < tile.num_next_keys ? end : tile.num_next_keys;
      if (begin + from < last) {
        prefetch_rows(tile.next_keys + begin + from, last - begin - from, params.head_dim);
      }
    };
  };
  weigh_rows<T, kRows, true>(tile.values, dim, probabilities, heads, values, prefetch_keys(0));
  for (int32_t t = kRows; t < tile.num_tokens; t += kRows) {
    weigh_rows<T, kRows, false>(tile.values + t, dim, probabilities + t, heads, values,
                                prefetch_keys(t));
  }
}

template <class T>
void compute_tile(const DecodeParams& params, const Item& item, Tile<T>& tile, Scratch& scratch,
                  Accumulator result) {
  if (params.key.dim_stride != 1) copy_keys(params, tile, static_cast<T*>(scratch.keys));
  tile.pad();
  score_tile(params, tile, scratch);
  for (int32_t g = 0; g < params.group_size; ++g) {
    float* scores = scratch.scores + g * kScoreStride;
    tile.scales.multiply_logits(tile.num_tokens, scores);
    adjust_scores(params, item, tile.positions, tile.num_tokens, g, scores);
    result.softmax[g] = exponentiate(scores, tile.num_tokens);
    tile.scales.multiply_probabilities(tile.num_tokens, scores);
  }
  weigh_tile(params, tile, scratch.scores, result.values);
  *result.num_tokens = tile.num_tokens;
}

// running = running * factors.running + incoming * factors.incoming
ART_INLINE void add_scaled(FoldFactors factors, const float* incoming, int32_t dim,
                           float* running) {
  for (int32_t d = 0; d < dim; d += kLanes) {
    store(running + d, load(running + d) * factors.running + load(incoming + d) * factors.incoming);
  }
}

void fold_tile(const DecodeParams& params, const Accumulator& tile, Accumulator step) {
  const int32_t row = padded(params.value_dim), dim = whole_vectors(params.value_dim);
  for (int32_t g = 0; g < params.group_size; ++g) {
    const FoldFactors factors = fold(step.softmax[g], tile.softmax[g]);
    add_scaled(factors, tile.values + g * row, dim, step.values + g * row);
  }
  *step.num_tokens += *tile.num_tokens;
}

// Calls visit(token, key row, value row, scales) for the visible tokens of a step, in walk order.
template <class T, class Visit>
ART_INLINE void for_each_token(const DecodeParams& params, const Item& item, int32_t step,
                               const Visit& visit) {
  const T* keys = static_cast<const T*>(params.key.data) + item.kv_head * params.key.head_stride;
  const T* values =
      static_cast<const T*>(params.value.data) + item.kv_head * params.value.head_stride;
  const auto positions = item.steps.positions(step);
  for (int32_t i = positions.begin; i < positions.end; ++i) {
    const TokenRange tokens = unit_tokens(item.walk.unit_at(i), params.unit_size, item.visible);
    const int32_t slot = tokens.begin / params.page_size;
    const int64_t page = item.block_table[slot];
    const int64_t offset = tokens.begin - int64_t{slot} * params.page_size;
    const T* key = keys + page * params.key.page_stride + offset * params.key.token_stride;
    const T* value = values + page * params.value.page_stride + offset * params.value.token_stride;
    typename TileScales<T>::Cursor scales(params, page, offset, item.kv_head);
    for (int32_t token = tokens.begin; token < tokens.end; ++token) {
      visit(token, key, value, scales);
      scales.advance();
      key += params.key.token_stride;
      value += params.value.token_stride;
    }
  }
}

template <class T>
void compute_step(const DecodeParams& params, const Item& item, int32_t step, Scratch& scratch,
                  Accumulator result) {
  Tile<T> tile;
  bool first_tile = true;
  const auto flush = [&] {
    compute_tile(params, item, tile, scratch, first_tile ? result : scratch.tile);
    if (!first_tile) fold_tile(params, scratch.tile, result);
    first_tile = false;
    tile.num_tokens = 0;
  };
  using Scales = typename TileScales<T>::Cursor;
  for_each_token<T>(params, item, step,
                    [&](int32_t token, const T* key, const T* value, const Scales& scales) {
                      if (tile.num_tokens == kTileTokens) flush();
                      tile.scales.set(tile.num_tokens, scales);
                      tile.keys[tile.num_tokens] = key;
                      tile.values[tile.num_tokens] = value;
                      tile.positions[tile.num_tokens++] = token;
                    });
  if (step + 1 < item.steps.num_steps && params.key.dim_stride == 1) {
    for_each_token<T>(params, item, step + 1,
                      [&](int32_t, const T* key, const T*, const Scales& scales) {
                        scales.prefetch();
                        if (tile.num_next_keys < kTileTokens)
                          tile.next_keys[tile.num_next_keys++] = key;
                      });
  }
  flush();
}

// Both vectors are multiplied by `scale`, a power of two.
ART_INLINE IncrementMoments moments_of(const FoldFactors& factors, const IncrementWeights& weights,
                                       const float* running, const float* incoming, int32_t dim,
                                       float scale) {
  const float before = factors.running * scale, block = factors.incoming * weights.keep * scale;
  VecF aa = {}, ad = {}, dd = {};
  for (int32_t i = 0; i < dim; i += kLanes) {
    const VecF a = load(running + i) * before;
    const VecF d = load(incoming + i) * block - a * weights.share;
    aa += a * a;
    ad += a * d;
    dd += d * d;
  }
  return {reduce_add(aa), reduce_add(ad), reduce_add(dd)};
}

float largest_of(const FoldFactors& factors, const IncrementWeights& weights, const float* running,
                 const float* incoming, int32_t dim) {
  float largest = 0.0f;
  for (int32_t i = 0; i < dim; ++i) {
    const float a = running[i] * factors.running;
    const float d = incoming[i] * factors.incoming * weights.keep - a * weights.share;
    largest = std::fmax(largest, std::fmax(std::fabs(a), std::fabs(d)));
  }
  return largest;
}

bool fold_step(const DecodeParams& params, const Item& item, Accumulator step, bool compare,
               Accumulator running) {
  const int32_t row = padded(params.value_dim), dim = whole_vectors(params.value_dim);
  StabilityThresholds thresholds = {params.d_scale, params.d_direction};
  if (params.thresholds != nullptr) {
    thresholds = {params.thresholds[2 * item.kv_head], params.thresholds[2 * item.kv_head + 1]};
  }
  bool stable = true;
  for (int32_t g = 0; g < params.group_size; ++g) {
    const float* incoming = step.values + g * row;
    float* values = running.values + g * row;
    const SoftmaxState before = running.softmax[g];
    const FoldFactors factors = fold(running.softmax[g], step.softmax[g]);
    if (compare) {
      const int32_t head = item.kv_head * params.group_size + g;
      const float* sink = params.attn_sinks == nullptr ? nullptr : params.attn_sinks + head;
      const IncrementWeights weights =
          increment_weights(before, step.softmax[g], running.softmax[g], factors, sink);
      IncrementMoments moments = moments_of(factors, weights, values, incoming, dim, 1.0f);
      if (!in_range(moments)) {
        const float scale = moment_scale(largest_of(factors, weights, values, incoming, dim));
        moments = moments_of(factors, weights, values, incoming, dim, scale);
      }
      stable = stable && is_stable(output_change(moments), thresholds);
    }
    add_scaled(factors, incoming, dim, values);
  }
  *running.num_tokens += *step.num_tokens;
  return stable;
}

template <class Out>
void write_output_as(const DecodeParams& params, const Item& item, Accumulator running) {
  const int32_t row = padded(params.value_dim);
  for (int32_t g = 0; g < params.group_size; ++g) {
    const int64_t head = int64_t{item.kv_head} * params.group_size + g;
    const int64_t index = item.batch * int64_t{params.num_q_heads} + head;
    const SoftmaxState& state = running.softmax[g];
    const float* sink = params.attn_sinks == nullptr ? nullptr : params.attn_sinks + head;
    const float denominator = state.sum + sink_mass(state, sink);
    Out* out = static_cast<Out*>(params.out) + index * params.value_dim;
    for (int32_t d = 0; d < params.value_dim; ++d) {
      // Nothing read leaves 0 / 0, which is defined as zero.
      const float value = state.sum == 0.0f ? 0.0f : running.values[g * row + d] / denominator;
      store_one(out + d, value);
    }
    params.lse[index] = log_sum_exp(state);
  }
}

template <class T>
void write_output(const DecodeParams& params, const Item& item, Accumulator running) {
  with_query_type<T>(params,
                     [&](auto out) { write_output_as<decltype(out)>(params, item, running); });
}

}  // namespace
