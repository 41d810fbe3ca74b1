// Log-sum-exp of units of 16 tokens, estimated from key codes, for one KV head and all its query
// heads. Included by each SIMD target inside its own namespace, after decode_attention-inl.h.
//
// A code c stands for zero + scale * c. With the bits of c right below the exponent of 1.0 it reads
// 1 + c / 4, without a conversion; so <q, key> = <q, zero - 4 scale> + <q * 4 scale, 1 + c / 4>:
// one dot product a group, and one a token with numbers that a shift and a mask make. 16-bit fields
// of a line hold four channels of token t and four of t + 8; with queries in the same order,
// neighbouring fields are neighbouring vector lanes.

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

// Multiplies queries by the scales of a group. Also gives the part of all scores that the codes
// have no influence on.
void scale_query(const CodeLayout& layout, const uint8_t* record, int32_t num_heads,
                 const float* query, float* scaled, float* offsets) {
  const int32_t line = 4 * layout.steps, fields = padded_fields(layout);
  // Whole vectors are loaded, and those after the last zero could be of foreign memory.
  Float16 grid[2 * kMaxCodeChannels + kRowAlignment] = {};
  __builtin_memcpy(grid, record + layout.scales_at(), 4 * layout.channels());
  const Float16 *scales = grid, *zeros = grid + layout.channels();
  for (int32_t h = 0; h < num_heads; ++h) {
    VecF sum = {};
    for (int32_t place = 0; place < kPlaces; ++place) {
      const int32_t at = (h * kPlaces + place) * fields;
      for (int32_t i = 0; i < line; i += kLanes) {
        const VecF q = load(query + at + i), scale = load(scales + place * line + i) * 4.0f;
        store(scaled + at + i, q * scale);
        sum += q * (load(zeros + place * line + i) - scale);
      }
    }
    offsets[h] = reduce_add(sum);
  }
}

// Scores of all tokens of a unit for kHeads heads. kLanes sums run at a time, so that one
// transposed addition finishes them all.
template <int kHeads>
ART_INLINE void score_unit(const CodeLayout& layout, const uint8_t* unit, const float* scaled,
                           const float* offsets, float* scores) {
  constexpr int kLines = kLanes / kHeads / 2;
  const int32_t line = 4 * layout.steps, fields = padded_fields(layout);
  VecF offset;
  for (int i = 0; i < kLanes; ++i) offset[i] = offsets[i / (2 * kLines)];
  for (int32_t first = 0; first < kUnitTokens / 2; first += kLines) {
    VecF sums[kLanes] = {};  // [kHeads][t or t + 8][kLines]
    for (int32_t i = 0; i < line; i += kLanes) {
      VecU field[kLines];
#pragma GCC unroll 16
      for (int l = 0; l < kLines; ++l) {
        const uint8_t* from = unit + (first + l) * layout.line_bytes() + 2 * i;
        field[l] = __builtin_convertvector(load_raw<VecOf<kLanes>::H>(from), VecU);
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
          for (int h = 0; h < kHeads; ++h) sums[h * 2 * kLines + t] += number * query[h];
        }
      }
    }
    const VecF result = transpose_add(sums) + offset;
    for (int h = 0; h < kHeads; ++h) {
      for (int half = 0; half < 2; ++half) {
        __builtin_memcpy(
            scores + h * kScoreStride + half * 8 + first,
            reinterpret_cast<const char*>(&result) + (2 * h + half) * kLines * sizeof(float),
            kLines * sizeof(float));
      }
    }
  }
}

// Scores of one group for all heads, [group_size, kScoreStride].
void score_group(const DecodeParams& params, const CodeLayout& layout, const uint8_t* record,
                 GuidedScratch& scratch) {
  constexpr int kMostHeads = kLanes / 2 < kHeadsPerPass ? kLanes / 2 : kHeadsPerPass;
  const int32_t stride = kPlaces * padded_fields(layout);
  for (int32_t g = 0; g < params.group_size; g += kHeadsPerPass) {
    const int32_t left = params.group_size - g;
    float offsets[kHeadsPerPass] = {};
    float* scaled = scratch.scaled + g * stride;
    scale_query(layout, record, left < kHeadsPerPass ? left : kHeadsPerPass,
                scratch.code_query + g * stride, scaled, offsets);
    for (int32_t unit = 0; unit < kGroupUnits; ++unit) {
      const uint8_t* codes = record + unit * layout.unit_bytes();
      float* scores = scratch.tile.scores + g * kScoreStride + unit * kUnitTokens;
      if (left == 1) {
        score_unit<1>(layout, codes, scaled, offsets, scores);
      } else if (left == 2 || kMostHeads == 2) {
        score_unit<2>(layout, codes, scaled, offsets, scores);
        if (left > 2) {
          score_unit<2>(layout, codes, scaled + 2 * stride, offsets + 2, scores + 2 * kScoreStride);
        }
      } else {  // a row of zeros beats two passes over the codes
        score_unit<kMostHeads>(layout, codes, scaled, offsets, scores);
      }
    }
  }
}

