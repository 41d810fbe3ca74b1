// What a SIMD target offers. Included by each target inside its own namespace, after the kernels.

namespace {

template <class T>
constexpr Kernels make_kernels(const char* target) {
  return {target, load_query<T>, compute_step<T>, fold_step, write_output<T>, score_units<T>};
}

const Kernels& kernel_table(DType dtype, const char* target) {
  static const Kernels float32 = make_kernels<float>(target);
  static const Kernels float16 = make_kernels<Float16>(target);
  static const Kernels bfloat16 = make_kernels<BFloat16>(target);
  static const Kernels int8 = make_kernels<int8_t>(target);
  switch (dtype) {
    case DType::kFloat32:
      return float32;
    case DType::kFloat16:
      return float16;
    case DType::kInt8:
      return int8;
    default:
      return bfloat16;
  }
}

}  // namespace
