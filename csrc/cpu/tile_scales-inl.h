// Scales of int8 caches in a tile. Included by each SIMD target inside its own namespace, before
// decode_attention-inl.h.

namespace {

// What the rows of a tile are multiplied by: nothing, except in an int8 cache. The keys' scales
// then multiply logits and the values' probabilities, so that rows are used as the codes they are.
template <class T>
struct TileScales {
  // Of one token, and of those after it in a page.
  struct Cursor {
    Cursor(const DecodeParams&, int64_t, int64_t, int32_t) {}
    void advance() {}
    void prefetch() const {}
  };
  void set(int32_t, const Cursor&) {}
  void set_key(int32_t, const Cursor&) {}
  void pad(int32_t) {}
  void multiply_logits(int32_t, float*) const {}
  void multiply_probabilities(int32_t, float*) const {}
};

template <>
struct TileScales<int8_t> {
  struct Cursor {
    const float* key;
    const float* value;
    int64_t key_stride, value_stride;

    ART_INLINE Cursor(const DecodeParams& params, int64_t page, int64_t offset, int32_t head)
        : key(params.key_scale.at(page, offset, head)),
          value(params.value_scale.at(page, offset, head)),
          key_stride(params.key_scale.token_stride),
          value_stride(params.value_scale.token_stride) {}
    ART_INLINE void advance() {
      key += key_stride;
      value += value_stride;
    }
    ART_INLINE void prefetch() const {
      __builtin_prefetch(key);
      __builtin_prefetch(value);
    }
  };
  float keys[kScoreStride];
  float values[kScoreStride];

  ART_INLINE void set(int32_t i, const Cursor& from) {
    keys[i] = *from.key;
    values[i] = *from.value;
  }
  ART_INLINE void set_key(int32_t i, const Cursor& from) { keys[i] = *from.key; }
  // With what leaves the zeros of padding as they are.
  void pad(int32_t num_tokens) {
    for (int32_t i = num_tokens; i < round_up(num_tokens, kTilePadding); ++i) {
      keys[i] = values[i] = 0.0f;
    }
  }
  void multiply_logits(int32_t num_tokens, float* scores) const {
    multiply(keys, num_tokens, scores);
  }
  void multiply_probabilities(int32_t num_tokens, float* scores) const {
    multiply(values, num_tokens, scores);
  }

 private:
  ART_INLINE static void multiply(const float* by, int32_t num_tokens, float* scores) {
    for (int32_t t = 0; t < num_tokens; t += kLanes) {
      store(scores + t, load(scores + t) * load(by + t));
    }
  }
};

}  // namespace
