// Log-sum-exp of units of 16 tokens, estimated from key codes, for one KV head and all its query
// heads. Included by each SIMD target inside its own namespace, after the scores of key codes.

namespace {

// Exact scores of the visible tokens after the last complete group, from `origin` on.
template <class T>
void score_tail(const DecodeParams& params, const Item& item, int32_t origin, Scratch& scratch) {
  Tile<T> tile;
  const int32_t begin = item.visible.begin > origin ? item.visible.begin : origin;
  for (int32_t token = begin; token < item.visible.end;) {
    const int32_t page_end = token - token % params.page_size + params.page_size;
    const int32_t end = page_end < item.visible.end ? page_end : item.visible.end;
    tile.add(params, item, token, end - token);
    token = end;
  }
  tile.pad();
  tile.scales.read_keys(tile.num_tokens);
  Runs none;
  const Runs* const parts[] = {&none, &none, &none};
  Fetcher nothing(parts, 0, 0);
  score_tile(params, tile, scratch, nothing);
  for (int32_t g = 0; g < params.group_size; ++g) {
    float* scores = scratch.scores + g * kScoreStride;
    tile.scales.multiply_logits(tile.num_tokens, scores);
    __builtin_memmove(scores + (begin - origin), scores, sizeof(float) * tile.num_tokens);
  }
}

// Largest score and sum of exp(score - largest) of the four units of a group, for up to as many
// heads as there are lanes for: a lane for each unit and head, so that adding across lanes is done
// for all of them together. `max` and `sum` are those of the first unit of the first head.
void reduce_heads(const float* scores, int32_t num_heads, int64_t unit_stride, float* max,
                  float* sum) {
  constexpr int kParts = kUnitTokens / kLanes;
  VecF largest[kLanes] = {}, total[kLanes] = {};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i / kGroupUnits >= num_heads) continue;
    const float* unit = scores + i / kGroupUnits * kScoreStride + i % kGroupUnits * kUnitTokens;
    largest[i] = load(unit);
    for (int part = 1; part < kParts; ++part) {
      largest[i] = larger(load(unit + part * kLanes), largest[i]);
    }
  }
  const VecF maxima = transpose_max(largest);
  // We don't want (-inf) - (-inf), since that would give NaN.
  const VecF reference = maxima == -__builtin_inff() ? VecF{} : maxima;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i / kGroupUnits >= num_heads) continue;
    const float* unit = scores + i / kGroupUnits * kScoreStride + i % kGroupUnits * kUnitTokens;
    for (int part = 0; part < kParts; ++part) {
      total[i] += exp_nonpositive(load(unit + part * kLanes) - reference[i]);
    }
  }
  const VecF sums = transpose_add(total);
  for (int32_t h = 0; h < num_heads; ++h) {
    const auto copy = [&](const VecF& from, float* to) {
      __builtin_memcpy(to + h * unit_stride,
                       reinterpret_cast<const char*>(&from) + h * kGroupUnits * sizeof(float),
                       kGroupUnits * sizeof(float));
    };
    copy(maxima, max);
    copy(sums, sum);
  }
}

// (max, sum) of the units of one group of tokens, from its scores. Those that are not visible count
// as nothing.
void reduce_units(const DecodeParams& params, const Item& item, int32_t origin, int64_t unit_stride,
                  int64_t slot, GuidedScratch& scratch) {
  constexpr int kHeads = kLanes / kGroupUnits;
  const TokenRange visible = unit_tokens(origin / kGroupTokens, kGroupTokens, item.visible);
  const int32_t begin = visible.begin - origin, end = visible.end - origin;
  int32_t positions[kGroupTokens];
  for (int32_t t = 0; t < kGroupTokens; ++t) positions[t] = origin + t;
  for (int32_t g = 0; g < params.group_size; ++g) {
    float* scores = scratch.tile.scores + g * kScoreStride;
    adjust_scores(params, item, positions + begin, end - begin, g, scores + begin);
    for (int32_t t = 0; t < begin; ++t) scores[t] = -__builtin_inff();
    for (int32_t t = end; t < kGroupTokens; ++t) scores[t] = -__builtin_inff();
  }
  for (int32_t g = 0; g < params.group_size; g += kHeads) {
    const int32_t left = params.group_size - g;
    const int64_t at = g * unit_stride + slot;
    reduce_heads(scratch.tile.scores + g * kScoreStride, left < kHeads ? left : kHeads, unit_stride,
                 scratch.unit_max + at, scratch.unit_sum + at);
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

// quantise_steps() of core/unit_order.h for a vector.
ART_INLINE void store_steps(VecF steps, int16_t* to) {
  typedef int16_t Steps __attribute__((vector_size(2 * kLanes)));
  const VecF least = broadcast(kLeastSteps), most = broadcast(kMostSteps);
  const VecI known = (steps > least) & (steps < __builtin_inff());
  const VecF low = known ? steps : least;
  const VecF limited = low < most ? low : most;
  const VecF rounded = (limited + 12582912.0f) - 12582912.0f;  // to the nearest integer
  const Steps result = __builtin_convertvector(__builtin_convertvector(rounded, VecI), Steps);
  __builtin_memcpy(to, &result, sizeof(result));
}

// Groups from one that is scored to the one that is fetched meanwhile. The next is not enough where
// a group has one query head: memory takes longer to answer than its scores.
constexpr int32_t kFetchAhead = 2;

template <class T>
void score_units(const GuidedParams& guided, const Item& item, GuidedScratch& scratch) {
  const DecodeParams& params = guided.attention;
  const CodeLayout layout(params.head_dim);
  const int64_t stride = round_up(guided.max_units, kTilePadding);
  load_query<T>(params, item, scratch.tile);
  order_query(params, layout, scratch.tile.query, scratch.code_query, scratch.scaled);
  const int32_t* table = code_table_of(guided.codes, item.batch, item.kv_head);
  const GroupRange groups = coded_groups(item.visible);
  [[maybe_unused]] const ScoringState state;
  int64_t slot = 0;  // of a group's first unit
  for (int32_t group = groups.begin; group < groups.end; ++group, slot += kGroupUnits) {
    const uint8_t* record = record_of(guided.codes, table[group], item.kv_head);
    const int32_t after = group + kFetchAhead < groups.end ? group + kFetchAhead : group;
    const uint8_t* next = record_of(guided.codes, table[after], item.kv_head);
    score_group(params, layout, record, next, scratch);
    reduce_units(params, item, group * kGroupTokens, stride, slot, scratch);
  }
  const int32_t tail = item.visible.end / kGroupTokens * kGroupTokens;
  if (tail < item.visible.end) {
    score_tail<T>(params, item, tail, scratch.tile);
    reduce_units(params, item, tail, stride, slot, scratch);
    slot += kGroupUnits;
  }
  for (int32_t g = 0; g < params.group_size; ++g) {
    for (int64_t at = g * stride; at < g * stride + slot; at += kLanes) {
      const VecF steps = load(scratch.unit_max + at) * kStepsPerNat;
      store_steps(steps + log2_of(load(scratch.unit_sum + at)) * 64.0f, scratch.unit_lse + at);
    }
  }
}

}  // namespace
