// Decode attention over one step of a walk, for one KV head and all its query heads: every key and
// value is loaded once for the whole group. The only CPU implementation of the algorithm; included
// by each SIMD target inside its own namespace, after its products.

namespace {

// Elements of a row of values that are ever written; those from here to padded() are not.
ART_INLINE int32_t whole_vectors(int32_t dim) { return round_up(dim, kLanes); }

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

// Calls run(first head, Count of heads) for those of a group that share one load of a row.
template <class Run>
ART_INLINE void for_each_pass(int32_t group_size, const Run& run) {
  for (int32_t g = 0; g < group_size; g += kHeadsPerPass) {
    const int32_t left = group_size - g;
    if (left >= 4) {
      run(g, Count<4>());
    } else if (left == 3) {
      run(g, Count<3>());
    } else if (left == 2) {
      run(g, Count<2>());
    } else {
      run(g, Count<1>());
    }
  }
}

template <class T, int kHeads>
void score_columns_of(const DecodeParams& params, const Tile<T>& tile, int32_t g, Scratch& scratch,
                      Fetcher& next) {
  const int32_t row = Dot<T>::row(params.head_dim);
  float* scores = scratch.scores + g * kScoreStride;
  WeighedHeads<T> heads = {Dot<T>::queries(scratch) + g * row, row, scores, kScoreStride};
  T* buffer = static_cast<T*>(scratch.keys);
  for (int32_t i = 0; i < tile.num_columns; ++i) {
    const Columns<T>& columns = tile.columns[i];
    if (g == 0) {
      score_columns<T, kHeads, true>(columns, params.key.dim_stride, params.head_dim, heads, next,
                                     buffer);
    } else {
      score_columns<T, kHeads, false>(columns, params.key.dim_stride, params.head_dim, heads, next,
                                      buffer);
    }
    heads.sums += columns.count;
  }
  if constexpr (!Dot<T>::kScaled) {
    for (int32_t t = 0; t < kHeads * kScoreStride; t += kLanes) {
      store(scores + t, load(scores + t) * params.scale);
    }
  }
}

template <class T>
void score_tile(const DecodeParams& params, const Tile<T>& tile, Scratch& scratch, Fetcher& next) {
  const int32_t row = Dot<T>::row(params.head_dim);
  for_each_pass(params.group_size, [&](int32_t g, auto heads) ART_ALWAYS_INLINE {
    constexpr int kHeads = decltype(heads)::kCount;
    const auto* query = Dot<T>::queries(scratch) + g * row;
    float* scores = scratch.scores + g * kScoreStride;
    if (tile.num_columns > 0) return score_columns_of<T, kHeads>(params, tile, g, scratch, next);
    if (g == 0) {
      score_heads<T, kHeads, true>(tile.keys, tile.num_tokens, params.head_dim, params.scale, query,
                                   next, scores);
    } else {
      score_heads<T, kHeads, false>(tile.keys, tile.num_tokens, params.head_dim, params.scale,
                                    query, next, scores);
    }
  });
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

// Turns the scores of kHeads heads into weights relative to the tile's maximum, in their place.
// The heads go side by side, for each is a chain of operations that wait for one another.
template <class T, int kHeads>
ART_INLINE void exponentiate(float* scores, int32_t num_tokens, SoftmaxState* states) {
  const int32_t rounded = round_up(num_tokens, kTilePadding);
  VecF max[kHeads], sum[kHeads] = {};
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) {
    float* row = scores + h * kScoreStride;
    for (int32_t t = num_tokens; t < rounded; ++t) row[t] = -__builtin_inff();
    max[h] = load(row);
  }
  for (int32_t t = kLanes; t < rounded; t += kLanes) {
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) max[h] = larger(load(scores + h * kScoreStride + t), max[h]);
  }
  float reference[kHeads];
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) {
    states[h].max = reduce_max(max[h]);
    // We don't want (-inf) - (-inf), since that would give NaN.
    reference[h] = states[h].max == -__builtin_inff() ? 0.0f : states[h].max;
  }
  for (int32_t t = 0; t < rounded; t += kLanes) {
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
      float* row = scores + h * kScoreStride;
      auto* weights = reinterpret_cast<typename Weighing<T>::Weight*>(row);
      const VecF p = exp_nonpositive(load(row + t) - reference[h]);
      sum[h] += Weighing<T>::set_weights(p, weights + t);
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) states[h].sum = reduce_add(sum[h]);
}

template <class T>
void weigh_tile(const DecodeParams& params, const Tile<T>& tile, const float* scores, Fetcher& next,
                float* values) {
  const int32_t rows = round_up(tile.num_tokens, Weighing<T>::kRows);
  for_each_pass(params.group_size, [&](int32_t g, auto heads) ART_ALWAYS_INLINE {
    constexpr int kHeads = decltype(heads)::kCount;
    constexpr int kChunks = chunks_at_once<T>(kHeads);
    using Weight = typename Weighing<T>::Weight;
    constexpr int kStride = kScoreStride * sizeof(float) / sizeof(Weight);
    const int32_t row = padded(params.value_dim);
    const WeighedHeads<T> weighed = {reinterpret_cast<const Weight*>(scores) + g * kStride, kStride,
                                     values + g * row, row};
    if (g == 0) {
      weigh_heads<T, kHeads, kChunks, true>(tile.values, rows, params.value_dim, 0, weighed, next);
    } else {
      weigh_heads<T, kHeads, kChunks, false>(tile.values, rows, params.value_dim, 0, weighed, next);
    }
  });
}

