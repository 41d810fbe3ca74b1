// Kernels that start while the one before them in the stream still runs (programmatic dependent
// launch, from sm_90 on): they get ready, and wait before they touch any memory that an earlier
// kernel may write or read. The one before says when; without a word, that is when it ends.
//
// A kernel that lets the next one start has waited itself, or was launched without early_start()
// and so began when its predecessor had ended. Therefore only one kernel before an early one can
// still be running, and what that one does not write may be read at once.
#pragma once

#include <cuda_runtime_api.h>

namespace art::cuda {

#if defined(__CUDACC__)
// Nothing happens in a kernel that was launched without early_start().
__device__ inline void wait_for_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel starts when all thread blocks have said so or ended: none of them can be kept
// from running by it.
__device__ inline void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#endif

// For kernels compiled for sm_90 or newer that call wait_for_kernel_before(). Older drivers cannot
// record it in a graph.
inline cudaLaunchAttribute early_start() {
  static const bool can_be_recorded = [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess && version >= 12030;
  }();
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = can_be_recorded;
  return attribute;
}

}  // namespace art::cuda
