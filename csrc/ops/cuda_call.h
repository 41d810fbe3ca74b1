// What every CUDA operator needs of torch: the stream, and errors that say what to do.
#pragma once

#include <cuda_runtime_api.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "ops/check.h"

namespace art {

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Not messages that start with the operator's name: no argument is wrong, and Python shall raise a
// RuntimeError.
inline void check_launch(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    fail_check("art_torch: ", op, ": built without kernels for this GPU; rebuild art_torch with ",
               "ART_CUDA_ARCHS set to the GPU's compute capability");
  }
  fail_check("art_torch: ", op, ": CUDA kernel launch failed: ", cudaGetErrorString(error));
}

// A contiguous copy where the host can read it. Waits for the device.
inline Tensor on_host(const Tensor& tensor) {
  return torch::stable::contiguous(
      torch::stable::to(tensor, torch::stable::Device(torch::headeronly::DeviceType::CPU)));
}

}  // namespace art
