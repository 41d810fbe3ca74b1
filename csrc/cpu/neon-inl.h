// Loads of 16-bit numbers by instructions that every aarch64 machine has: after simd-inl.h, which
// has them for everybody else. GCC 12 would widen one lane after the other.

template <>
ART_INLINE VecOf<4>::U load_words<4>(const void* from) {
  return (VecOf<4>::U)vmovl_u16(load_raw<uint16x4_t>(from));
}

template <>
ART_INLINE VecOf<4>::F load_n<4>(const BFloat16* from) {
  return (VecOf<4>::F)vshll_n_u16(load_raw<uint16x4_t>(from), 16);
}

template <>
ART_INLINE VecOf<4>::F load_n<4>(const Float16* from) {
  return (VecOf<4>::F)vcvt_f32_f16(load_raw<float16x4_t>(from));
}

// For queries, of which there are few.
template <>
ART_INLINE VecOf<8>::F load_n<8>(const BFloat16* from) {
  const VecOf<4>::F parts[2] = {load_n<4>(from), load_n<4>(from + 4)};
  return load_raw<VecOf<8>::F>(parts);
}

template <>
ART_INLINE VecOf<8>::F load_n<8>(const Float16* from) {
  const VecOf<4>::F parts[2] = {load_n<4>(from), load_n<4>(from + 4)};
  return load_raw<VecOf<8>::F>(parts);
}
