// What targets need that score key codes in integers, of 512-bit vectors: included after
// code_query-inl.h.
//
// A head's queries, times the scales of a group, become integers of three signed bytes, their
// digits: as exact as float32 where the largest is concerned. Tokens are lanes, so that nothing has
// to be added across lanes.

namespace {

constexpr int kDigits = 3;
// Integers appear as the last bits of floats that have no others: 3 * 2^22 plus less than 2^22.
constexpr float kIntegersFrom = 0x1.8p23f;
constexpr uint32_t kBitsFrom = 0x4b400000;
constexpr float kLargestInteger = 0x3fffff;
// Below it, its inverse times the number above would be infinite.
constexpr float kLeastLargest = 1e-30f;

// Stands for offset + unit * integer.
struct IntegerHead {
  float offset;
  float unit;
};

typedef uint8_t Bytes __attribute__((vector_size(64)));
typedef uint16_t Words __attribute__((vector_size(64)));
typedef int64_t Quads __attribute__((vector_size(64)));
using AllBytes = MakeIndices<64>::type;

// The first of a vector's eight quadwords; no memory is read beyond them.
ART_INLINE Quads load_quads(const uint8_t* from, int32_t count) {
  return (Quads)_mm512_maskz_loadu_epi64(static_cast<__mmask8>((1u << count) - 1), from);
}

// In each quadword, the bytes of tokens t and t + 8 take turns; afterwards t has the first four.
template <int... I>
ART_INLINE Quads tokens_apart(Quads v, Indices<I...>) {
  return (Quads)__builtin_shufflevector((Bytes)v, (Bytes)v, (I / 8 * 8 + I % 4 * 2 + I % 8 / 4)...);
}

// In each four dwords, byte d of dword i becomes byte i of dword d.
template <int... I>
ART_INLINE Bytes transpose_bytes(Bytes v, Indices<I...>) {
  return __builtin_shufflevector(v, v, (I / 16 * 16 + I % 4 * 4 + I % 16 / 4)...);
}

// Codes of a group as [unit][step][token], the dwords of tokens in the order 0, 8, 1, 9, ...: four
// fields of one token, a byte each.
void arrange_codes(const CodeLayout& layout, const uint8_t* record, uint8_t* arranged) {
  for (int32_t unit = 0; unit < kGroupUnits; ++unit) {
    for (int32_t first = 0; first < layout.steps; first += 8) {
      const int32_t steps = layout.steps - first < 8 ? layout.steps - first : 8;
      Quads v[8], pairs[8], quads[8];
#pragma GCC unroll 8
      for (int l = 0; l < 8; ++l) {
        const uint8_t* line = record + unit * layout.unit_bytes() + l * layout.line_bytes();
        v[l] = tokens_apart(load_quads(line + 8 * first, steps), AllBytes{});
      }
#pragma GCC unroll 8
      for (int l = 0; l < 8; l += 2) {  // pairs[l]: even steps, pairs[l + 1]: odd ones
        pairs[l] = __builtin_shufflevector(v[l], v[l + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        pairs[l + 1] = __builtin_shufflevector(v[l], v[l + 1], 1, 9, 3, 11, 5, 13, 7, 15);
      }
#pragma GCC unroll 8
      for (int i = 0; i < 4; ++i) {  // of the lines from 4 * half on
        const int half = i / 2, odd = i % 2;
        const Quads a = pairs[4 * half + odd], b = pairs[4 * half + 2 + odd];
        // Steps 0 and 2, then 4 and 6; or 1 and 3, then 5 and 7.
        quads[4 * odd + half] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
        quads[4 * odd + 2 + half] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
      }
      uint8_t* to = arranged + (unit * layout.steps + first) * 64;
#pragma GCC unroll 8
      for (int step = 0; step < 8; ++step) {
        if (step == steps) break;
        const Quads *quad = quads + 4 * (step % 2) + 2 * (step / 4), a = quad[0], b = quad[1];
        const Quads tokens = step / 2 % 2 == 0
                                 ? __builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13)
                                 : __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15);
        __builtin_memcpy(to + 64 * step, &tokens, sizeof(tokens));
      }
    }
  }
}

// Digits of one head's scaled queries, [place][step][digit] with one dword of four fields each.
IntegerHead scale_head(const CodeLayout& layout, const CodeGrids& grids, const float* query,
                       float* scaled) {
  const int32_t line = 4 * layout.steps, fields = padded_fields(layout);
  VecF offset = {};
  VecU largest =
      bit_cast<VecU>(broadcast(kLeastLargest));  // magnitudes are ordered as integers are
  for (int32_t place = 0; place < kPlaces; ++place) {
    for (int32_t i = 0; i < line; i += kLanes) {
      const VecF q = load(query + place * fields + i);
      const VecF x = q * load(grids.scales + place * line + i);
      store(scaled + place * fields + i, x);
      offset += q * load(grids.zeros + place * line + i);
      const VecU magnitude = bit_cast<VecU>(x) & 0x7fffffff;
      largest = magnitude > largest ? magnitude : largest;
    }
  }
  const float max = reduce_max(bit_cast<VecF>(largest)), inverse = kLargestInteger / max;
  for (int32_t at = 0; at < kPlaces * fields; at += kLanes) {
    const VecF integers = load(scaled + at) * inverse + kIntegersFrom;
    // With half of each digit's range more, the bytes are digits with an offset of 128.
    const VecU digits = (bit_cast<VecU>(integers) - kBitsFrom + 0x00808080) ^ 0x00808080;
    const Bytes by_digit = transpose_bytes((Bytes)digits, AllBytes{});
    __builtin_memcpy(scaled + at, &by_digit, sizeof(by_digit));
  }
  // A query that is not finite is noticed by the offset: it is not finite either.
  return {reduce_add(offset), max / kLargestInteger};
}

// Scores of a unit in the order of tokens, from the sums of each digit's products.
ART_INLINE void store_scores(const IntegerHead& head, VecI first, VecI second, VecI third,
                             float* scores) {
  const VecF low = __builtin_convertvector((second << 8) + first, VecF);
  const VecF high = __builtin_convertvector(third, VecF) * 65536.0f;
  const VecF score = (high + low) * head.unit + head.offset;
  store(scores, __builtin_shufflevector(score, score, 0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11,
                                        13, 15));
}

}  // namespace
