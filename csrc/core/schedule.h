// How a walk is cut: into steps that are folded one after the other, and steps into chunks that
// may be computed anywhere, at any time. Pure functions; none of them looks at a tensor.
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "core/walk.h"

namespace art {

// A step is what is folded into the running output at once: a block of the walk, or one
// block-sized piece of the starting output (the pinned units). The cut depends on the walk alone,
// so every schedule folds the same steps in the same order.
struct StepSchedule {
  int32_t num_units;
  int32_t num_pinned;
  int32_t units_per_block;
  int32_t num_start_steps;
  int32_t num_steps;

  ART_HD StepSchedule(const Walk& walk, int32_t block_size, int32_t unit_size)
      : num_units(walk.num_units),
        num_pinned(walk.num_pinned),
        units_per_block(block_size / unit_size) {
    num_start_steps = ceil_div(num_pinned, units_per_block);
    num_steps = num_start_steps + ceil_div(num_units - num_pinned, units_per_block);
  }

  struct Positions {
    int32_t begin;
    int32_t end;
  };

  // Walk positions of a step.
  ART_HD Positions positions(int32_t step) const {
    const bool start = step < num_start_steps;
    const int32_t origin = start ? 0 : num_pinned;
    const int32_t limit = start ? num_pinned : num_units;
    const int32_t begin = origin + (start ? step : step - num_start_steps) * units_per_block;
    const int32_t end = limit - begin > units_per_block ? begin + units_per_block : limit;
    return {begin, end};
  }

  // Index j of the block that the step completes. Block 0 is the starting output: the pinned
  // units, or the first block where none are pinned.
  ART_HD int32_t block_of(int32_t step) const {
    if (num_start_steps == 0) return step;
    return step < num_start_steps ? 0 : step - num_start_steps + 1;
  }

  // The starting output may take several steps, every other block is one.
  ART_HD bool completes_block(int32_t step) const { return step + 1 >= num_start_steps; }

  ART_HD static int32_t ceil_div(int32_t a, int32_t b) { return a / b + (a % b != 0); }
};

// Steps in one chunk of work on a CPU. A chunk per item while items alone keep the threads busy;
// below that, about eight chunks a thread (so that uneven items still balance), of at least 16
// steps (one chunk costs about 2 us of bookkeeping, 16 steps of 64 tokens 20 us or more).
ART_HD int64_t cpu_chunk_steps(int64_t num_items, int64_t total_steps, int64_t max_steps,
                               int64_t num_threads) {
  constexpr int64_t kMinSteps = 16;
  constexpr int64_t kChunksPerThread = 8;
  if (num_threads == 1) return max_steps;
  if (num_items >= kChunksPerThread * num_threads && max_steps * num_threads <= total_steps) {
    return max_steps;
  }
  const int64_t balanced = total_steps / (kChunksPerThread * num_threads) + 1;
  return balanced > kMinSteps ? balanced : kMinSteps;
}

// Thread blocks of the kernels for sm_80 that compute one item. One while the items alone fill the
// device; below that as many as fit beside each other, but no more than a wave of steps (one bit
// each in a mask) and no more than there are steps to share.
ART_HD int32_t cuda_crew(int64_t num_items, int64_t resident_blocks, int64_t max_steps,
                         int32_t max_wave_steps) {
  int64_t crew = resident_blocks / (num_items < 1 ? 1 : num_items);
  if (crew > max_wave_steps) crew = max_wave_steps;
  if (crew > max_steps) crew = max_steps;
  return crew < 1 ? 1 : static_cast<int32_t>(crew);
}

// Thread blocks of a cluster that computes one item on a GPU, each on a multiprocessor of its own:
// as many as let all clusters run at once. Large clusters fit the device badly, and those that wait
// for a place take as long again (H200, which holds 66 of two, but 30 of four and 15 of eight; 32k
// tokens of 8 heads of 128: 24 items take 157 us in twos and 105 in fours, 32 items 165 in twos and
// 198 in fours). No more than a quarter of the steps there are to share, but always pairs where
// these fit. Small heads keep a lone thread block from reading fast enough, so that pairs are worth
// it even if half of them wait, unless the steps are few and may not all be read (96 items of heads
// of 64, in pairs and alone: all of 8k tokens 66 and 94 us, a fifth of them 38 and 27, of 32k 69
// and 82). `max_clusters`: clusters of 2, 4 and 8 that the device holds. 0: one thread block per
// item is better.
ART_HD int32_t cuda_cluster_blocks(int64_t num_items, int64_t max_steps, bool may_stop,
                                   int32_t head_dim, const int32_t (&max_clusters)[3]) {
  for (int i = 2; i >= 0; --i) {
    const int32_t blocks = 2 << i;
    const bool has_steps = i == 0 || 4 * blocks <= max_steps;
    const bool may_wait = i == 0 && head_dim <= 64 && (!may_stop || max_steps >= 256);
    if (has_steps && num_items <= (may_wait ? 2 : 1) * max_clusters[i]) return blocks;
  }
  return 0;
}

// Warps of each of these thread blocks that fill its stages, of `most`. One of them needs 0.6 us
// for a step, and small steps are gone sooner; for the others a second one pays off where there are
// enough steps (H200, heads of 128: 32 items of 8k tokens take 46 instead of 51 us, 8 of them 18.6
// instead of 17.4).
ART_HD int32_t cuda_cluster_producers(int32_t most, int64_t steps_per_block, int32_t head_dim) {
  return head_dim <= 64 || steps_per_block >= 32 ? most : 1;
}

// Thread blocks, as a power of two, of a cluster that orders the units of one guided walk. Ordering
// is a chain of short passes that wait for one another: twice as many thread blocks halve each
// pass, and cost a message to the farthest of them between two of them. A thread block of fewer
// than 512 units would have lanes without any; and all clusters should run at once, for one that
// begins when another has ended takes as long again (H200, behind the scores: 8 items of 8192 units
// take 24.9, 12.9, 9.9 and 7.9 us with 1, 2, 4 and 8 thread blocks, 64 items 30, 14, 15 and 18 us).
// `max_clusters`: of 2, 4 and 8 that the device holds.
ART_HD int32_t order_crew_log2(int64_t num_items, int64_t max_units,
                               const int32_t (&max_clusters)[3]) {
  constexpr int64_t kLeastUnits = 512;
  for (int32_t log2 = 3; log2 > 0; --log2) {
    if (max_units >= kLeastUnits << log2 && num_items <= max_clusters[log2 - 1]) return log2;
  }
  return 0;
}

// Warps of each of these thread blocks. As many as find a vector of eight units for every lane, for
// the passes are short chains of loads. But all warps run through the same thousand instructions,
// whatever they find: sixteen warps keep a multiprocessor busy, and more of them only add to that.
ART_HD int32_t order_warps(int64_t num_blocks, int64_t block_units, int64_t group_size,
                           int64_t multiprocessors) {
  int32_t warps = 16;
  while (warps > 2 && (num_blocks * warps > 16 * multiprocessors ||
                       block_units * group_size <= 32 * 8 * warps / 2)) {
    warps /= 2;
  }
  return warps;
}

constexpr int32_t kMaxBatchLog2 = 3;
constexpr int32_t kMaxRingLog2 = 3;

// Sizes of what the thread blocks of a cluster exchange, as powers of two.
struct CudaExchange {
  int32_t batch_log2;    // steps that are folded and judged at once: 8 at most
  int32_t ring_log2;     // batches whose results wait to be folded, or for the verdict on them
  int32_t pending_log2;  // batches that may wait for their verdict
  int32_t inbox_log2;    // of those, batches whose moments one thread block keeps

