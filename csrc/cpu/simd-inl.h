// Vectors of kLanes floats, in the compiler's vector extension: the same source becomes AVX-512,
// AVX2, SSE2 or NEON. Included by each target inside its own namespace, after kLanes is defined.
// No standard headers here: an inline function of theirs compiled for AVX-512 could be the copy
// that the linker keeps for everyone.

#define ART_ALWAYS_INLINE __attribute__((always_inline))
#define ART_INLINE inline ART_ALWAYS_INLINE

template <int N>
struct VecOf {
  typedef float F __attribute__((vector_size(4 * N)));
  typedef int32_t I __attribute__((vector_size(4 * N)));
  typedef uint32_t U __attribute__((vector_size(4 * N)));
  typedef uint16_t H __attribute__((vector_size(2 * N)));
};

using VecF = VecOf<kLanes>::F;
using VecI = VecOf<kLanes>::I;
using VecU = VecOf<kLanes>::U;

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
ART_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <class V, class T>
ART_INLINE V load_raw(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

ART_INLINE void store(float* to, VecF v) { __builtin_memcpy(to, &v, sizeof(v)); }

// ---- conversions to float

template <int N>
ART_INLINE typename VecOf<N>::F load_n(const float* from) {
  return load_raw<typename VecOf<N>::F>(from);
}

// 16-bit numbers, zero-extended.
template <int N>
ART_INLINE typename VecOf<N>::U load_words(const void* from) {
  return __builtin_convertvector(load_raw<typename VecOf<N>::H>(from), typename VecOf<N>::U);
}

template <int N>
ART_INLINE typename VecOf<N>::F load_n(const BFloat16* from) {
  return bit_cast<typename VecOf<N>::F>(load_words<N>(from) << 16);
}

template <int N>
ART_INLINE typename VecOf<N>::F load_n(const Float16* from) {
  using U = typename VecOf<N>::U;
  using F = typename VecOf<N>::F;
  const U half = load_words<N>(from);
  const U magnitude = (half & 0x7fff) << 13;
  // The exponent bias is 112 larger in float; infinities and NaN keep the largest exponent.
  const U finite = bit_cast<U>(bit_cast<F>(magnitude) * 0x1p112f);
  const U special = magnitude | 0x7f800000;
  const U is_special = (U)(magnitude >= 0x0f800000);
  return bit_cast<F>((is_special & special) | (~is_special & finite) | ((half & 0x8000) << 16));
}

// Of an int8 cache: the code, without the scale of its row. Targets with longer vectors than these
// have instructions for it.
template <int N>
ART_INLINE typename VecOf<N>::F load_n(const int8_t* from) {
  typename VecOf<N>::F codes = {};
  for (int i = 0; i < N; ++i) codes[i] = from[i];
  return codes;
}

// Compilers convert bytes one by one, but doubling them twice moves each to the top of a word.
template <>
ART_INLINE VecOf<4>::F load_n<4>(const int8_t* from) {
  typedef int8_t Bytes __attribute__((vector_size(16)));
  const VecOf<4>::I word = {load_raw<int32_t>(from), 0, 0, 0};
  const Bytes b = (Bytes)word;
  const Bytes pairs = __builtin_shufflevector(b, b, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  const Bytes fours =
      __builtin_shufflevector(pairs, pairs, 0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7);
  return __builtin_convertvector((VecOf<4>::I)fours >> 24, VecOf<4>::F);
}

template <class T>
ART_INLINE VecF load(const T* from) {
  return load_n<kLanes>(from);
}

ART_INLINE VecF broadcast(float x) { return x - VecF{}; }

// ---- conversions from float, to nearest even

ART_INLINE void store_one(float* to, float x) { *to = x; }

ART_INLINE void store_one(BFloat16* to, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  to->bits = nan ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

ART_INLINE void store_one(Float16* to, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65520 and above round to infinity
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: let float addition round at 2^-24
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  to->bits = static_cast<uint16_t>(sign | half);
}

// ---- reductions

template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  using type = Indices<I...>;
};

// Half a vector, zeros above it: the end of a row whose length is no multiple of kLanes. Not by way
// of memory, or vectors that are made so stay there.
template <class T, int... I>
ART_INLINE VecF load_half(const T* from, Indices<I...>) {
  const auto half = load_n<kLanes / 2>(from);
  return __builtin_shufflevector(half, decltype(half){}, I...);
}
template <class T>
ART_INLINE VecF load_half(const T* from) {
  return load_half(from, MakeIndices<kLanes>::type{});
}

template <int N, int... I>
ART_INLINE typename VecOf<N / 2>::F half_of(typename VecOf<N>::F v, bool upper, Indices<I...>) {
  return upper ? __builtin_shufflevector(v, v, (I + N / 2)...)
               : __builtin_shufflevector(v, v, I...);
}

template <int N, bool kMax>
ART_INLINE float reduce(typename VecOf<N>::F v) {
  if constexpr (N == 2) {
    return kMax ? (v[0] > v[1] ? v[0] : v[1]) : v[0] + v[1];
  } else {
    using Half = typename MakeIndices<N / 2>::type;
    const auto low = half_of<N>(v, false, Half{});
    const auto high = half_of<N>(v, true, Half{});
    return reduce<N / 2, kMax>(kMax ? (low > high ? low : high) : low + high);
  }
}

ART_INLINE float reduce_add(VecF v) { return reduce<kLanes, false>(v); }
ART_INLINE float reduce_max(VecF v) { return reduce<kLanes, true>(v); }

// Source lane of output lane i when pairs of lanes (or of 128-bit quarters) of a and b are
// combined.
constexpr int pair_source(int i, int parity) {
  const int quarter = i / 4, k = i % 4;
  return (k < 2 ? 0 : kLanes) + 4 * quarter + 2 * (k % 2) + parity;
}
constexpr int quarter_source(int i, int parity) {
  const int quarter = i / 4, half = kLanes < 8 ? 1 : kLanes / 8;
  return (quarter < half ? 0 : kLanes) + 4 * (2 * (quarter % half) + parity) + i % 4;
}

ART_INLINE VecF larger(VecF a, VecF b) { return a > b ? a : b; }

template <bool kMax>
ART_INLINE VecF combine(VecF a, VecF b) {
  return kMax ? larger(a, b) : a + b;
}

template <bool kMax, int... I>
ART_INLINE VecF combine_pairs(VecF a, VecF b, Indices<I...>) {
  return combine<kMax>(__builtin_shufflevector(a, b, pair_source(I, 0)...),
                       __builtin_shufflevector(a, b, pair_source(I, 1)...));
}
template <bool kMax, int... I>
ART_INLINE VecF combine_quarters(VecF a, VecF b, Indices<I...>) {
  return combine<kMax>(__builtin_shufflevector(a, b, quarter_source(I, 0)...),
                       __builtin_shufflevector(a, b, quarter_source(I, 1)...));
}

template <bool kMax>
ART_INLINE VecF transpose_reduce(VecF (&v)[kLanes]) {
  using All = typename MakeIndices<kLanes>::type;
#pragma GCC unroll 16
  for (int n = kLanes; n > kLanes / 4; n /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) v[i] = combine_pairs<kMax>(v[2 * i], v[2 * i + 1], All{});
  }
  if constexpr (kLanes > 4) {
#pragma GCC unroll 16
    for (int n = kLanes / 4; n > 1; n /= 2) {
#pragma GCC unroll 16
      for (int i = 0; i < n / 2; ++i) v[i] = combine_quarters<kMax>(v[2 * i], v[2 * i + 1], All{});
    }
  }
  return v[0];
}

// Lane i of the result is the sum of the lanes of v[i], or the largest of them.
ART_INLINE VecF transpose_add(VecF (&v)[kLanes]) { return transpose_reduce<false>(v); }
ART_INLINE VecF transpose_max(VecF (&v)[kLanes]) { return transpose_reduce<true>(v); }

// ---- exponential

// exp(x) for x <= 0, to about one unit in the last place; 0 below -87; NaN stays NaN.
ART_INLINE VecF exp_nonpositive(VecF x) {
  const VecI tiny = x < -87.0f;
  const VecF clamped = tiny ? broadcast(-87.0f) : x;
  const VecF shifted = clamped * 1.44269504f + 12582912.0f;  // the nearest integer, in its low bits
  const VecF n = shifted - 12582912.0f;
  const VecF r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  VecF p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const VecI exponent = (bit_cast<VecI>(shifted) + 127) << 23;
  const VecF power = p * bit_cast<VecF>(exponent);
  return tiny ? VecF{} : power;
}
