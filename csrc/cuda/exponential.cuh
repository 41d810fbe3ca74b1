// The exponential function of the kernels that have no time for a better one.
#pragma once

namespace art::cuda {

constexpr float kLog2e = 1.4426950408889634f;

__device__ inline float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace art::cuda
