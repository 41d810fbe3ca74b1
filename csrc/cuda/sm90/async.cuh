// The asynchronous machinery of sm_90: barriers in shared memory that count bytes, and the copy
// engine that fills them.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/sm80/mma.cuh"

namespace art::cuda::sm90 {

using sm80::shared_address;

// A barrier whose phase ends when the expected threads arrived and the expected bytes landed.
struct Barrier {
  uint64_t word;

  __device__ void init(uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&word)),
                 "r"(arrivals)
                 : "memory");
  }
  __device__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&word))
                 : "memory");
  }
  __device__ void arrive_and_expect(uint32_t bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&word)),
        "r"(bytes)
        : "memory");
  }
  // Takes back bytes that were expected and will not land.
  __device__ void complete(uint32_t bytes) {
    asm volatile(
        "mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&word)),
        "r"(bytes)
        : "memory");
  }
  // Waits for the end of the phase with this parity; phases are numbered from 0.
  __device__ void wait(uint32_t parity) {
    uint32_t over;
    do {
      asm volatile(
          "{\n .reg .pred p;\n"
          " mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
          " selp.u32 %0, 1, 0, p;\n}"
          : "=r"(over)
          : "r"(shared_address(&word)), "r"(parity)
          : "memory");
    } while (over == 0);
  }
  // The same without waiting.
  __device__ bool is_over(uint32_t parity) {
    uint32_t over;
    asm volatile(
        "{\n .reg .pred p;\n"
        " mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        " selp.u32 %0, 1, 0, p;\n}"
        : "=r"(over)
        : "r"(shared_address(&word)), "r"(parity)
        : "memory");
    return over != 0;
  }
};

// Makes freshly initialised barriers visible to the copy engine.
__device__ inline void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Orders ordinary accesses before later ones of the copy engine.
__device__ inline void fence_copy_engine_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Keys and values are read once: they should leave the second-level cache first.
__device__ inline uint64_t read_once_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ inline void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies one box of a cache: 16 tokens of one page and head, all channels.
__device__ inline void copy_box(void* to, const CUtensorMap* map, Barrier& barrier, int32_t token,
                                int32_t head, int32_t page, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %3, %5, %6}], [%2], %7;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(&barrier)), "r"(0), "r"(token), "r"(head), "r"(page), "l"(policy)
      : "memory");
}

// ---- Clusters: thread blocks that reach into one another's shared memory.

__device__ inline int32_t cluster_rank() {
  int32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of a cluster meet. Arriving releases what a thread wrote, its words to other thread
// blocks too; after a relaxed arrival only the initialisation of barriers is seen.
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ inline void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The address in another thread block of what lies at `here` in this one.
__device__ inline uint32_t remote_address(const volatile void* here, int32_t rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(there)
      : "r"(shared_address(const_cast<const void*>(here))), "r"(rank));
  return there;
}

// Lands some time; the barrier, of the same thread block as the destination, counts its bytes.
__device__ inline void send(uint32_t to, const float4& value, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(to),
      "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(barrier)
      : "memory");
}

__device__ inline void send(uint32_t to, uint4 value, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(to),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(barrier)
      : "memory");
}
__device__ inline void send(uint32_t to, uint64_t value, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u64 [%0], %1, [%2];" ::"r"(to),
      "l"(value), "r"(barrier)
      : "memory");
}
__device__ inline void send(uint32_t to, int32_t value, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.s32 [%0], %1, [%2];" ::"r"(to),
      "r"(value), "r"(barrier)
      : "memory");
}

// A single word; it orders nothing else.
__device__ inline void send_word(uint32_t to, int32_t value) {
  asm volatile("st.relaxed.cluster.shared::cluster.s32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}

// Transposes an 8 x 8 matrix of 16-bit elements held by a warp.
__device__ inline uint32_t transposed(uint32_t pair) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

}  // namespace art::cuda::sm90
