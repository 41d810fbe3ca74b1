// Which groups are complete only the device knows. In most decode steps there are none, in a
// prefill thousands: every thread block of a grid that just fills the GPU counts those of its list
// of items (there is one list up to 1024), and the blocks of a list take them in turn, whichever
// sequence they belong to.
#include "cuda/encode_keys.h"

#include <algorithm>
#include <cstdint>

#include "core/coded_groups.h"
#include "core/item.h"
#include "core/key_codes.h"
#include "cuda/device.h"
#include "cuda/elements.cuh"

namespace art::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kItemsPerThread = 4;
constexpr int kListedItems = kItemsPerThread * kThreads;  // that one thread block knows of
constexpr int kChunkSteps = 4;
constexpr int kChunkChannels = 16 * kChunkSteps;  // that are encoded at a time
constexpr int kQuarters = kThreads / kChunkChannels;
constexpr int kChunkKeys = kGroupTokens * kChunkChannels / kThreads;  // of one thread
constexpr int kKeysInFlight = 8;
constexpr int kMaxRecordBytes = 320 * (kMaxCodeChannels / 16);

struct Shared {
  alignas(16) uint8_t record[kMaxRecordBytes];
  int64_t first_work[kListedItems + 1];  // new groups of the items before it; last, of all
  int64_t warp_work[kWarps];
  int32_t first_group[kListedItems];
  int64_t rows[kGroupTokens];  // element offsets of the keys of a group
  // An odd pitch: neither neighbouring tokens nor neighbouring channels share a bank.
  float keys[kGroupTokens][kChunkChannels + 1];
  float least[kQuarters][kChunkChannels];
  float most[kQuarters][kChunkChannels];
  float zero[kChunkChannels];
  float scale[kChunkChannels];
};

// new_groups() of lengths that nobody has checked: what the tables cannot hold is not read.
__device__ GroupRange groups_inside(const EncodeParams& params, int32_t item) {
  const int32_t heads = params.cache.num_kv_heads;
  const GroupRange groups = new_groups(params, item / heads, item % heads);
  const int32_t capacity = params.cache.max_pages * params.cache.page_size / kGroupTokens;
  const int32_t begin = groups.begin > 0 ? groups.begin : 0;
  const int32_t end = groups.end < capacity ? groups.end : capacity;
  return {begin, begin < end ? end : begin};
}

// Numbers the new groups of kListedItems items from `first_item` on. Returns how many there are.
__device__ int64_t list_groups(const EncodeParams& params, int32_t first_item, Shared& shared) {
  const int32_t items = params.cache.batch * params.cache.num_kv_heads;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  int32_t count[kItemsPerThread];
#pragma unroll
  for (int i = 0; i < kItemsPerThread; ++i) {
    const int32_t item = first_item + tid * kItemsPerThread + i;
    const GroupRange groups = item < items ? groups_inside(params, item) : GroupRange{0, 0};
    count[i] = groups.end - groups.begin;
    shared.first_group[tid * kItemsPerThread + i] = groups.begin;
  }
  int64_t sum = 0;
#pragma unroll
  for (int i = 0; i < kItemsPerThread; ++i) sum += count[i];
  int64_t until = sum;  // of this warp's threads up to this one
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int64_t before = __shfl_up_sync(~0u, until, distance);
    if (lane >= distance) until += before;
  }
  if (lane == 31) shared.warp_work[warp] = until;
  __syncthreads();
  int64_t next = until - sum, total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) next += shared.warp_work[w];
    total += shared.warp_work[w];
  }
#pragma unroll
  for (int i = 0; i < kItemsPerThread; ++i) {
    shared.first_work[tid * kItemsPerThread + i] = next;
    next += count[i];
  }
  if (tid == 0) shared.first_work[kListedItems] = total;
  __syncthreads();
  return total;
}

// The listed item that a new group belongs to: the last one that does not begin after it.
__device__ int item_of(const Shared& shared, int64_t work) {
  int low = 0, high = kListedItems;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (shared.first_work[middle] <= work ? low : high) = middle;
  }
  return low;
}

