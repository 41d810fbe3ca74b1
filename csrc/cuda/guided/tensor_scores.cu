#include "cuda/guided/tensor_scores.cuh"

#include <algorithm>

#include "cuda/device.h"
#include "cuda/early_start.h"
#include "cuda/sizes.h"

namespace art::cuda::guided {
namespace {

// Splitting the queries costs a thread block as much as about two groups. This many for a warp make
// up for it, and leave thread blocks short beside the whole;
constexpr int32_t kWarpGroups = 16;
// up to so many are better than thread blocks that begin when most others have ended.
constexpr int32_t kMostWarpGroups = 64;
static_assert(kMostWarpGroups <= 64 && kMostWarpGroups % 2 == 0);  // see `doubtful`

ART_HD int32_t num_tiles(int32_t group_size) { return (group_size + kTileHeads - 1) / kTileHeads; }

// How an item is shared out. Its first thread block takes what follows the last complete group.
struct Split {
  int32_t blocks;       // for the groups, at most
  int32_t fill;         // so many are used however few groups there are, or some would be idle
  int32_t warp_groups;  // more groups than these for each warp of those use more thread blocks
};

// `resident`: thread blocks that the device runs at a time. `groups`: that the block
// table has room for. Thread blocks for tails are not counted.
Split make_split(int64_t items, int64_t groups, int64_t resident, int64_t warps) {
  const int64_t most = std::max<int64_t>((groups + warps - 1) / warps, 1);  // a group a warp
  const int64_t fill = std::clamp<int64_t>(resident / items, 1, most);
  const bool fills_once = items * fill <= resident && items * fill * 8 >= resident * 7;
  const int64_t warp_groups =
      fills_once && groups <= fill * warps * kMostWarpGroups ? kMostWarpGroups : kWarpGroups;
  const int64_t busy = (groups + warps * warp_groups - 1) / (warps * warp_groups);
  return {static_cast<int32_t>(std::max(fill, busy)), static_cast<int32_t>(fill),
          static_cast<int32_t>(warp_groups)};
}

// The groups of one warp. Which they are changes no bit: a group's result depends on it alone.
struct WarpGroups {
  int32_t begin;
  int32_t end;
  bool block_has_any;

  // `at_once`: of how many groups a warp's share is a multiple.
  __device__ WarpGroups(const Target& target, Split split, int32_t block, int32_t warps,
                        int32_t at_once) {
    const int32_t groups = target.num_groups();
    const int32_t block_groups = warps * split.warp_groups;
    int32_t used = (groups + block_groups - 1) / block_groups;
    used = used > split.fill ? used : split.fill;
    used = used < split.blocks ? used : split.blocks;
    int32_t share = (groups + used * warps - 1) / (used * warps);
    share = (share + at_once - 1) / at_once * at_once;
    const int32_t number = block * warps + static_cast<int32_t>(threadIdx.x) / 32;
    // Whoever is beyond the last begins beyond it.
    const int64_t first = int64_t{number} * share, last = first + share;
    block_has_any = int64_t{block} * warps * share < groups;
    begin = target.groups.begin + static_cast<int32_t>(first < groups ? first : groups);
    end = target.groups.begin + static_cast<int32_t>(last < groups ? last : groups);
  }
};

// The records of one KV head. A page out of range counts as one of zeros.
struct Records {
  const uint8_t* first;
  int64_t page_stride;
  uint32_t num_pages;

  __device__ Records(const CodePool& codes, int32_t head)
      : first(record_of(codes, 0, head)),
        page_stride(codes.page_stride),
        num_pages(codes.num_pages < INT32_MAX ? static_cast<uint32_t>(codes.num_pages)
                                              : uint32_t{INT32_MAX} + 1) {}

