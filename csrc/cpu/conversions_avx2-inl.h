// Conversions of float16 and int8 by instructions, for targets with AVX2 and F16C. After
// simd-inl.h, which has them for everybody else. GCC defines no macros such as __F16C__ after
// "#pragma GCC target" in C++ before its version 13, so that only the target knows what it has.

template <>
ART_INLINE VecOf<4>::F load_n<4>(const Float16* from) {
  return (VecOf<4>::F)_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}

template <>
ART_INLINE VecOf<8>::F load_n<8>(const Float16* from) {
  return (VecOf<8>::F)_mm256_cvtph_ps(load_raw<__m128i>(from));
}

template <>
ART_INLINE VecOf<8>::F load_n<8>(const int8_t* from) {
  const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return (VecOf<8>::F)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
}
