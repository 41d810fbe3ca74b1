// Logits with vectors of four floats. Included inside the target's namespace, after
// tile_products-inl.h.

namespace {

// There are only as many sums at a time as lanes, and each waits for its last addition. So products
// are summed among themselves before one addition brings them to the sum.
template <class T>
struct WideDot {
  static constexpr int kParts = 4;
  static constexpr int kWidth = kParts * kLanes;
  static constexpr bool kScaled = true;
  using Query = float;
  struct Keys {
    VecF part[kParts];
  };

  static int32_t row(int32_t head_dim) { return padded(head_dim); }
  static const Query* queries(const Scratch& scratch) { return scratch.query; }
  static void load_query(const DecodeParams&, const T*, int32_t, Scratch&) {}

  ART_INLINE static Keys load_keys(const T* from) {
    return {load(from), load(from + kLanes), load(from + 2 * kLanes), load(from + 3 * kLanes)};
  }
  // Sizes are multiples of eight.
  ART_INLINE static Keys load_rest(const T* from, int32_t) {
    return {load(from), load(from + kLanes), VecF{}, VecF{}};
  }
  ART_INLINE static Keys load_queries(const Query* from) {
    return {load(from), load(from + kLanes), load(from + 2 * kLanes), load(from + 3 * kLanes)};
  }
  ART_INLINE static VecF add(VecF sum, const Keys& keys, const Keys& queries) {
    VecF products = keys.part[0] * queries.part[0];
#pragma GCC unroll 4
    for (int i = 1; i < kParts; ++i) products += keys.part[i] * queries.part[i];
    return sum + products;
  }
};

template <>
struct Dot<float> : WideDot<float> {};
template <>
struct Dot<Float16> : WideDot<Float16> {};
template <>
struct Dot<BFloat16> : WideDot<BFloat16> {};
template <>
struct Dot<int8_t> : WideDot<int8_t> {};

}  // namespace
