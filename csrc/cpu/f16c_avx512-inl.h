// Sixteen at a time, for targets with AVX-512. After f16c-inl.h.

template <>
ART_INLINE VecOf<16>::F load_n<16>(const Float16* from) {
  // All lanes, but GCC 12 warns of what its unmasked form leaves undefined.
  return (VecOf<16>::F)_mm512_maskz_cvtph_ps(0xffff, load_raw<__m256i>(from));
}
