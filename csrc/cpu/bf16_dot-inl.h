// Logits of bfloat16 by dot products of pairs, for targets with AVX512-BF16. Included inside the
// target's namespace, after decode_attention-inl.h.

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
  ART_INLINE static VecF add(VecF sum, Keys keys, const Query* query) {
    return (VecF)_mm512_dpbf16_ps((__m512)sum, keys, load_raw<Keys>(query));
  }
};

}  // namespace