  // Starts the copy of a record.
  template <int kSteps>
  __device__ void copy(int32_t page, uint8_t* to) const {
    const bool exists = static_cast<uint32_t>(page) < num_pages;
    constexpr int kPieces = TensorSizes<kSteps>::kRecordBytes / 16;
    const int lane = threadIdx.x % 32;
    const uint8_t* from = first + (exists ? page : 0) * page_stride + 16 * lane;
    to += 16 * lane;
#pragma unroll
    for (int i = 0; i < kPieces; i += 32) {
      if (i + 32 > kPieces && lane >= kPieces - i) continue;
      copy_async(to + 16 * i, from + 16 * i, exists);
    }
  }
};

static_assert(kMaxTensorGroup == kMaxTiles * kTileHeads);

template <int kSteps, bool kPacked, bool kExtras>
__global__ void __launch_bounds__(TensorSizes<kSteps>::kThreads, !kPacked && kSteps <= 8 ? 5 : 3)
    tensor_kernel(const __grid_constant__ GuidedParams guided, const Workspace space,
                  const Split split) {
  using Sizes = TensorSizes<kSteps>;
  using Ring = RecordRing<kSteps, kPacked>;
  static_assert(!kPacked || Sizes::kWarps == kPackedHeads);  // each warp splits one head
  constexpr int kHeads = kLaneHeads<kPacked>, kGroups = kGroupsAtOnce<kPacked>;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ float factors[kMaxTiles * kTileHeads];
  let_next_kernel_start();
  const int32_t block = static_cast<int32_t>(blockIdx.x) % (split.blocks + 1) - 1;
  const Target target(guided, static_cast<int32_t>(blockIdx.x) / (split.blocks + 1));
  // What everybody waits for is asked for first.
  const int32_t warp = static_cast<int32_t>(threadIdx.x) / 32;
  const HeadWords<Sizes::kPairs> words(guided.attention, target, warp);
  if (block < 0) {
    if (!target.has_tail()) return;
    const int32_t origin = target.visible.end / kGroupTokens * kGroupTokens;
    score_plainly(guided, target, origin, /*is_coded=*/false, space,
                  *reinterpret_cast<PlainShared*>(memory));
    return;
  }
  const WarpGroups groups(target, split, block, Sizes::kWarps, kGroups);
  if (!groups.block_has_any) return;

  const int32_t* table = code_table_of(guided.codes, target.batch, target.kv_head);
  const auto page_of_group = [&](int32_t group) { return group < groups.end ? table[group] : -1; };
  const Records records(guided.codes, target.kv_head);
  uint8_t* ring = memory + warp * Ring::kBytes;
  // The pages of a stage that is not asked for yet.
  int32_t pages[kGroups];
  const auto find_pages = [&](int32_t group) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) pages[i] = page_of_group(group + i);
  };
  const auto copy_stage = [&](int32_t group, uint8_t* stage) {
#pragma unroll
    for (int i = 0; i < kGroups && group < groups.end; ++i) {
      records.copy<kSteps>(pages[i], stage + i * Sizes::kRecordBytes);
    }
    sm80::commit_copies();
  };
#pragma unroll
  for (int s = 0; s < Ring::kStages; ++s) {
    find_pages(groups.begin + s * kGroups);
    copy_stage(groups.begin + s * kGroups, ring + s * Ring::kStageBytes);
  }
  find_pages(groups.begin + Ring::kStages * kGroups);
  QueryPair* query = reinterpret_cast<QueryPair*>(memory + Sizes::kWarps * Ring::kBytes);
  const int32_t tiles = kPacked ? 1 : num_tiles(guided.attention.group_size);
  words.template split<kPacked>(warp, factors + warp, query);
  if constexpr (!kPacked) {
    for (int32_t g = warp + Sizes::kWarps; g < tiles * kTileHeads; g += Sizes::kWarps) {
      const HeadWords<Sizes::kPairs> more(guided.attention, target, g);
      more.template split<kPacked>(g % kTileHeads, factors + g,
                                   query + g / kTileHeads * Sizes::kPairs);
    }
  }
  __syncthreads();
  bool is_careful = false;
  for (int g = 0; g < (kPacked ? kPackedHeads : tiles * kTileHeads); ++g) {
    is_careful |= !(factors[g] <= kLargeFactor);
  }
  const DecodeParams& params = guided.attention;
  // What this lane ends with: a unit of one head, in the group that far on.
  const int row = threadIdx.x % 32 / 4, in_tile = threadIdx.x % 4 * kHeads;
  const int32_t own_head = kPacked ? in_tile : in_tile + row / kGroupUnits;
  const int32_t own_group = kPacked ? row / kGroupUnits : 0;
  int16_t* scores = space.unit_lse + own_group * kGroupUnits + row % kGroupUnits +
                    (int64_t{target.index} * params.group_size + own_head) * space.unit_stride;

  // Whether the sums of this lane's group were good.
  const auto score_stage = [&]<bool kCareful>(int32_t group, const uint8_t* stage, bool stores) {
    bool is_good = true;
    for (int32_t tile = 0; tile < tiles; ++tile) {
      const int32_t first_head = tile * kTileHeads;
      float of_heads[kHeads];
#pragma unroll
      for (int h = 0; h < kHeads; ++h) of_heads[h] = factors[first_head + in_tile + h];
      const UnitScore score = score_groups<kSteps, kPacked, kExtras, kCareful>(
          params, target, group, stage, query + tile * Sizes::kPairs, first_head + in_tile,
          of_heads);
      is_good = is_good && score.is_good;
      if (stores && group + own_group < groups.end && first_head + own_head < params.group_size) {
        scores[int64_t{first_head} * space.unit_stride + group * kGroupUnits] = score.steps;
      }
    }
    return is_good;
  };

