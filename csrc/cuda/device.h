// What the host knows about the current device, asked once.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

namespace art::cuda {

// Multiprocessors, and how many thread blocks of a kernel fit on one of them, or clusters of a
// kernel on the device (0: it cannot run).
struct Residency {
  int32_t multiprocessors;
  int32_t blocks;

  int64_t total() const { return int64_t{multiprocessors} * blocks; }
};

// Remembers the residency of `kKernels` kernels on every device. `prepare(int* blocks)` is called
// the first time, with the device current.
template <int kKernels>
class ResidencyCache {
 public:
  template <class Prepare>
  cudaError_t get(int kernel, const Prepare& prepare, Residency* residency) {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    std::atomic<int64_t>& known = known_[device % kDevices][kernel];
    int64_t word = known.load(std::memory_order_relaxed);
    if (word == 0) {
      int multiprocessors = 0, blocks = 0;
      error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
      if (error == cudaSuccess) error = prepare(&blocks);
      if (error != cudaSuccess) return error;
      word = int64_t{multiprocessors} << 32 | blocks;
      known.store(word, std::memory_order_relaxed);
    }
    *residency = {static_cast<int32_t>(word >> 32), static_cast<int32_t>(word & 0xffffffff)};
    return cudaSuccess;
  }

 private:
  static constexpr int kDevices = 64;
  std::atomic<int64_t> known_[kDevices][kKernels] = {};
};

}  // namespace art::cuda
