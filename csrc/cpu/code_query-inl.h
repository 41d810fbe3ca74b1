// Queries in the order of key codes, and the grid of a group. Included by each SIMD target inside
// its own namespace, after decode_attention-inl.h.

namespace {

// Fields of a line in whole vectors. What is read beyond a line meets zeros of the query.
ART_INLINE int32_t padded_fields(const CodeLayout& layout) {
  return round_up(4 * layout.steps, kRowAlignment);
}

void order_query(const DecodeParams& params, const CodeLayout& layout, const float* query,
                 float* ordered, float* scaled) {
  const int32_t row = padded(params.head_dim), fields = padded_fields(layout);
  const int32_t heads = round_up(params.group_size, kHeadsPerPass);
  __builtin_memset(ordered, 0, sizeof(float) * heads * kPlaces * fields);
  // Rows without a head are computed with as well, and what lies there may be denormal: many times
  // slower.
  __builtin_memset(scaled, 0, sizeof(float) * heads * kPlaces * fields);
  for (int32_t g = 0; g < params.group_size; ++g) {
    for (int32_t d = 0; d < params.head_dim; ++d) {
      const int32_t position = layout.position(d), line = 4 * layout.steps;
      ordered[(g * kPlaces + position / line) * fields + position % line] = query[g * row + d];
    }
  }
}

// Scales and zeros of a group, and room after them for whole vectors.
struct CodeGrids {
  float scales[kMaxCodeChannels + kRowAlignment];  // [place, fields of a line]
  float zeros[kMaxCodeChannels + kRowAlignment];

  CodeGrids(const CodeLayout& layout, const uint8_t* record) {
    convert(layout, record + layout.scales_at(), scales);
    convert(layout, record + layout.zeros_at(), zeros);
  }

 private:
  static void convert(const CodeLayout& layout, const uint8_t* from, float* to) {
    const Float16* halves = reinterpret_cast<const Float16*>(from);
    for (int32_t i = 0; i < layout.channels(); i += kLanes) store(to + i, load(halves + i));
    // Vectors that begin at a place reach beyond the last one, where queries are zero.
    __builtin_memset(to + layout.channels(), 0, sizeof(float) * kRowAlignment);
  }
};

// Part `part` of `parts` of a record that will be needed soon. A little at a time: a burst fills
// the buffers of what is on its way, and everything waits.
ART_INLINE void prefetch_record(const CodeLayout& layout, const uint8_t* record, int32_t part,
                                int32_t parts) {
  const int32_t begin = layout.record_bytes() * part / parts;
  const int32_t end = layout.record_bytes() * (part + 1) / parts;
  for (int32_t at = begin; at < end; at += 64) __builtin_prefetch(record + at, 0, 2);
}

}  // namespace