// Exact scores of the visible tokens after the last complete group, from `origin` on.
template <class T>
void score_tail(const DecodeParams& params, const Item& item, int32_t origin, Scratch& scratch) {
  Tile<T> tile;
  const T* keys = static_cast<const T*>(params.key.data) + item.kv_head * params.key.head_stride;
  const int32_t begin = item.visible.begin > origin ? item.visible.begin : origin;
  for (int32_t token = begin; token < item.visible.end; ++token) {
    const int64_t page = item.block_table[token / params.page_size];
    const int64_t offset = token % params.page_size;
    const T* key = keys + page * params.key.page_stride + offset * params.key.token_stride;
    tile.keys[tile.num_tokens] = tile.values[tile.num_tokens] = key;
    tile.positions[tile.num_tokens++] = token;
  }
  if (params.key.dim_stride != 1) copy_keys(params, tile, static_cast<T*>(scratch.keys));
  tile.pad();
  score_tile(params, tile, scratch);
  for (int32_t g = 0; g < params.group_size; ++g) {
    float* scores = scratch.scores + g * kScoreStride;
    __builtin_memmove(scores + (begin - origin), scores, sizeof(float) * tile.num_tokens);
  }
}

// (max, sum) of the units of one group of tokens, from its scores.
void reduce_units(const DecodeParams& params, const Item& item, int32_t origin, int32_t unit_stride,
                  int32_t first_unit, GuidedScratch& scratch) {
  int32_t positions[kGroupTokens];
  for (int32_t t = 0; t < kGroupTokens; ++t) positions[t] = origin + t;
  for (int32_t g = 0; g < params.group_size; ++g) {
    float* scores = scratch.tile.scores + g * kScoreStride;
    adjust_scores(params, item, positions, kGroupTokens, g, scores);
    for (int32_t u = 0; u < kGroupUnits; ++u) {
      const int32_t unit = origin / kUnitTokens + u;
      const TokenRange tokens = unit_tokens(unit, kUnitTokens, item.visible);
      if (tokens.size() <= 0) continue;
      float* of_unit = scores + u * kUnitTokens;
      const int32_t before = tokens.begin - unit * kUnitTokens;
      for (int32_t t = 0; t < before; ++t) of_unit[t] = -__builtin_inff();
      const SoftmaxState state = exponentiate(of_unit, before + tokens.size());
      const int64_t at = int64_t{g} * unit_stride + (unit - first_unit);
      scratch.unit_max[at] = state.max;
      scratch.unit_sum[at] = state.sum;
    }
  }
}

// log2(x) for x >= 1, to about two units in the last place; NaN stays NaN.
ART_INLINE VecF log2_of(VecF x) {
  // Mantissa in [sqrt(1/2), sqrt(2)), where the series is accurate.
  const VecU bits = bit_cast<VecU>(x) + (0x3f800000 - 0x3f3504f3);
  const VecF exponent = __builtin_convertvector((VecI)(bits >> 23) - 127, VecF);
  const VecF m = bit_cast<VecF>((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
  const VecF square = m * m;
  VecF p = broadcast(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const VecF log = m + (p * m * square - square * 0.5f);
  return x == x ? exponent + log * 1.44269504f : x;
}

template <class T>
void score_units(const GuidedParams& guided, const Item& item, GuidedScratch& scratch) {
  const DecodeParams& params = guided.attention;
  const CodeLayout layout(params.head_dim);
  const int32_t first_unit = item.walk.first_unit;
  const int32_t stride = round_up(guided.max_units, kTilePadding);
  load_query<T>(params, item, scratch.tile);
  order_query(params, layout, scratch.tile.query, scratch.code_query, scratch.scaled);
  const int32_t* table = code_table_of(guided.codes, item.batch, item.kv_head);
  const GroupRange groups = coded_groups(item.visible);
  for (int32_t group = groups.begin; group < groups.end; ++group) {
    const uint8_t* record = record_of(guided.codes, table[group], item.kv_head);
    if (group + 1 < groups.end) {
      const uint8_t* next = record_of(guided.codes, table[group + 1], item.kv_head);
      for (int32_t at = 0; at < layout.record_bytes(); at += 64) {
        __builtin_prefetch(next + at, 0, 2);
      }
    }
    score_group(params, layout, record, scratch);
    reduce_units(params, item, group * kGroupTokens, stride, first_unit, scratch);
  }
  const int32_t tail = item.visible.end / kGroupTokens * kGroupTokens;
  if (tail < item.visible.end) {
    score_tail<T>(params, item, tail, scratch.tile);
    reduce_units(params, item, tail, stride, first_unit, scratch);
  }
  for (int32_t g = 0; g < params.group_size; ++g) {
    for (int32_t u = 0; u < item.walk.num_units; u += kLanes) {
      const int64_t at = int64_t{g} * stride + u;
      VecF steps = load(scratch.unit_max + at) * kStepsPerNat;
      steps += log2_of(load(scratch.unit_sum + at)) * 64.0f;
      for (int i = 0; i < kLanes; ++i) scratch.unit_lse[at + i] = quantise_steps(steps[i]);
    }
  }
}

}  // namespace
