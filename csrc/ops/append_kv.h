// append_kv: from the operator's arguments to AppendParams. Shared by all devices.
#pragma once

#include <optional>

#include <torch/csrc/stable/tensor.h>

#include "core/params.h"

namespace art {

using torch::stable::Tensor;

struct AppendPair {
  AppendParams key;
  AppendParams value;
};

AppendPair check_append(const Tensor& key, const Tensor& value, const Tensor& key_cache,
                        const Tensor& value_cache, const Tensor& slot_mapping,
                        const std::optional<Tensor>& key_scale,
                        const std::optional<Tensor>& value_scale);

// Slots are data: the host must be able to read them.
void check_slots(const AppendParams& params, int64_t num_pages);

}  // namespace art