// Finds the keys of a group. False for all threads if a page is out of range.
__device__ bool find_rows(const DecodeParams& cache, int32_t batch, int32_t head, int32_t group,
                          bool valid, Shared& shared) {
  const int32_t* table = block_table_of(cache, batch, head);
  if (threadIdx.x < kGroupTokens) {
    const int32_t token = group * kGroupTokens + static_cast<int32_t>(threadIdx.x);
    const int64_t page = table[token / cache.page_size], in_page = token % cache.page_size;
    valid = valid && page >= 0 && page < cache.num_pages;
    shared.rows[threadIdx.x] = page * cache.key.page_stride + in_page * cache.key.token_stride +
                               head * cache.key.head_stride;
  }
  return __syncthreads_and(valid);
}

// Loads the keys of some steps. Neighbouring threads read what is contiguous.
template <DType kDType>
__device__ void load_chunk(const DecodeParams& cache, int32_t first_step, Shared& shared) {
  const bool tokens_last = cache.key.dim_stride != 1;
  const int tid = threadIdx.x;
  // A thread's keys are this far apart.
  const int32_t token_pitch = tokens_last ? 0 : kThreads / kChunkChannels;
  const int32_t channel_pitch = tokens_last ? kThreads / kGroupTokens : 0;
  const int32_t first_token = tokens_last ? tid % kGroupTokens : tid / kChunkChannels;
  const int32_t first_channel = tokens_last ? tid / kGroupTokens : tid % kChunkChannels;
  const int32_t channels = cache.head_dim - first_step * 16;
#pragma unroll 1
  for (int first = 0; first < kChunkKeys; first += kKeysInFlight) {
    float keys[kKeysInFlight];
#pragma unroll
    for (int i = 0; i < kKeysInFlight; ++i) {
      const int32_t token = first_token + (first + i) * token_pitch;
      const int32_t channel = first_channel + (first + i) * channel_pitch;
      keys[i] = 0.0f;  // of channels that fill up the last step
      if (channel >= channels) continue;
      keys[i] = element<kDType>(
          cache.key.data, shared.rows[token] + (first_step * 16 + channel) * cache.key.dim_stride);
    }
#pragma unroll
    for (int i = 0; i < kKeysInFlight; ++i) {
      const int32_t token = first_token + (first + i) * token_pitch;
      const int32_t channel = first_channel + (first + i) * channel_pitch;
      shared.keys[token][channel] = encodable(keys[i]);
    }
  }
  __syncthreads();
}

__device__ void put_half(uint8_t* to, uint16_t half) { *reinterpret_cast<uint16_t*>(to) = half; }

// Neither minimum nor maximum depends on the order of comparison: there is no NaN and one zero.
__device__ void choose_grid(const CodeLayout& layout, int32_t first_step, int32_t steps,
                            Shared& shared) {
  const int in_chunk = threadIdx.x % kChunkChannels, quarter = threadIdx.x / kChunkChannels;
  constexpr int kTokens = kGroupTokens / kQuarters;
  float least = shared.keys[quarter * kTokens][in_chunk], most = least;
#pragma unroll
  for (int t = 1; t < kTokens; ++t) {
    const float key = shared.keys[quarter * kTokens + t][in_chunk];
    least = key < least ? key : least;
    most = key > most ? key : most;
  }
  shared.least[quarter][in_chunk] = least;
  shared.most[quarter][in_chunk] = most;
  __syncthreads();
  if (quarter == 0 && in_chunk < steps * 16) {
#pragma unroll
    for (int q = 1; q < kQuarters; ++q) {
      const float low = shared.least[q][in_chunk], high = shared.most[q][in_chunk];
      least = low < least ? low : least;
      most = high > most ? high : most;
    }
    const CodeGrid grid = code_grid(least, most);
    const int32_t position = layout.position(first_step * 16 + in_chunk);
    put_half(shared.record + layout.scales_at() + 2 * position, grid.scale);
    put_half(shared.record + layout.zeros_at() + 2 * position, grid.zero);
    shared.scale[in_chunk] = float_of(grid.scale);
    shared.zero[in_chunk] = float_of(grid.zero);
  }
  __syncthreads();
}

