// Scores of key codes by dot products of bytes (AVX512-VNNI): 64 products of a code and a digit an
// instruction. Included after integer_codes-inl.h; the same interface as score_codes-inl.h, which
// it stands in for.

namespace {

struct ScoringState {};

// Scores of kUnits units for kHeads heads: enough sums at a time to hide the latency of each.
template <int kHeads, int kUnits>
ART_INLINE void score_heads_of(const CodeLayout& layout, const uint8_t* arranged,
                               const float* scaled, const IntegerHead* heads, float* scores) {
  const int32_t fields = padded_fields(layout), steps = layout.steps;
  __m512i sums[kUnits][kHeads][kDigits] = {};
#pragma GCC unroll 4
  for (int place = 0; place < kPlaces; ++place) {
    for (int32_t step = 0; step < steps; ++step) {
      __m512i codes[kUnits];
#pragma GCC unroll 4
      for (int u = 0; u < kUnits; ++u) {
        const Words four = load_raw<Words>(arranged + (u * steps + step) * 64);
        codes[u] = (__m512i)((Bytes)(four >> 2 * place) & kMaxCode);
      }
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) {
        const float* digits = scaled + (h * kPlaces + place) * fields + 4 * step;
#pragma GCC unroll 3
        for (int d = 0; d < kDigits; ++d) {
          const __m512i digit = _mm512_set1_epi32(load_raw<int32_t>(digits + d));
#pragma GCC unroll 4
          for (int u = 0; u < kUnits; ++u) {
            sums[u][h][d] = _mm512_dpbusd_epi32(sums[u][h][d], codes[u], digit);
          }
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnits; ++u) {
      const __m512i* of_head = sums[u][h];
      store_scores(heads[h], (VecI)of_head[0], (VecI)of_head[1], (VecI)of_head[2],
                   scores + h * kScoreStride + u * kUnitTokens);
    }
  }
}

template <int kHeads>
void score_heads_of_group(const CodeLayout& layout, const uint8_t* arranged, const uint8_t* next,
                          const float* scaled, const IntegerHead* heads, float* scores) {
  constexpr int kUnits = kHeads < kGroupUnits ? kGroupUnits / kHeads : 1;
  for (int32_t unit = 0; unit < kGroupUnits; unit += kUnits) {
    if (next != nullptr) prefetch_record(layout, next, unit / kUnits, kGroupUnits / kUnits);
    score_heads_of<kHeads, kUnits>(layout, arranged + unit * layout.steps * 64, scaled, heads,
                                   scores + unit * kUnitTokens);
  }
}

// Scores of one group for all heads, [group_size, kScoreStride]. `next` is a record to fetch.
void score_group(const DecodeParams& params, const CodeLayout& layout, const uint8_t* record,
                 const uint8_t* next, GuidedScratch& scratch) {
  alignas(64) uint8_t arranged[kGroupTokens * kMaxCodeChannels / kPlaces];
  arrange_codes(layout, record, arranged);
  const CodeGrids grids(layout, record);
  const int32_t stride = kPlaces * padded_fields(layout);
  for (int32_t g = 0; g < params.group_size; g += kHeadsPerPass, next = nullptr) {
    const int32_t left = params.group_size - g;
    IntegerHead heads[kHeadsPerPass];
    float* scaled = scratch.scaled + g * stride;
    for (int32_t h = 0; h < left && h < kHeadsPerPass; ++h) {
      heads[h] =
          scale_head(layout, grids, scratch.code_query + (g + h) * stride, scaled + h * stride);
    }
    float* scores = scratch.tile.scores + g * kScoreStride;
    switch (left) {
      case 1:
        score_heads_of_group<1>(layout, arranged, next, scaled, heads, scores);
        break;
      case 2:
        score_heads_of_group<2>(layout, arranged, next, scaled, heads, scores);
        break;
      case 3:
        score_heads_of_group<3>(layout, arranged, next, scaled, heads, scores);
        break;
      default:
        score_heads_of_group<4>(layout, arranged, next, scaled, heads, scores);
    }
  }
}

}  // namespace
