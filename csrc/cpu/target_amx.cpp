// AVX-512 with BF16, and scores of key codes by products of tiles: Sapphire Rapids and newer.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                \
    __attribute__((                                                                          \
        target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,amx-tile,amx-int8," \
               "avx2,fma,f16c"))),                                                           \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,amx-tile,amx-int8,avx2,fma,f16c")
#endif

namespace art::cpu::amx {
constexpr int kLanes = 16;
// clang-format off: each of them needs those before it.
#include "cpu/simd-inl.h"
#include "cpu/conversions_avx2-inl.h"
#include "cpu/conversions_avx512-inl.h"
#include "cpu/tile_scales-inl.h"
#include "cpu/tiles-inl.h"
#include "cpu/tile_products-inl.h"
#include "cpu/bf16_dot-inl.h"
#include "cpu/decode_attention-inl.h"
#include "cpu/code_query-inl.h"
#include "cpu/integer_codes-inl.h"
#include "cpu/score_codes_amx-inl.h"
#include "cpu/guided_walk-inl.h"
#include "cpu/kernel_table-inl.h"
// clang-format on

const Kernels& kernels(DType dtype) { return kernel_table(dtype, "amx"); }
}  // namespace art::cpu::amx

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
