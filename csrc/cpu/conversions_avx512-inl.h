// Sixteen at a time, for targets with AVX-512. After conversions_avx2-inl.h.

template <>
ART_INLINE VecOf<16>::F load_n<16>(const Float16* from) {
  // All lanes, but GCC 12 warns of what its unmasked form leaves undefined.
  return (VecOf<16>::F)_mm512_maskz_cvtph_ps(0xffff, load_raw<__m256i>(from));
}

template <>
ART_INLINE VecOf<16>::F load_n<16>(const int8_t* from) {
  const __m512i codes = _mm512_maskz_cvtepi8_epi32(0xffff, load_raw<__m128i>(from));
  return (VecOf<16>::F)_mm512_maskz_cvtepi32_ps(0xffff, codes);
}
