// New tensors beside others, from torch's allocator for their device: recorded in CUDA graphs like
// any other. torch::stable::new_empty() looks its operator up by name at each call, and a short
// decode attention consists of such calls.
#pragma once

#include <cstdint>
#include <initializer_list>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include "cpu/arena.h"
#include "ops/check.h"

namespace art {

// Uninitialised and contiguous, on the device of `beside`. Four dimensions at most.
inline Tensor new_empty(const Tensor& beside, std::initializer_list<int64_t> shape,
                        ScalarType dtype) {
  int64_t strides[4];
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    const int64_t size = shape.begin()[i];
    stride *= size > 1 ? size : 1;
  }
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(beside.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(beside.get(), &device_index));
  const auto dims = static_cast<int64_t>(shape.size());
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle tensor;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, shape.begin(), strides, type, device_type,
                                                  device_index, &tensor));
  return Tensor(tensor);
}

// Memory of the CPU that starts where a cpu::Arena has to.
struct Workspace {
  Tensor owner;
  char* memory;
};

inline Workspace aligned_workspace(const Tensor& beside, int64_t bytes) {
  constexpr int64_t kAlignment = cpu::Arena::kAlignment;
  const Tensor owner = new_empty(beside, {bytes + kAlignment}, ScalarType::Byte);
  const auto address = reinterpret_cast<uintptr_t>(owner.mutable_data_ptr());
  return {owner, reinterpret_cast<char*>((address + kAlignment - 1) / kAlignment * kAlignment)};
}

}  // namespace art
