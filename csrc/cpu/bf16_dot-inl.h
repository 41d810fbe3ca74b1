// Products of bfloat16 by dot products of pairs, for targets with AVX512-BF16. Included inside the
// target's namespace, after tile_products-inl.h.

namespace {

// Products of bfloat16 are exact in float32, and so are queries as they came: the scale is applied
// to the sums.
template <>
struct Dot<BFloat16> {
  static constexpr int kWidth = 2 * kLanes;
  static constexpr bool kScaled = false;
  using Query = BFloat16;
  using Keys = __m512bh;

  static int32_t row(int32_t head_dim) { return round_up(head_dim, kWidth); }
  static const Query* queries(const Scratch& scratch) {
    return static_cast<const Query*>(scratch.plain_query);
  }
  static void load_query(const DecodeParams& params, const BFloat16* from, int32_t g,
                         Scratch& scratch) {
    const int32_t size = row(params.head_dim), heads = round_up(params.group_size, kHeadsPerPass);
    if (g == 0) __builtin_memset(scratch.plain_query, 0, sizeof(BFloat16) * heads * size);
    BFloat16* to = static_cast<BFloat16*>(scratch.plain_query) + g * size;
    __builtin_memcpy(to, from, sizeof(BFloat16) * params.head_dim);
  }

  ART_INLINE static Keys load_keys(const BFloat16* from) { return load_raw<Keys>(from); }
  ART_INLINE static Keys load_rest(const BFloat16* from, int32_t count) {
    return (Keys)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1u << count) - 1), from);
  }
  ART_INLINE static Keys load_queries(const Query* from) { return load_raw<Keys>(from); }
  ART_INLINE static VecF add(VecF sum, Keys keys, Keys queries) {
    return (VecF)_mm512_dpbf16_ps((__m512)sum, keys, queries);
  }
};

// Two rows at a time, their elements side by side: probabilities are rounded to bfloat16, and so
// are those that the softmax sum counts.
template <>
struct Weighing<BFloat16> {
  static constexpr int kRows = 2;
  static constexpr int kVectors = 2;
  using Weight = BFloat16;
  struct Values {
    __m512i low, high;  // of each 16 bytes of both rows
  };

  ART_INLINE static VecF set_weights(VecF p, BFloat16* to) {
    const auto rounded = (__m256i)_mm512_cvtneps_pbh((__m512)p);
    __builtin_memcpy(to, &rounded, sizeof(rounded));
    // All lanes, but GCC 12 warns of what unmasked forms leave undefined.
    return bit_cast<VecF>((VecU)_mm512_maskz_cvtepu16_epi32(0xffff, rounded) << 16);
  }
  ART_INLINE static __m512bh load_weights(const BFloat16* from) {
    return (__m512bh)_mm512_set1_epi32(load_raw<int32_t>(from));
  }
  ART_INLINE static Values pair(__m512i first, __m512i second) {
    constexpr __mmask32 kAll = 0xffffffff;
    return {_mm512_maskz_unpacklo_epi16(kAll, first, second),
            _mm512_maskz_unpackhi_epi16(kAll, first, second)};
  }
  ART_INLINE static Values load_values(const BFloat16* const* rows, int32_t d) {
    return pair(load_raw<__m512i>(rows[0] + d), load_raw<__m512i>(rows[1] + d));
  }
  ART_INLINE static Values load_rest(const BFloat16* const* rows, int32_t d, int32_t count) {
    const auto mask = static_cast<__mmask32>((1u << count) - 1);
    return pair(_mm512_maskz_loadu_epi16(mask, rows[0] + d),
                _mm512_maskz_loadu_epi16(mask, rows[1] + d));
  }
  ART_INLINE static void add(VecF* sums, Values values, __m512bh weights) {
    sums[0] = (VecF)_mm512_dpbf16_ps((__m512)sums[0], (__m512bh)values.low, weights);
    sums[1] = (VecF)_mm512_dpbf16_ps((__m512)sums[1], (__m512bh)values.high, weights);
  }
  ART_INLINE static void store_sums(const VecF* sums, int32_t count, float* to) {
    store(to, __builtin_shufflevector(sums[0], sums[1], 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20,
                                      21, 22, 23));
    if (count <= kLanes) return;
    store(to + kLanes, __builtin_shufflevector(sums[0], sums[1], 8, 9, 10, 11, 24, 25, 26, 27, 12,
                                               13, 14, 15, 28, 29, 30, 31));
  }
};

}  // namespace
