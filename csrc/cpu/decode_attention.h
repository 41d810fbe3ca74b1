// CPU decode attention, without torch: the caller owns the workspace and the threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/params.h"

namespace art::cpu {

// Steps per chunk, and the memory that a call needs.
struct DecodePlan {
  int64_t num_items;     // batch * num_kv_heads
  int64_t chunk_steps;   // steps that one task computes
  int64_t max_chunks;    // of the longest item
  int64_t stored_steps;  // per item: results that may wait for earlier chunks
  int64_t num_workers;
  size_t workspace_bytes;
};

// `num_splits` 0 lets the schedule decide; otherwise every item is cut into about that many
// chunks. The cut never changes a result.
DecodePlan plan_decode(const DecodeParams& params, int64_t num_threads, int64_t num_splits);

// Prepares the workspace (64-byte aligned); called once, before any worker.
void begin_decode(const DecodeParams& params, const DecodePlan& plan, void* workspace);

// Computes tasks until none is left. Every worker in [0, num_workers) must be run, in any order
// and on any thread; none waits for another.
void run_decode_worker(const DecodeParams& params, const DecodePlan& plan, void* workspace,
                       int64_t worker);

}  // namespace art::cpu
