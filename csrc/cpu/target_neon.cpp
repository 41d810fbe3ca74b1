// Advanced SIMD, which every aarch64 machine has.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "cpu/kernels.h"

namespace art::cpu::neon {
constexpr int kLanes = 4;
// clang-format off: each of them needs those before it.
#include "cpu/simd-inl.h"
#include "cpu/neon-inl.h"
#include "cpu/tile_scales-inl.h"
#include "cpu/tiles-inl.h"
#include "cpu/tile_products-inl.h"
#include "cpu/neon_dot-inl.h"
#include "cpu/decode_attention-inl.h"
#include "cpu/code_query-inl.h"
#include "cpu/score_codes-inl.h"
#include "cpu/guided_walk-inl.h"
#include "cpu/kernel_table-inl.h"
// clang-format on

const Kernels& kernels(DType dtype) { return kernel_table(dtype, "neon"); }
}  // namespace art::cpu::neon
#endif
