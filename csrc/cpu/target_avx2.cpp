#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace art::cpu::avx2 {
constexpr int kLanes = 8;
// clang-format off: each of them needs those before it.
#include "cpu/simd-inl.h"
#include "cpu/conversions_avx2-inl.h"
#include "cpu/tile_scales-inl.h"
#include "cpu/tiles-inl.h"
#include "cpu/tile_products-inl.h"
#include "cpu/decode_attention-inl.h"
#include "cpu/code_query-inl.h"
#include "cpu/score_codes-inl.h"
#include "cpu/guided_walk-inl.h"
#include "cpu/kernel_table-inl.h"
// clang-format on

const Kernels& kernels(DType dtype) { return kernel_table(dtype, "avx2"); }
}  // namespace art::cpu::avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
