// What a tile of keys and values is multiplied by: queries give logits, probabilities give weighted
// sums of values. Included by each target inside its own namespace, after tiles-inl.h.

namespace {

ART_INLINE int32_t padded(int32_t dim) { return round_up(dim, kRowAlignment); }

template <int N>
struct Count {
  static constexpr int kCount = N;
};

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
  ART_INLINE static Keys load_queries(const Query* from) { return load(from); }
  ART_INLINE static VecF add(VecF sum, Keys keys, Keys queries) { return sum + keys * queries; }
};

// How values are summed: as floats, by float probabilities, a row at a time. Specialised like Dot.
template <class T>
struct Weighing {
  static constexpr int kRows = 1;     // rows that one instruction takes
  static constexpr int kVectors = 1;  // of sums, in a chunk of a row
  using Weight = float;
  using Values = VecF;

  // Turns probabilities into weights; returns what they weigh.
  ART_INLINE static VecF set_weights(VecF p, float* to) {
    store(to, p);
    return p;
  }
  ART_INLINE static VecF load_weights(const float* from) { return broadcast(*from); }
  ART_INLINE static Values load_values(const T* const* rows, int32_t d) {
    return load(rows[0] + d);
  }
  ART_INLINE static Values load_rest(const T* const* rows, int32_t d, int32_t) {
    return load_half(rows[0] + d);
  }
  ART_INLINE static void add(VecF* sums, Values values, VecF weight) { *sums += values * weight; }
  ART_INLINE static void store_sums(const VecF* sums, int32_t, float* to) { store(to, *sums); }
};

// scores[h, t] = <query h, key t>, for kHeads heads and num_tokens tokens, rounded up to whole
// vectors. One transposed addition finishes kLanes sums; those of kSide keys run at a time. With
// kFetch, as many lines are fetched as are read.
template <class T, int kHeads, bool kFetch>
ART_INLINE void score_heads(const T* const* keys, int32_t num_tokens, int32_t head_dim, float scale,
                            const typename Dot<T>::Query* query, Fetcher& next, float* scores) {
  constexpr int kSlots = kHeads == 3 ? 4 : kHeads;
  constexpr int kTokens = kLanes / kSlots, kWidth = Dot<T>::kWidth;
  constexpr int kSide = kTokens > 8 ? 8 : kTokens;  // keys side by side: an address each
  const int32_t row = Dot<T>::row(head_dim);
  const int32_t whole = head_dim / kWidth * kWidth;
  for (int32_t t0 = 0; t0 < num_tokens; t0 += kTokens) {
    VecF sums[kLanes] = {};
    const auto add_keys = [&](auto first) ART_ALWAYS_INLINE {
      constexpr int kFirst = decltype(first)::kCount;
      const auto add_chunk = [&](int32_t d, auto load_chunk) ART_ALWAYS_INLINE {
        if constexpr (kFetch) {
          next.template fetch<kSide * kWidth* int{sizeof(T)}>(d / kWidth);
        }
        typename Dot<T>::Keys queries[kHeads];
#pragma GCC unroll 16
        for (int h = 0; h < kHeads; ++h) queries[h] = Dot<T>::load_queries(query + h * row + d);
#pragma GCC unroll 16
        for (int t = kFirst; t < kFirst + kSide; ++t) {
          const typename Dot<T>::Keys chunk = load_chunk(keys[t0 + t] + d);
#pragma GCC unroll 16
          for (int h = 0; h < kHeads; ++h) {
            VecF& sum = sums[h * kTokens + t];
            sum = Dot<T>::add(sum, chunk, queries[h]);
          }
        }
      };
      for (int32_t d = 0; d < whole; d += kWidth) {
        add_chunk(d, [](const T* from) ART_ALWAYS_INLINE { return Dot<T>::load_keys(from); });
      }
      if (whole < head_dim) {
        const int32_t count = head_dim - whole;
        add_chunk(whole, [count](const T* from)
                             ART_ALWAYS_INLINE { return Dot<T>::load_rest(from, count); });
      }
    };
    add_keys(Count<0>());
    if constexpr (kSide < kTokens) add_keys(Count<kSide>());
    VecF result = transpose_add(sums);
    if constexpr (!Dot<T>::kScaled) result *= scale;
#pragma GCC unroll 16
    for (int h = 0; h < kHeads; ++h) {
      __builtin_memcpy(scores + h * kScoreStride + t0,
                       reinterpret_cast<const char*>(&result) + h * kTokens * sizeof(float),
                       kTokens * sizeof(float));
    }
  }
}

// Weights and sums of kHeads heads.
template <class T>
struct WeighedHeads {
  const typename Weighing<T>::Weight* weights;
  int32_t weight_stride;
  float* sums;
  int32_t sum_stride;
};

