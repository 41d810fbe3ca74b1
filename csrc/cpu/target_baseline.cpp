// What every machine of the architecture runs: SSE2 on x86-64, NEON on aarch64.
#include "cpu/kernels.h"

namespace art::cpu::baseline {
constexpr int kLanes = 4;
#include "cpu/simd-inl.h"
// The kernels need the vectors above.
#include "cpu/decode_attention-inl.h"
#include "cpu/guided_walk-inl.h"
// The table needs the kernels above.
#include "cpu/kernel_table-inl.h"

const Kernels& kernels(DType dtype) { return kernel_table(dtype, "baseline"); }
}  // namespace art::cpu::baseline
