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

// Thread blocks that compute one item on a GPU. One while the items alone fill the device; below
// that as many as fit beside each other, but no more than a wave of steps (one bit each in a mask)
// and no more than there are steps to share.
ART_HD int32_t cuda_crew(int64_t num_items, int64_t resident_blocks, int64_t max_steps,
                         int32_t max_wave_steps) {
  int64_t crew = resident_blocks / (num_items < 1 ? 1 : num_items);
  if (crew > max_wave_steps) crew = max_wave_steps;
  if (crew > max_steps) crew = max_steps;
  return crew < 1 ? 1 : static_cast<int32_t>(crew);
}

// Whether one thread block per item keeps a GPU's memory busy: from three blocks on four
// multiprocessors on.
ART_HD bool cuda_runs_solo(int64_t num_items, int64_t multiprocessors) {
  return 4 * num_items >= 3 * multiprocessors;
}

// Teams of thread blocks on a GPU: as many as there are items, as long as two thread blocks for
// each fit beside each other.
struct CudaTeams {
  int32_t teams;
  int32_t workers;      // of each team, besides the thread block that folds
  int32_t claim_steps;  // that a worker claims at once
  int32_t ring_steps;   // steps that may wait for the fold, a power of two
};

// A worker takes 1.1 us for a step of 64 tokens, folding takes 0.14 us (0.3 with a criterion; H200,
// head_dim 128): more than eight workers only read further past a stop. `num_splits` other than 0
// sets the workers of each team.
ART_HD CudaTeams cuda_teams(int64_t num_items, int64_t multiprocessors, int64_t resident_blocks,
                            int64_t max_steps, int64_t stages, int64_t num_splits) {
  int64_t teams = resident_blocks / 2;
  if (num_items < teams) teams = num_items;
  if (teams < 1) teams = 1;
  constexpr int64_t kMaxWorkers = 8;
  int64_t workers = (multiprocessors + teams - 1) / teams;
  if (workers > kMaxWorkers) workers = kMaxWorkers;
  if (num_splits > 0) workers = num_splits;
  if (workers > resident_blocks / teams - 1) workers = resident_blocks / teams - 1;
  if (workers > max_steps) workers = max_steps;
  if (workers < 1) workers = 1;
  // A claim takes as long as a few steps do, but a worker should make several of them.
  int64_t claim = max_steps / (4 * workers);
  claim = claim < 1 ? 1 : (claim > 4 ? 4 : claim);
  // Each worker has claimed the steps in its stages and three claims more.
  int64_t ring = 16;
  while (ring < workers * (stages + 3 * claim)) ring *= 2;
  return {static_cast<int32_t>(teams), static_cast<int32_t>(workers), static_cast<int32_t>(claim),
          static_cast<int32_t>(ring)};
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
