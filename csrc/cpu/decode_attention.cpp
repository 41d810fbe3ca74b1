// Work distribution: chunks of walks are computed by any worker in any order, and folded in walk
// order by whoever holds the item. The stop decision is therefore the sequential one.
#include "cpu/decode_attention.h"

#include <atomic>
#include <cstring>
#include <new>

#include "cpu/arena.h"
#include "cpu/kernels.h"

namespace art::cpu {
namespace {

Accumulator take_accumulator(const DecodeParams& params, Arena& arena) {
  const size_t heads = params.group_size;
  return {arena.take<SoftmaxState>(heads),
          arena.take<float>(heads * round_up(params.value_dim, kRowAlignment)),
          arena.take<int32_t>(1)};
}

// What folding one item needs. Everything but the atomics belongs to the holder of the lock.
struct alignas(Arena::kAlignment) ItemState {
  Item item;
  std::atomic<bool> locked{false};
  std::atomic<bool> finished{false};
  std::atomic<int64_t> next_chunk{0};  // chunks before it are folded
  int64_t num_chunks;
  std::atomic<bool>* computed;  // [max_chunks]: stored and ready to be folded
  PatienceCounter patience;

  explicit ItemState(const Item& item) : item(item) {}

  bool try_lock() { return !locked.exchange(true); }
  void unlock() { locked.store(false); }
  bool ready() const {
    const int64_t chunk = next_chunk.load();
    return !finished.load() && chunk < num_chunks && computed[chunk].load();
  }
};

struct Workspace {
  std::atomic<int64_t>* next_task;
  ItemState* items;             // [num_items]
  std::atomic<bool>* computed;  // [num_items, max_chunks]
  int32_t* kept_units;          // [num_items, max_units], for explicit walks
  int32_t* kept_entries;        // [num_items, max_units], where they were; null if nobody asks
  char* running;                // [num_items] accumulators
  char* scratch;                // [num_workers] scratch buffers
  char* stored;                 // [num_items, stored_steps] accumulators
  size_t accumulator_bytes;
  size_t scratch_bytes;
  size_t bytes;
};

Scratch take_decode_scratch(const DecodeParams& params, Arena& arena) {
  Scratch scratch = take_scratch(params, arena);
  scratch.step = take_accumulator(params, arena);
  scratch.tile = take_accumulator(params, arena);
  return scratch;
}

Workspace lay_out(const DecodeParams& params, const DecodePlan& plan, void* base) {
  Arena accumulator(nullptr), scratch(nullptr), arena(base);
  take_accumulator(params, accumulator);
  take_decode_scratch(params, scratch);
  Workspace space;
  space.accumulator_bytes = accumulator.used();
  space.scratch_bytes = scratch.used();
  const size_t items = plan.num_items;
  space.next_task = arena.take<std::atomic<int64_t>>(1);
  space.items = arena.take<ItemState>(items);
  space.computed = arena.take<std::atomic<bool>>(items * plan.max_chunks);
  const bool is_explicit = params.walk_order == WalkOrder::kExplicit;
  space.kept_units = arena.take<int32_t>(is_explicit ? items * params.max_units : 0);
  int32_t* entries = arena.take<int32_t>(params.use_residual ? items * params.max_units : 0);
  space.kept_entries = params.use_residual ? entries : nullptr;
  space.running = arena.take<char>(items * space.accumulator_bytes);
  space.scratch = arena.take<char>(plan.num_workers * space.scratch_bytes);
  space.stored = arena.take<char>(items * plan.stored_steps * space.accumulator_bytes);
  space.bytes = arena.used();
  return space;
}

Item plan_item(const DecodeParams& params, int64_t index, const Workspace& space) {
  const TokenRange visible = visible_of(params, index);
  const int32_t pinned = num_pinned_of(params, index);
  if (params.walk_order != WalkOrder::kExplicit) {
    const Walk walk = built_in_walk(params.walk_order, visible, params.unit_size, pinned);
    return make_item(params, index, visible, walk);
  }
  // The units that stay are written to the workspace: the caller's walk is not ours to change.
  const int64_t row = index * params.max_units;
  const Walk walk = explicit_walk(params.walk + row, params.walk_lens[index], pinned, visible,
                                  params.unit_size, space.kept_units + row,
                                  params.use_residual ? space.kept_entries + row : nullptr);
  return make_item(params, index, visible, walk);
}

// An upper bound on the steps of an item, from its length alone.
int64_t bound_steps(const DecodeParams& params, int64_t index) {
  int64_t units;
  if (params.walk_order == WalkOrder::kExplicit) {
    units = params.walk_lens[index];
  } else {
    units = visible_of(params, index).size() / params.unit_size + 2;
  }
  return units / (params.block_size / params.unit_size) + 2;
}

class Worker {
 public:
  Worker(const DecodeParams& params, const DecodePlan& plan, const Workspace& space, int64_t worker)
      : params_(params), plan_(plan), space_(space), kernels_(kernels(params.dtype)) {
    Arena arena(space.scratch + worker * space.scratch_bytes);
    scratch_ = take_decode_scratch(params, arena);
  }