  ART_HD int32_t batch_steps() const { return 1 << batch_log2; }
  ART_HD int32_t ring_batches() const { return 1 << ring_log2; }
  ART_HD int32_t pending() const { return 1 << pending_log2; }
  ART_HD int32_t inbox_batches() const { return 1 << inbox_log2; }
  ART_HD int32_t batch_of(int32_t step) const { return step >> batch_log2; }
  ART_HD int32_t num_batches(int32_t num_steps) const {
    return (num_steps + batch_steps() - 1) >> batch_log2;
  }
  ART_HD int32_t steps_in(int32_t batch, int32_t num_steps) const {
    const int32_t left = num_steps - (batch << batch_log2);
    return left < batch_steps() ? left : batch_steps();
  }
  ART_HD int32_t slot_of(int32_t step) const {
    return step & ((1 << (batch_log2 + ring_log2)) - 1);
  }
  // Where a batch lies, and the parity of its barriers there.
  ART_HD int32_t ring_place(int32_t batch) const { return batch & (ring_batches() - 1); }
  ART_HD uint32_t ring_parity(int32_t batch) const { return batch >> ring_log2 & 1; }
  ART_HD int32_t pending_place(int32_t batch) const { return batch & (pending() - 1); }
};

// The largest that fit into `room` bytes. A slot holds a step's result, an inbox the moments of a
// step. Up to `max_pending_log2` batches wait for their verdict; the thread blocks judge in turn.
ART_HD CudaExchange cuda_exchange(int32_t blocks_log2, int64_t slot_bytes, int64_t inbox_bytes,
                                  int64_t room, int32_t max_pending_log2) {
  for (int32_t batch = kMaxBatchLog2; batch > 0; --batch) {
    for (int32_t ring = kMaxRingLog2; ring >= 2; --ring) {
      for (int32_t pending = max_pending_log2 < ring ? max_pending_log2 : ring; pending >= 0;
           --pending) {
        const int32_t inbox = pending > blocks_log2 ? pending - blocks_log2 : 0;
        const int64_t bytes = ((slot_bytes << ring) + (inbox_bytes << inbox)) << batch;
        if (bytes <= room) return {batch, ring, pending, inbox};
      }
    }
  }
  return {0, 1, 0, 0};
}

// Waking another thread costs about 5 us, as much as three steps of 64 tokens and four heads.
ART_HD int64_t cpu_workers(int64_t num_tasks, int64_t total_steps, int64_t num_threads) {
  constexpr int64_t kStepsPerWorker = 6;
  int64_t workers = total_steps / kStepsPerWorker;
  if (workers > num_threads) workers = num_threads;
  if (workers > num_tasks) workers = num_tasks;
  return workers > 1 ? workers : 1;
}

}  // namespace art