// sums[h, d] = sum over rows t of weights[h, t] * value t, for kHeads heads and kChunks chunks of
// the rows from d on. `count`: elements wanted of a chunk; kRest: there are no more to load.
template <class T, int kHeads, int kChunks, bool kFetch, bool kRest>
ART_INLINE void weigh_chunks(const T* const* rows, int32_t num_rows, int32_t d, int32_t count,
                             const WeighedHeads<T>& heads, Fetcher& next) {
  using W = Weighing<T>;
  constexpr int kWidth = W::kVectors * kLanes;
  VecF sums[kHeads][kChunks * W::kVectors] = {};
  for (int32_t t = 0; t < num_rows; t += W::kRows) {
    if constexpr (kFetch) {
      next.template fetch<kChunks * kWidth * W::kRows* int{sizeof(T)}>(t / W::kRows);
    }
    typename W::Values values[kChunks];
#pragma GCC unroll 16
    for (int c = 0; c < kChunks; ++c) {
      const int32_t from = d + c * kWidth;
      values[c] = kRest ? W::load_rest(rows + t, from, count) : W::load_values(rows + t, from);
    }
#pragma GCC unroll 16
    for (int h = 0; h < kHeads; ++h) {
      const auto weight = W::load_weights(heads.weights + h * heads.weight_stride + t);
#pragma GCC unroll 16
      for (int c = 0; c < kChunks; ++c) W::add(sums[h] + c * W::kVectors, values[c], weight);
    }
  }
#pragma GCC unroll 16
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 16
    for (int c = 0; c < kChunks; ++c) {
      W::store_sums(sums[h] + c * W::kVectors, count,
                    heads.sums + h * heads.sum_stride + d + c * kWidth);
    }
  }
}

// All chunks of the rows, from d on, most of them kChunks at a time.
template <class T, int kHeads, int kChunks, bool kFetch>
ART_INLINE void weigh_heads(const T* const* rows, int32_t num_rows, int32_t dim, int32_t d,
                            const WeighedHeads<T>& heads, Fetcher& next) {
  constexpr int kWidth = Weighing<T>::kVectors * kLanes;
  for (; d + kChunks * kWidth <= dim; d += kChunks * kWidth) {
    weigh_chunks<T, kHeads, kChunks, kFetch, false>(rows, num_rows, d, kWidth, heads, next);
  }
  if constexpr (kChunks > 1) {
    weigh_heads<T, kHeads, kChunks / 2, kFetch>(rows, num_rows, dim, d, heads, next);
  } else if (d < dim) {
    weigh_chunks<T, kHeads, 1, kFetch, true>(rows, num_rows, d, dim - d, heads, next);
  }
}

// Chunks of a row that are weighed together: as many sums as fit into the registers, together with
// what is added to them.
template <class T>
constexpr int chunks_at_once(int32_t heads) {
  constexpr int kSums = (kLanes == 16 ? 16 : 8) / Weighing<T>::kVectors;
  return heads >= 3 ? kSums / 4 : kSums / 2;
}

// Logits where the token dimension is contiguous: rows are dimensions then, weighed by the elements
// of queries. `buffer`: as many elements as a chunk has, for each dimension.
template <class T, int kHeads, bool kFetch>
ART_INLINE void score_columns(const Columns<T>& columns, int64_t dim_stride, int32_t head_dim,
                              const WeighedHeads<T>& heads, Fetcher& next, T* buffer) {
  constexpr int kWidth = Weighing<T>::kVectors * kLanes;
  constexpr int kMost = kTileTokens / kWidth, kFit = chunks_at_once<T>(kHeads);
  constexpr int kChunks = kFit < kMost ? kFit : kMost;
  const T* rows[kMaxHeadDim];
  for (int32_t d = 0; d < head_dim; ++d) rows[d] = columns.keys + d * dim_stride;
  const int32_t whole = columns.count / kWidth * kWidth, rest = columns.count - whole;
  weigh_heads<T, kHeads, kChunks, kFetch>(rows, head_dim, whole, 0, heads, next);
  if (rest == 0) return;
  if (columns.room >= whole + kWidth) {
    weigh_chunks<T, kHeads, 1, kFetch, false>(rows, head_dim, whole, rest, heads, next);
    return;
  }
  // What follows the page is not ours to read.
  for (int32_t d = 0; d < head_dim; ++d) {
    T* row = buffer + d * kWidth;
    __builtin_memset(row, 0, sizeof(T) * kWidth);
    __builtin_memcpy(row, rows[d] + whole, sizeof(T) * rest);
    rows[d] = row - whole;
  }
  weigh_chunks<T, kHeads, 1, false, false>(rows, head_dim, whole, rest, heads, next);
}

}  // namespace
