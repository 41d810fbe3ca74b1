// Key codes on the CPU, without torch.
#pragma once

#include <cstdint>

#include "core/params.h"

namespace art::cpu {

// Encodes the new groups of one (sequence, KV head): batch * num_kv_heads + kv_head.
void encode_item(const EncodeParams& params, int64_t index);

}  // namespace art::cpu
