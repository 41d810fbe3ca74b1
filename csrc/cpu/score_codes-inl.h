// Scores of key codes in float32. Included by a SIMD target inside its own namespace, after
// code_query-inl.h; another file may stand in for it that offers ScoringState and
// score_group().
//
// A code c stands for zero + scale * c. With the bits of c right below the exponent of 1.0 it reads
// 1 + c / 4, without a conversion; so <q, key> = <q, zero - 4 scale> + <q * 4 scale, 1 + c / 4>:
// one dot product a group, and one a token with numbers that a shift and a mask make. 16-bit fields
// of a line hold four channels of token t and four of t + 8; with queries in the same order,
// neighbouring fields are neighbouring vector lanes.

namespace {

// What has to be set up while scores are computed.
struct ScoringState {};

// Multiplies queries by the scales of a group. Also gives the part of all scores that the codes
// have no influence on.
void scale_query(const CodeLayout& layout, const CodeGrids& grids, int32_t num_heads,
                 const float* query, float* scaled, float* offsets) {
  const int32_t line = 4 * layout.steps, fields = padded_fields(layout);
  for (int32_t h = 0; h < num_heads; ++h) {
    VecF sum = {};
    for (int32_t place = 0; place < kPlaces; ++place) {
      const int32_t at = (h * kPlaces + place) * fields;
      for (int32_t i = 0; i < line; i += kLanes) {
        const VecF q = load(query + at + i);
        const VecF scale = load(grids.scales + place * line + i) * 4.0f;
        store(scaled + at + i, q * scale);
        sum += q * (load(grids.zeros + place * line + i) - scale);
      }
    }
    offsets[h] = reduce_add(sum);
  }
}

// Scores of all tokens of a unit for kHeads heads. At least kLanes sums run at a time, so that one
// transposed addition finishes as many.
template <int kHeads>
ART_INLINE void score_unit(const CodeLayout& layout, const uint8_t* unit, const float* scaled,
                           const float* offsets, float* scores) {
  constexpr int kSums = 2 * kHeads > kLanes ? 2 * kHeads : kLanes;
  constexpr int kLines = kSums / kHeads / 2;
  const int32_t line = 4 * layout.steps, fields = padded_fields(layout);
  for (int32_t first = 0; first < kUnitTokens / 2; first += kLines) {
    VecF sums[kSums / kLanes][kLanes] = {};  // [kHeads][t or t + 8][kLines]
    for (int32_t i = 0; i < line; i += kLanes) {
      VecU field[kLines];
#pragma GCC unroll 16
      for (int l = 0; l < kLines; ++l) {
        const uint8_t* from = unit + (first + l) * layout.line_bytes() + 2 * i;
        field[l] = load_words<kLanes>(from);
      }
#pragma GCC unroll 4
      for (int place = 0; place < kPlaces; ++place) {
        VecF query[kHeads];
#pragma GCC unroll 16
        for (int h = 0; h < kHeads; ++h) {
          query[h] = load(scaled + (h * kPlaces + place) * fields + i);
        }
#pragma GCC unroll 16
        for (int t = 0; t < 2 * kLines; ++t) {
          const VecU code = field[t % kLines] << (21 - 2 * place - t / kLines * 8);
          const VecF number = bit_cast<VecF>((code & 0x00600000) | 0x3f800000);
#pragma GCC unroll 16
          for (int h = 0; h < kHeads; ++h) {
            const int at = h * 2 * kLines + t;
            sums[at / kLanes][at % kLanes] += number * query[h];
          }
        }
      }
    }
    float results[kSums];
#pragma GCC unroll 16
    for (int i = 0; i < kSums / kLanes; ++i) store(results + i * kLanes, transpose_add(sums[i]));
    for (int h = 0; h < kHeads; ++h) {
      for (int t = 0; t < 2 * kLines; ++t) {
        scores[h * kScoreStride + t / kLines * 8 + first + t % kLines] =
            results[h * 2 * kLines + t] + offsets[h];
      }
    }
  }
}

// Scores of one group for all heads, [group_size, kScoreStride]. `next` is a record to fetch.
void score_group(const DecodeParams& params, const CodeLayout& layout, const uint8_t* record,
                 const uint8_t* next, GuidedScratch& scratch) {
  const int32_t stride = kPlaces * padded_fields(layout);
  const CodeGrids grids(layout, record);
  for (int32_t g = 0; g < params.group_size; g += kHeadsPerPass) {
    const int32_t left = params.group_size - g;
    float offsets[kHeadsPerPass] = {};
    float* scaled = scratch.scaled + g * stride;
    scale_query(layout, grids, left < kHeadsPerPass ? left : kHeadsPerPass,
                scratch.code_query + g * stride, scaled, offsets);
    for (int32_t unit = 0; unit < kGroupUnits; ++unit) {
      if (g == 0) prefetch_record(layout, next, unit, kGroupUnits);
      const uint8_t* codes = record + unit * layout.unit_bytes();
      float* scores = scratch.tile.scores + g * kScoreStride + unit * kUnitTokens;
      if (left == 1) {
        score_unit<1>(layout, codes, scaled, offsets, scores);
      } else if (left == 2) {
        score_unit<2>(layout, codes, scaled, offsets, scores);
      } else {  // a row of zeros beats two passes over the codes
        score_unit<kHeadsPerPass>(layout, codes, scaled, offsets, scores);
      }
    }
  }
}

}  // namespace