  void run() {
    const int64_t num_tasks = plan_.num_items * plan_.max_chunks;
    // Chunk-major: the chunk before is then usually folded already, and this one is folded as it
    // is computed, without storing anything.
    for (int64_t task; (task = space_.next_task->fetch_add(1)) < num_tasks;) {
      compute_chunk(task % plan_.num_items, task / plan_.num_items);
    }
  }

 private:
  void compute_chunk(int64_t index, int64_t chunk) {
    ItemState& state = space_.items[index];
    if (chunk >= state.num_chunks || state.finished.load()) return;
    kernels_.load_query(params_, state.item, scratch_);
    if (state.try_lock()) {
      const bool is_next = state.next_chunk.load() == chunk && !state.finished.load();
      if (is_next) fold_chunk(index, chunk, /*stored=*/false);
      state.unlock();
      if (is_next) return fold_stored(index);
    }
    if (store_chunk(index, chunk)) fold_stored(index);
  }

  // Folds what is ready. Nobody waits for the lock: whoever holds it looks again after releasing
  // it, so a chunk that became ready meanwhile is never left behind.
  void fold_stored(int64_t index) {
    ItemState& state = space_.items[index];
    while (state.ready() && state.try_lock()) {
      while (state.ready()) fold_chunk(index, state.next_chunk.load(), /*stored=*/true);
      state.unlock();
    }
  }

  // Returns false when the item stopped meanwhile.
  bool store_chunk(int64_t index, int64_t chunk) {
    ItemState& state = space_.items[index];
    const int64_t end = end_of(state, chunk);
    for (int64_t step = chunk * plan_.chunk_steps; step < end; ++step) {
      if (state.finished.load(std::memory_order_relaxed)) return false;
      kernels_.compute_step(params_, state.item, step, scratch_, stored(index, step));
    }
    state.computed[chunk].store(true);
    return true;
  }

  // Folds one chunk, computing its steps first unless they are stored. The lock is held.
  void fold_chunk(int64_t index, int64_t chunk, bool stored_steps) {
    ItemState& state = space_.items[index];
    const Accumulator running = accumulator(space_.running, index);
    if (chunk == 0) clear(running);
    const int64_t end = end_of(state, chunk);
    for (int64_t step = chunk * plan_.chunk_steps; step < end; ++step) {
      const Accumulator result = stored_steps ? stored(index, step) : scratch_.step;
      if (!stored_steps) kernels_.compute_step(params_, state.item, step, scratch_, result);
      const int32_t block = state.item.steps.block_of(step);
      const bool compare = params_.use_stability && block > 0;
      const bool stable = kernels_.fold_step(params_, state.item, result, compare, running);
      const bool settled = compare && state.patience.completes(stable, params_.patience);
      const bool covered =
          params_.use_residual && is_block_covered(state.item, index, step, running);
      if (stops(settled, covered, params_.all_agree)) return finish(state, index, running, block);
    }
    state.next_chunk.store(chunk + 1);
    if (chunk + 1 == state.num_chunks) finish(state, index, running, -1);
  }

