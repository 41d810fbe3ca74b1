// The ring through which the workers of a team hand their steps to the thread block that folds
// them.
#pragma once

#include <cstdint>

#include "cuda/sm90/async.cuh"
#include "cuda/sm90/launch.h"

namespace art::cuda::sm90 {

constexpr int32_t kStopped = 1 << 30;  // more steps than any item has

__device__ inline int32_t load_relaxed(const int32_t* address) {
  int32_t value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
__device__ inline void store_relaxed(int32_t* address, int32_t value) {
  asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}
__device__ inline void store_release(int32_t* address, int32_t value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// One item's part of the ring.
struct Ring {
  int32_t num_steps;
  int32_t pieces;  // of a slot
  int32_t* written;
  float4* slots;

  __device__ Ring(const TeamSpace& space, int32_t index, int32_t slot_pieces)
      : num_steps(space.ring_steps),
        pieces(slot_pieces),
        written(space.written + int64_t{index} * space.ring_steps),
        slots(space.slots + int64_t{index} * space.ring_steps * slot_pieces) {}

  __device__ int32_t* flag(int32_t step) const { return written + (step & (num_steps - 1)); }
  __device__ float4* slot(int32_t step) const {
    return slots + int64_t{step & (num_steps - 1)} * pieces;
  }
};

}  // namespace art::cuda::sm90
