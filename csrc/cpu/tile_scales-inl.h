// Scales of int8 caches in a tile. Included by each SIMD target inside its own namespace, before
// tiles-inl.h.

namespace {

// What the rows of a tile are multiplied by: nothing, except in an int8 cache. The keys' scales
// then multiply logits and the values' probabilities, so that rows are used as the codes they are.
template <class T>
struct TileScales {
  void add(const DecodeParams&, int32_t, int64_t, int32_t, int32_t, int32_t) {}
  void read(int32_t) {}
  void read_keys(int32_t) {}
  void multiply_logits(int32_t, float*) const {}
  void multiply_probabilities(int32_t, float*) const {}
};

template <>
struct TileScales<int8_t> {
  const float* key_at[kTileTokens];
  const float* value_at[kTileTokens];
  float keys[kScoreStride];
  float values[kScoreStride];

  // Those of tokens side by side in a page, as tokens `first` on. Only fetched ahead: a tile is
  // filled while the one before is still to be computed.
  ART_INLINE void add(const DecodeParams& params, int32_t first, int64_t page, int32_t offset,
                      int32_t head, int32_t count) {
    const float* key = params.key_scale.at(page, offset, head);
    const float* value = params.value_scale.at(page, offset, head);
    for (int32_t i = 0; i < count; ++i) {
      key_at[first + i] = key + i * params.key_scale.token_stride;
      value_at[first + i] = value + i * params.value_scale.token_stride;
      __builtin_prefetch(key_at[first + i]);
      __builtin_prefetch(value_at[first + i]);
    }
  }
  void read(int32_t num_tokens) {
    read_keys(num_tokens);
    read_from(value_at, num_tokens, values);
  }
  void read_keys(int32_t num_tokens) { read_from(key_at, num_tokens, keys); }
  void multiply_logits(int32_t num_tokens, float* scores) const {
    multiply(keys, num_tokens, scores);
  }
  void multiply_probabilities(int32_t num_tokens, float* scores) const {
    multiply(values, num_tokens, scores);
  }

 private:
  // With what leaves the zeros of padding as they are.
  static void read_from(const float* const* at, int32_t num_tokens, float* scales) {
    for (int32_t i = 0; i < num_tokens; ++i) scales[i] = *at[i];
    for (int32_t i = num_tokens; i < round_up(num_tokens, kTilePadding); ++i) scales[i] = 0.0f;
  }
  ART_INLINE static void multiply(const float* by, int32_t num_tokens, float* scores) {
    for (int32_t t = 0; t < num_tokens; t += kLanes) {
      store(scores + t, load(scores + t) * load(by + t));
    }
  }
};

}  // namespace
