// What every machine runs, by what the compiler takes for granted: SSE2 on x86-64, for example.
#include "cpu/kernels.h"

namespace art::cpu::baseline {
constexpr int kLanes = 4;
// clang-format off: each of them needs those before it.
#include "cpu/simd-inl.h"
#include "cpu/tile_scales-inl.h"
#include "cpu/tiles-inl.h"
#include "cpu/tile_products-inl.h"
#include "cpu/decode_attention-inl.h"
#include "cpu/code_query-inl.h"
#include "cpu/score_codes-inl.h"
#include "cpu/guided_walk-inl.h"
#include "cpu/kernel_table-inl.h"
// clang-format on

const Kernels& kernels(DType dtype) { return kernel_table(dtype, "baseline"); }
}  // namespace art::cpu::baseline
