// Entry points of the tensor-core kernels for sm_80 and newer, one per dtype and head size.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/online_softmax.h"
#include "core/params.h"
#include "core/termination.h"

namespace art::cuda::sm80 {

constexpr int kMaxGroup = 16;  // query heads per KV head
constexpr int kTileTokens = 64;
constexpr int kMaxWaveSteps = 32;  // one bit each in a stability mask
constexpr int kRingWaves = 4;

constexpr int32_t kFinished = INT32_MAX;

// Progress of an item that several thread blocks (its crew) compute. Zero before the launch.
struct CrewState {
  int32_t folded_waves;  // kFinished once no more steps are needed
  PatienceCounter patience;
};

struct Workspace {
  int32_t crew;        // thread blocks per item; 1: of what is below only kept_* is used
  int32_t wave_steps;  // steps that are folded at once, a multiple of crew
  int32_t max_waves;
  int32_t* kept_units;            // [items, crew, max_units], for explicit walks
  int32_t* kept_entries;          // [items, crew, max_units], where they were; null if nobody asks
  CrewState* state;               // [items]
  int32_t* arrivals;              // [items, max_waves], zero before the launch
  SoftmaxState* ring_softmax;     // [items, kRingWaves * wave_steps, group_size]
  float* ring_values;             // [items, kRingWaves * wave_steps, group_size, dim]
  SoftmaxState* running_softmax;  // [items, 2, group_size]
  float* running_values;          // [items, 2, group_size, dim]
};

// With `blocks`, prepares the kernel on the current device and tells how many thread blocks fit on
// one multiprocessor (0: none), instead of launching.
using Entry = cudaError_t (*)(const DecodeParams& params, const Workspace& workspace,
                              cudaStream_t stream, int* blocks);

cudaError_t run_bfloat16_64(const DecodeParams&, const Workspace&, cudaStream_t, int* blocks);
cudaError_t run_bfloat16_96(const DecodeParams&, const Workspace&, cudaStream_t, int* blocks);
cudaError_t run_bfloat16_128(const DecodeParams&, const Workspace&, cudaStream_t, int* blocks);
cudaError_t run_bfloat16_192(const DecodeParams&, const Workspace&, cudaStream_t, int* blocks);
cudaError_t run_bfloat16_256(const DecodeParams&, const Workspace&, cudaStream_t, int* blocks);
cudaError_t run_float16_64(const DecodeParams&, const Workspace&, cudaStream_t, int* blocks);
cudaError_t run_float16_96(const DecodeParams&, const Workspace&, cudaStream_t, int* blocks);
cudaError_t run_float16_128(const DecodeParams&, const Workspace&, cudaStream_t, int* blocks);
cudaError_t run_float16_192(const DecodeParams&, const Workspace&, cudaStream_t, int* blocks);
cudaError_t run_float16_256(const DecodeParams&, const Workspace&, cudaStream_t, int* blocks);

}  // namespace art::cuda::sm80
