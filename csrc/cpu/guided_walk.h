// Guided walks on the CPU, without torch: the caller owns the workspace and the threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/params.h"

namespace art::cpu {

// Bytes that a worker needs beside the results.
size_t guided_bytes(const GuidedParams& params);

// Threads worth waking.
int64_t guided_workers(const GuidedParams& params, int64_t num_threads);

// Orders the units of one (sequence, KV head): batch * num_kv_heads + kv_head. `memory`, of
// guided_bytes() from a cache line on, belongs to this worker alone.
void guide_item(const GuidedParams& params, int64_t index, void* memory);

}  // namespace art::cpu