  // A bit for each group that has to be scored again. That is rare, and its code lies elsewhere.
  uint64_t doubtful = is_careful ? ~uint64_t{0} : 0;
  uint8_t* stage = ring;
  for (int32_t group = is_careful ? groups.end : groups.begin; group < groups.end;
       group += kGroups) {
    sm80::wait_copies<Ring::kStages - 1>();
    __syncwarp();  // all lanes' pieces are there
    const bool is_good = score_stage.template operator()<false>(group, stage, true);
    const bool is_doubtful = !is_good && group + own_group < groups.end;
    if (is_doubtful) doubtful |= uint64_t{1} << (group + own_group - groups.begin);
    __syncwarp();  // all lanes have read it
    const int32_t next = group + Ring::kStages * kGroups;
    copy_stage(next, stage);
    find_pages(next + kGroups);
    stage += Ring::kStageBytes;
    if (stage == ring + Ring::kBytes) stage = ring;
  }
  if (!__any_sync(~0u, doubtful != 0)) return;
  doubtful |= __shfl_xor_sync(~0u, doubtful, 16);  // lanes of the other group
  sm80::wait_copies<0>();
  for (int32_t group = groups.begin; group < groups.end; group += kGroups) {
    const uint64_t of_groups = doubtful >> (group - groups.begin);
    if ((of_groups & ((1 << kGroups) - 1)) == 0) continue;
    __syncwarp();
    find_pages(group);
    copy_stage(group, ring);
    sm80::wait_copies<0>();
    __syncwarp();
    score_stage.template operator()<true>(group, ring, of_groups >> own_group & 1);
  }
}

template <int kSteps, bool kPacked, bool kExtras>
cudaError_t launch(const GuidedParams& params, const Workspace& space, cudaStream_t stream) {
  const auto kernel = tensor_kernel<kSteps, kPacked, kExtras>;
  using Sizes = TensorSizes<kSteps>;
  using Ring = RecordRing<kSteps, kPacked>;
  static ResidencyCache<kMaxTiles> cache;
  const int32_t tiles = kPacked ? 1 : num_tiles(params.attention.group_size);
  const size_t shared_bytes = Ring::shared_bytes(tiles);
  Residency residency;
  const cudaError_t error = cache.get(
      tiles - 1,
      [kernel, shared_bytes](int* blocks) {
        const cudaError_t failure =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(Ring::shared_bytes(kPacked ? 1 : kMaxTiles)));
        if (failure != cudaSuccess) return failure;
        return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, Sizes::kThreads,
                                                             shared_bytes);
      },
      &residency);
  if (error != cudaSuccess) return error;
  const int64_t items = num_items(params.attention);
  const Split split =
      make_split(items, params.max_units / kGroupUnits, residency.total(), Sizes::kWarps);
  const unsigned blocks = static_cast<unsigned>(items * (split.blocks + 1));
  kernel<<<blocks, Sizes::kThreads, shared_bytes, stream>>>(params, space, split);
  return cudaGetLastError();
}

}  // namespace

bool can_use_tensors(const GuidedParams& params) {
  switch (params.attention.head_dim) {
    case 64:
    case 96:
    case 128:
    case 192:
    case 256:
      return params.attention.group_size <= kMaxTensorGroup;
    default:
      return false;
  }
}

namespace {

// Whether a logit can be anything but the product of query and key, or a token of a group with
// codes be invisible. Other kernels do without the code for it.
bool has_extras(const DecodeParams& params) {
  return changes_logits(params) || params.sliding_window > 0 || params.seq_starts != nullptr;
}

template <int kSteps>
cudaError_t launch(const GuidedParams& params, const Workspace& space, cudaStream_t stream) {
  const bool packed = params.attention.group_size <= kPackedHeads;
  if (has_extras(params.attention)) {
    return packed ? launch<kSteps, true, true>(params, space, stream)
                  : launch<kSteps, false, true>(params, space, stream);
  }
  return packed ? launch<kSteps, true, false>(params, space, stream)
                : launch<kSteps, false, false>(params, space, stream);
}

}  // namespace

cudaError_t score_tensors(const GuidedParams& params, const Workspace& space, cudaStream_t stream) {
  switch (params.attention.head_dim) {
    case 64:
      return launch<4>(params, space, stream);
    case 96:
      return launch<6>(params, space, stream);
    case 128:
      return launch<8>(params, space, stream);
    case 192:
      return launch<12>(params, space, stream);
    case 256:
      return launch<16>(params, space, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace art::cuda::guided