// A thread makes whole fields: two tokens of four channels.
__device__ void write_codes(const CodeLayout& layout, int32_t first_step, int32_t steps,
                            Shared& shared) {
  constexpr int kFields = kGroupUnits * 32 * kChunkSteps;
  for (int field = threadIdx.x; field < kFields; field += kThreads) {
    const int step = field % kChunkSteps, lane = field / kChunkSteps % 32;
    const int unit = field / kChunkSteps / 32;
    if (step >= steps) continue;
    const int token = unit * kUnitTokens + lane / 4, in_chunk = step * 16 + lane % 4 * 2;
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int channel = in_chunk + i % 2 + i / 2 % 2 * 8, half = i / 4;
      const uint32_t code = code_of(shared.keys[token + 8 * half][channel], shared.zero[channel],
                                    shared.scale[channel]);
      bits |= code << (8 * half + CodeLayout::shift(channel));
    }
    put_half(shared.record + layout.byte(token, first_step * 16 + in_chunk),
             static_cast<uint16_t>(bits));
  }
  __syncthreads();
}

// The whole thread block encodes one group. Where two sequences share a record, both write the
// same bytes.
template <DType kDType>
__device__ void encode_group(const EncodeParams& params, int32_t item, int32_t group,
                             Shared& shared) {
  const DecodeParams& cache = params.cache;
  const int32_t batch = item / cache.num_kv_heads, head = item % cache.num_kv_heads;
  const CodeLayout layout(cache.head_dim);
  const int64_t page = code_table_of(params.codes, batch, head)[group];
  const bool valid = page >= 0 && page < params.codes.num_pages;
  if (!find_rows(cache, batch, head, group, valid, shared)) return;
  for (int32_t first = 0; first < layout.steps; first += kChunkSteps) {
    const int32_t left = layout.steps - first, steps = left < kChunkSteps ? left : kChunkSteps;
    load_chunk<kDType>(cache, first, shared);
    choose_grid(layout, first, steps, shared);
    write_codes(layout, first, steps, shared);
  }
  uint4* record = reinterpret_cast<uint4*>(record_of(params.codes, page, head));
  const int32_t pieces = layout.record_bytes() / static_cast<int32_t>(sizeof(uint4));
  for (int32_t i = threadIdx.x; i < pieces; i += kThreads) {
    record[i] = reinterpret_cast<const uint4*>(shared.record)[i];
  }
}

template <DType kDType>
__global__ void __launch_bounds__(kThreads, 4)
    encode_kernel(const __grid_constant__ EncodeParams params) {
  __shared__ Shared shared;
  const int32_t first_item = static_cast<int32_t>(blockIdx.y) * kListedItems;
  const int64_t total = list_groups(params, first_item, shared);
  for (int64_t work = blockIdx.x; work < total; work += gridDim.x) {
    const int listed = item_of(shared, work);
    const int32_t group =
        shared.first_group[listed] + static_cast<int32_t>(work - shared.first_work[listed]);
    encode_group<kDType>(params, first_item + listed, group, shared);
  }
}

template <DType kDType>
cudaError_t launch(const EncodeParams& params, cudaStream_t stream) {
  static ResidencyCache<1> cache;
  Residency residency;
  const cudaError_t error = cache.get(
      0,
      [](int* blocks) {
        return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, encode_kernel<kDType>,
                                                             kThreads, 0);
      },
      &residency);
  if (error != cudaSuccess) return error;
  const int64_t items = int64_t{params.cache.batch} * params.cache.num_kv_heads;
  const int64_t lists = (items + kListedItems - 1) / kListedItems;
  const int64_t groups = int64_t{params.cache.max_pages} * params.cache.page_size / kGroupTokens;
  // What is launched is also what starts in vain, in nearly every step.
  const int64_t resident = std::max<int64_t>(1, residency.total() / lists);
  const int64_t blocks = std::min(resident, groups * std::min<int64_t>(items, kListedItems));
  if (blocks == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(lists));
  encode_kernel<kDType><<<grid, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_encode(const EncodeParams& params, cudaStream_t stream) {
  if (params.cache.batch == 0) return cudaSuccess;
  switch (params.cache.dtype) {
    case DType::kFloat32:
      return launch<DType::kFloat32>(params, stream);
    case DType::kFloat16:
      return launch<DType::kFloat16>(params, stream);
    default:
      return launch<DType::kBFloat16>(params, stream);
  }
}

}  // namespace art::cuda