// Lines of a tile's keys that are fetched before it is reached: 8 KiB (measured), but more where
// values are weighed in several passes, of which the first meets the last rows early.
template <class T>
int32_t lead_of(const DecodeParams& params, const Tile<T>& tile) {
  constexpr int32_t kLead = 8192 / kLineBytes;
  const int32_t chunk = kLanes * Weighing<T>::kVectors;
  const int32_t passes =
      (params.value_dim - 1) / (chunk * chunks_at_once<T>(params.group_size)) + 1;
  const int32_t values = tile.value_runs.lines - tile.value_runs.lines / passes;
  const int32_t lead = values > kLead ? values : kLead;
  return tile.key_runs.lines < lead ? tile.key_runs.lines : lead;
}

template <class T>
void compute_tile(const DecodeParams& params, const Item& item, Tile<T>& tile, Tile<T>& next,
                  Scratch& scratch, Accumulator result) {
  tile.pad();
  tile.scales.read(tile.num_tokens);
  const Runs* const parts[] = {&tile.key_runs, &tile.value_runs, &next.key_runs};
  Fetcher fetcher(parts, lead_of(params, tile), lead_of(params, next));
  score_tile(params, tile, scratch, fetcher);
  for (int32_t g = 0; g < params.group_size; ++g) {
    float* scores = scratch.scores + g * kScoreStride;
    tile.scales.multiply_logits(tile.num_tokens, scores);
    adjust_scores(params, item, tile.positions, tile.num_tokens, g, scores);
  }
  for_each_pass(params.group_size, [&](int32_t g, auto heads) ART_ALWAYS_INLINE {
    exponentiate<T, decltype(heads)::kCount>(scratch.scores + g * kScoreStride, tile.num_tokens,
                                             result.softmax + g);
  });
  for (int32_t g = 0; g < params.group_size; ++g) {
    tile.scales.multiply_probabilities(tile.num_tokens, scratch.scores + g * kScoreStride);
  }
  weigh_tile(params, tile, scratch.scores, fetcher, result.values);
  fetcher.finish();
  *result.num_tokens = tile.num_tokens;
}

// running = running * factors.running + incoming * factors.incoming
ART_INLINE void add_scaled(FoldFactors factors, const float* incoming, int32_t dim,
                           float* running) {
  for (int32_t d = 0; d < dim; d += kLanes) {
    store(running + d, load(running + d) * factors.running + load(incoming + d) * factors.incoming);
  }
}

// Calls visit(head, scale) for each head of a group, with what fold() wants to know: exponentials
// of as many heads as there are lanes for are taken together.
template <class Visit>
ART_INLINE void fold_heads(int32_t group_size, const SoftmaxState* incoming,
                           const SoftmaxState* running, const Visit& visit) {
  for (int32_t g0 = 0; g0 < group_size; g0 += kLanes) {
    const int32_t heads = group_size - g0 < kLanes ? group_size - g0 : kLanes;
    VecF distances = {};
    for (int32_t i = 0; i < heads; ++i) {
      distances[i] = fold_distance(running[g0 + i], incoming[g0 + i]);
    }
    const VecF scales = exp_nonpositive(distances);
    for (int32_t i = 0; i < heads; ++i) visit(g0 + i, scales[i]);
  }
}

void fold_tile(const DecodeParams& params, const Accumulator& tile, Accumulator step) {
  const int32_t row = padded(params.value_dim), dim = whole_vectors(params.value_dim);
  fold_heads(params.group_size, tile.softmax, step.softmax, [&](int32_t g, float scale) {
    const FoldFactors factors = fold(step.softmax[g], tile.softmax[g], scale);
    add_scaled(factors, tile.values + g * row, dim, step.values + g * row);
  });
  *step.num_tokens += *tile.num_tokens;
}

template <class T>
void compute_step(const DecodeParams& params, const Item& item, int32_t step, Scratch& scratch,
                  Accumulator result) {
  Tile<T> tiles[2];
  TokenCursor<T> cursor(params, item, step);
  cursor.fill(tiles[0]);
  bool more = true;
  for (int32_t i = 0; more; ++i) {
    Tile<T>& tile = tiles[i % 2];
    Tile<T>& next = tiles[(i + 1) % 2];
    more = cursor.fill(next);
    if (!more && step + 1 < item.steps.num_steps) {
      TokenCursor<T>(params, item, step + 1).fill(next);
    }
    compute_tile(params, item, tile, next, scratch, i == 0 ? result : scratch.tile);
    if (i > 0) fold_tile(params, scratch.tile, result);
  }
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
  const StabilityThresholds thresholds = thresholds_of(params, item);
  bool stable = true;
  fold_heads(params.group_size, step.softmax, running.softmax, [&](int32_t g, float scale) {
    const float* incoming = step.values + g * row;
    float* values = running.values + g * row;
    const SoftmaxState before = running.softmax[g];
    const FoldFactors factors = fold(running.softmax[g], step.softmax[g], scale);
    // One head that is not stable decides for its group.
    if (compare && stable) {
      const IncrementWeights weights = increment_weights(
          before, step.softmax[g], running.softmax[g], factors, sink_of(params, item, g));
      IncrementMoments moments = moments_of(factors, weights, values, incoming, dim, 1.0f);
      if (!in_range(moments)) {
        const float common = moment_scale(largest_of(factors, weights, values, incoming, dim));
        moments = moments_of(factors, weights, values, incoming, dim, common);
      }
      stable = is_stable(output_change(moments), thresholds);
    }
    add_scaled(factors, incoming, dim, values);
  });
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
    const float denominator = state.sum + sink_mass(state, sink_of(params, item, g));
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