  // Whether little enough is left after a step, which has been folded.
  bool is_block_covered(const Item& item, int64_t index, int32_t step, Accumulator running) const {
    if (!item.steps.completes_block(step)) return false;
    const int32_t last = item.steps.positions(step).end - 1;
    const int64_t entry = space_.kept_entries[index * params_.max_units + last];
    for (int32_t g = 0; g < params_.group_size; ++g) {
      const int32_t head = item.kv_head * params_.group_size + g;
      const float* sink = sink_of(params_, item, g);
      const int64_t row = (item.batch * int64_t{params_.num_q_heads} + head) * params_.max_units;
      const float log_rest = params_.log_rest[row + entry];
      if (!is_covered(running.softmax[g], sink, log_rest, params_.residual_limit)) return false;
    }
    return true;
  }

  void finish(ItemState& state, int64_t index, Accumulator running, int32_t stop_block) {
    kernels_.write_output(params_, state.item, running);
    params_.tokens_read[index] = *running.num_tokens;
    params_.stop_block[index] = stop_block;
    state.finished.store(true);
  }

  void clear(Accumulator running) {
    const int32_t row = round_up(params_.value_dim, kRowAlignment);
    for (int32_t g = 0; g < params_.group_size; ++g) running.softmax[g] = SoftmaxState();
    std::memset(running.values, 0, sizeof(float) * params_.group_size * row);
    *running.num_tokens = 0;
  }

  int64_t end_of(const ItemState& state, int64_t chunk) const {
    const int64_t end = (chunk + 1) * plan_.chunk_steps;
    return end < state.item.steps.num_steps ? end : state.item.steps.num_steps;
  }

  Accumulator accumulator(char* base, int64_t index) const {
    Arena arena(base + index * space_.accumulator_bytes);
    return take_accumulator(params_, arena);
  }

  Accumulator stored(int64_t index, int64_t step) const {
    return accumulator(space_.stored, index * plan_.stored_steps + step);
  }

  const DecodeParams& params_;
  const DecodePlan& plan_;
  const Workspace& space_;
  const Kernels& kernels_;
  Scratch scratch_;
};

}  // namespace

DecodePlan plan_decode(const DecodeParams& params, int64_t num_threads, int64_t num_splits) {
  kernels(params.dtype);  // a name in ART_CPU that is wrong is an error here, not in a thread
  DecodePlan plan = {};
  plan.num_items = int64_t{params.batch} * params.num_kv_heads;
  int64_t total_steps = 0, max_steps = 1;
  for (int64_t index = 0; index < plan.num_items; ++index) {
    const int64_t steps = bound_steps(params, index);
    total_steps += steps;
    if (steps > max_steps) max_steps = steps;
  }
  plan.chunk_steps = num_splits > 0
                         ? (max_steps + num_splits - 1) / num_splits
                         : cpu_chunk_steps(plan.num_items, total_steps, max_steps, num_threads);
  plan.max_chunks = (max_steps + plan.chunk_steps - 1) / plan.chunk_steps;
  plan.stored_steps = plan.max_chunks > 1 ? max_steps : 0;
  plan.num_workers = cpu_workers(plan.num_items * plan.max_chunks, total_steps, num_threads);
  plan.workspace_bytes = lay_out(params, plan, nullptr).bytes;
  return plan;
}

void begin_decode(const DecodeParams& params, const DecodePlan& plan, void* workspace) {
  const Workspace space = lay_out(params, plan, workspace);
  new (space.next_task) std::atomic<int64_t>(0);
  for (int64_t i = 0; i < plan.num_items * plan.max_chunks; ++i) {
    new (space.computed + i) std::atomic<bool>(false);
  }
  for (int64_t index = 0; index < plan.num_items; ++index) {
    ItemState& state = *new (space.items + index) ItemState(plan_item(params, index, space));
    state.computed = space.computed + index * plan.max_chunks;
    const int64_t steps = state.item.steps.num_steps;
    // An item without steps still has a chunk: somebody has to write its zeros.
    state.num_chunks = steps == 0 ? 1 : (steps + plan.chunk_steps - 1) / plan.chunk_steps;
  }
}

void run_decode_worker(const DecodeParams& params, const DecodePlan& plan, void* workspace,
                       int64_t worker) {
  const Workspace space = lay_out(params, plan, workspace);
  Worker(params, plan, space, worker).run();
}

}  // namespace art::cpu
