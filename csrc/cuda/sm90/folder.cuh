// The thread block of a team that folds. One warp waits for steps and has the copy engine bring
// them in batches; one forms the scalars of the fold for the steps of a batch in parallel; four
// fold the values in walk order and decide.
#pragma once

#include "cuda/sm90/kernel.cuh"
#include "cuda/sm90/output.cuh"
#include "cuda/sm90/ring.cuh"
#include "cuda/sm90/tile.cuh"

namespace art::cuda::sm90 {

constexpr int kFolders = 4;  // warps
constexpr int kFolderThreads = 32 * kFolders;

// What folding a step means for one head: the running output times `running`, plus the step's
// values times `incoming`; its change is the values times `change` minus the former times `share`.
struct StepFactors {
  float running;
  float incoming;
  float change;
  float share;
};

template <int kDim, int kHeadTiles>
struct FolderShared {
  static constexpr int kHeads = 8 * kHeadTiles;
  static constexpr int kBatch = kHeadTiles == 1 && kDim <= 128 ? 8 : 4;  // steps folded at once
  static constexpr int kSlotPieces = slot_pieces(kDim, kHeads / 2);
  static constexpr int kMaxBuffers = 4;
  float4 slots[2 * kBatch * kSlotPieces];  // [buffers, kBatch, slot_pieces()]
  StepFactors factors[kMaxBuffers][kBatch][kHeads];
  SoftmaxState after[kMaxBuffers][kBatch][kHeads];  // state of the running output after a step
  // Each thread's part of the moments of its two heads: (aa, ad, dd) and (aa, ad, dd).
  float4 moments_a[kBatch][kFolderThreads];
  float2 moments_b[kBatch][kFolderThreads];
  float scales[kBatch][kHeads];
  uint32_t verdicts[3];  // for even and odd batches, and for a batch judged again
  struct {
    int32_t first_step;
    int32_t count;  // 0: the item has no more
  } info[kMaxBuffers];
  Barrier full[kMaxBuffers], weighed[kMaxBuffers], empty[kMaxBuffers];
  int32_t finished_item;

  __device__ void init() {
    for (int i = 0; i < kMaxBuffers; ++i) {
      full[i].init(1);
      weighed[i].init(1);
      empty[i].init(kFolders);
    }
    for (uint32_t& verdict : verdicts) verdict = 0;
    finished_item = -1;
  }
};

// Batches pass through a ring of buffers; with few heads there is room for more of them.
struct Batches {
  int32_t num_buffers;
  int32_t number = 0;

  __device__ int buffer() const { return number % num_buffers; }
  __device__ uint32_t parity() const { return number / num_buffers % 2; }
};

template <class Shared>
__device__ Batches batches_of(int32_t slot_pieces) {
  const int32_t room = 2 * Shared::kSlotPieces / slot_pieces;
  return {room < Shared::kMaxBuffers ? room : Shared::kMaxBuffers};
}

// ---- the warp that fetches

template <int kDim, int kHeadTiles>
class Fetcher {
  using Shared = FolderShared<kDim, kHeadTiles>;
  static constexpr int kBatch = Shared::kBatch;

 public:
  __device__ Fetcher(const DecodeParams& params, const TeamSpace& space, Shared& shared)
      : space_(space),
        shared_(shared),
        lane_(threadIdx.x % 32),
        pieces_(slot_pieces(kDim, head_pairs_of<kHeadTiles>(params.group_size))) {}

  __device__ void run(int32_t num_steps, int32_t index, Batches& batches) {
    const Ring ring(space_, index, pieces_);
    int32_t done = 0, written = 0;
    while (done < num_steps) {
      if (written == 0) written = wait_for_steps(ring, num_steps, index, done);
      if (written == 0) break;
      const int32_t count = written < kBatch ? written : kBatch;
      fetch(ring, done, count, wait_for_buffer(batches));
      done += count;
      written -= count;
      ++batches.number;
    }
    const int buffer = wait_for_buffer(batches);
    if (lane_ == 0) {
      shared_.info[buffer] = {done, 0};
      shared_.full[buffer].arrive();
    }
    ++batches.number;
  }

 private:
  __device__ int wait_for_buffer(const Batches& batches) {
    shared_.empty[batches.buffer()].wait(batches.parity() ^ 1);
    return batches.buffer();
  }

  // Returns how many of the next 32 steps have been written, at least one; 0 when the item is
  // finished.
  __device__ int32_t wait_for_steps(const Ring& ring, int32_t num_steps, int32_t index,
                                    int32_t done) const {
    const int32_t step = done + lane_;
    const int32_t* flag = ring.flag(step);
    while (true) {
      const bool written = step < num_steps && load_relaxed(flag) == step + 1;
      const uint32_t missing = ~__ballot_sync(~0u, written);
      if (missing != ~0u && !(missing & 1)) {
        // What was written before the flags is there, for the copy engine too.
        __threadfence();
        fence_copy_engine();
        return missing == 0 ? 32 : __ffs(missing) - 1;
      }
      const bool finished = *const_cast<volatile int32_t*>(&shared_.finished_item) == index;
      if (__any_sync(~0u, finished)) return 0;
    }
  }

  __device__ void fetch(const Ring& ring, int32_t done, int32_t count, int buffer) {
    const uint32_t bytes = pieces_ * sizeof(float4);
    if (lane_ == 0) {
      shared_.info[buffer] = {done, count};
      shared_.full[buffer].arrive_and_expect(count * bytes);
    }
    __syncwarp();
    if (lane_ >= count) return;
    float4* to = shared_.slots + (buffer * kBatch + lane_) * pieces_;
    copy_bytes(to, ring.slot(done + lane_), bytes, shared_.full[buffer]);
  }

  const TeamSpace& space_;
  Shared& shared_;
  const int lane_, pieces_;
};

// ---- the warp that forms the scalars

template <int kDim, int kHeadTiles>
class Weigher {
  using Shared = FolderShared<kDim, kHeadTiles>;
  static constexpr int kBatch = Shared::kBatch;
  static constexpr int kHeadsAtOnce = 32 / kBatch;
  static constexpr int kRounds = Shared::kHeads / kHeadsAtOnce;

 public:
  __device__ Weigher(const DecodeParams& params, Shared& shared)
      : params_(params),
        shared_(shared),
        lane_(threadIdx.x % 32),
        pairs_(head_pairs_of<kHeadTiles>(params.group_size)) {}

  __device__ void run(const Item& item, Batches& batches) {
    SoftmaxState running[kRounds];
    int32_t count;
    do {
      const int buffer = batches.buffer();
      shared_.full[buffer].wait(batches.parity());
      ++batches.number;
      count = shared_.info[buffer].count;
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
        const int32_t i = lane_ % kBatch, g = r * kHeadsAtOnce + lane_ / kBatch;
        if (r * kHeadsAtOnce >= params_.group_size) continue;
        const bool is_there = i < count && g < params_.group_size;
        form_factors(item, g, is_there ? state_of(buffer, i, g) : SoftmaxState(), running[r],
                     buffer);
      }
      __syncwarp();
      if (lane_ == 0) shared_.weighed[buffer].arrive();
    } while (count > 0);
  }

 private:
  __device__ SoftmaxState state_of(int buffer, int32_t i, int32_t g) const {
    const int pieces = slot_pieces(kDim, pairs_);
    const float4* slot = shared_.slots + (buffer * kBatch + i) * pieces;
    const float4 states = slot[value_pieces(kDim, pairs_) + g / 2];
    return g % 2 == 0 ? SoftmaxState{states.x, states.y} : SoftmaxState{states.z, states.w};
  }

  // What core's fold() computes step by step: the maxima by a prefix scan, the exponentials side
  // by side; only the sums are a chain.
  __device__ void form_factors(const Item& item, int32_t g, const SoftmaxState& incoming,
                               SoftmaxState& running, int buffer) {
    const int i = lane_ % kBatch;
    float max = incoming.max;
#pragma unroll
    for (int distance = 1; distance < kBatch; distance *= 2) {
      const float other = __shfl_up_sync(~0u, max, distance, kBatch);
      if (i >= distance && other > max) max = other;
    }
    SoftmaxState after = {running.max > max ? running.max : max, 0.0f};
    SoftmaxState before = {__shfl_up_sync(~0u, after.max, 1, kBatch), 0.0f};
    if (i == 0) before.max = running.max;
    // The sums are folded below, so those of the states do not matter here.
    SoftmaxState folded = before;
    const FoldFactors factors = fold(folded, {incoming.max, 0.0f});
    const float mass = incoming.sum * factors.incoming;
    float sum = running.sum;
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const float kept = __shfl_sync(~0u, factors.running, k, kBatch);
      const float added = __shfl_sync(~0u, mass, k, kBatch);
      sum = fmaf(sum, kept, added);
      if (k == i) after.sum = sum;
    }
    running = {__shfl_sync(~0u, after.max, kBatch - 1, kBatch), sum};
    if (g >= params_.group_size) return;
    const float* sink = sink_of(params_, item.kv_head, g);
    const IncrementWeights weights = increment_weights(incoming, after, factors, sink);
    shared_.factors[buffer][i][g] = {factors.running, factors.incoming,
                                     factors.incoming * weights.keep, weights.share};
    shared_.after[buffer][i][g] = after;
  }

  const DecodeParams& params_;
  Shared& shared_;
  const int lane_, pairs_;
};

// ---- the warps that fold

template <class T, int kDim, int kHeadTiles>
class Folder {
  using Shared = FolderShared<kDim, kHeadTiles>;
  static constexpr int kBatch = Shared::kBatch;
  static constexpr uint32_t kOutOfRange = 1u << 31;  // in a verdict; the other bits are steps
  // Pieces of a step that a thread owns.
  static constexpr int kOwned =
      (value_pieces(kDim, Shared::kHeads / 2) + kFolderThreads - 1) / kFolderThreads;
  enum class Pass { kMoments, kLargest, kScaledMoments };

 public:
  __device__ Folder(const DecodeParams& params, const TeamSpace& space, Shared& shared)
      : params_(params),
        space_(space),
        shared_(shared),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        pairs_(head_pairs_of<kHeadTiles>(params.group_size)),
        pieces_(value_pieces(kDim, pairs_)),
        // kFolderThreads is a multiple of the number of pairs.
        pair_(threadIdx.x % pairs_) {
    look_.sharers = kFolderThreads / kBatch / pairs_;
    look_.own = threadIdx.x % look_.sharers;
    look_.step = threadIdx.x / look_.sharers / pairs_;
    look_.pair = threadIdx.x / look_.sharers % pairs_;
  }

  __device__ void run(const Item& item, int32_t index, Batches& batches) {
    PatienceCounter patience;
    bool is_finished = item.steps.num_steps == 0;
#pragma unroll
    for (int k = 0; k < kOwned; ++k) running_[k] = {};
    if (is_finished) write_result(item, index, nullptr, 0, -1);
    while (true) {
      const int buffer = batches.buffer();
      shared_.full[buffer].wait(batches.parity());
      shared_.weighed[buffer].wait(batches.parity());
      ++batches.number;
      values_ = shared_.slots + buffer * kBatch * (pieces_ + pairs_);
      verdict_ = batches.number % 2;
      const int32_t first = shared_.info[buffer].first_step, count = shared_.info[buffer].count;
      if (count > 0 && !is_finished) {
        if (threadIdx.x == 0) store_relaxed(&space_.state[index].folded_steps, first + count);
        is_finished = fold_batch(item, index, buffer, first, count, patience);
      }
      __syncwarp();
      if (lane_ == 0) shared_.empty[buffer].arrive();
      if (count == 0) return;
    }
  }

 private:
  // True when the item is finished.
  __device__ bool fold_batch(const Item& item, int32_t index, int buffer, int32_t first,
                             int32_t count, PatienceCounter& patience) {
    float4 before[kOwned];
#pragma unroll
    for (int k = 0; k < kOwned; ++k) before[k] = running_[k];
    int32_t last = count - 1;
    bool stops = false;
    if (params_.use_stability) {
      const uint32_t unstable = unstable_steps(item, buffer, first, count, before);
      for (int32_t i = first_compared(item, first); i < count && !stops; ++i) {
        stops = patience.completes(!(unstable >> i & 1), params_.patience);
        if (stops) last = i;
      }
    }
    if (!params_.use_stability || last + 1 < count) {
      // Up to the stop only.
#pragma unroll
      for (int k = 0; k < kOwned; ++k) running_[k] = before[k];
      add(buffer, last + 1);
    }
    if (!stops && first + count < item.steps.num_steps) return false;
    if (threadIdx.x == 0) {
      *const_cast<volatile int32_t*>(&shared_.finished_item) = index;
      atomicMax(&space_.state[index].next_step, kStopped);
      store_relaxed(&space_.state[index].folded_steps, kStopped);
    }
    write_result(item, index, shared_.after[buffer][last], first + last + 1,
                 stops ? item.steps.block_of(first + last) : -1);
    return true;
  }

  // The first step of a batch that is compared with the one before it.
  __device__ static int32_t first_compared(const Item& item, int32_t first) {
    const int32_t starting = item.steps.num_start_steps > 1 ? item.steps.num_start_steps : 1;
    return starting > first ? starting - first : 0;
  }

  __device__ void add(int buffer, int32_t count) {
#pragma unroll 1
    for (int32_t i = 0; i < count; ++i) {
      const StepFactors low = shared_.factors[buffer][i][2 * pair_];
      const StepFactors high = shared_.factors[buffer][i][2 * pair_ + 1];
#pragma unroll
      for (int k = 0; k < kOwned; ++k) {
        const int piece = threadIdx.x + k * kFolderThreads;
        if (piece >= pieces_) continue;
        fold_piece(running_[k], values_[i * (pieces_ + pairs_) + piece], low, high);
      }
    }
  }

  __device__ static void fold_piece(float4& a, const float4& p, const StepFactors& low,
                                    const StepFactors& high) {
    a.x = fmaf(p.x, low.incoming, a.x * low.running);
    a.y = fmaf(p.y, high.incoming, a.y * high.running);
    a.z = fmaf(p.z, low.incoming, a.z * low.running);
    a.w = fmaf(p.w, high.incoming, a.w * high.running);
  }

  __device__ static void synchronize() {
    asm volatile("bar.sync 1, %0;" ::"n"(kFolderThreads) : "memory");
  }

  // Folds the batch into running_, and returns a bit for each step that is not stable.
  __device__ uint32_t unstable_steps(const Item& item, int buffer, int32_t first, int32_t count,
                                     const float4 (&before)[kOwned]) {
    bool out_of_range = false;
    const uint32_t verdict =
        judge<Pass::kMoments>(item, buffer, first, count, verdict_, out_of_range);
    if (!(verdict & kOutOfRange)) return verdict;
    restore(before);
    judge<Pass::kLargest>(item, buffer, first, count, 2, out_of_range);
    restore(before);
    return judge<Pass::kScaledMoments>(item, buffer, first, count, 2, out_of_range);
  }

  __device__ void restore(const float4 (&before)[kOwned]) {
#pragma unroll
    for (int k = 0; k < kOwned; ++k) running_[k] = before[k];
  }

  // `verdict`: the word that collects what the threads find; `out_of_range`: the moments this
  // thread looks at left the range of float32 in the first pass.
  template <Pass kPass>
  __device__ uint32_t judge(const Item& item, int buffer, int32_t first, int32_t count, int verdict,
                            bool& out_of_range) {
#pragma unroll 4
    for (int32_t i = 0; i < count; ++i) sum_step<kPass>(buffer, i);
    synchronize();
    // Everybody has read what a later batch writes to.
    if (threadIdx.x == 0) shared_.verdicts[kPass == Pass::kMoments ? verdict_ ^ 1 : 2] = 0;
    if (kPass == Pass::kScaledMoments) synchronize();
    const uint32_t found = look<kPass>(item, first, count, out_of_range);
    const uint32_t all = __reduce_or_sync(~0u, found);
    if (all != 0 && lane_ == 0) atomicOr(&shared_.verdicts[verdict], all);
    synchronize();
    return *const_cast<volatile uint32_t*>(&shared_.verdicts[verdict]);
  }

  template <Pass kPass>
  __device__ static void take(float a, float d, float (&moments)[3]) {
    if (kPass == Pass::kLargest) {
      moments[0] = fmaxf(moments[0], fmaxf(fabsf(a), fabsf(d)));
      return;
    }
    moments[0] = fmaf(a, a, moments[0]);
    moments[1] = fmaf(a, d, moments[1]);
    moments[2] = fmaf(d, d, moments[2]);
  }

  // Folds a step and leaves this thread's part of its moments.
  template <Pass kPass>
  __device__ void sum_step(int buffer, int i) {
    const StepFactors factors[2] = {shared_.factors[buffer][i][2 * pair_],
                                    shared_.factors[buffer][i][2 * pair_ + 1]};
    float moments[2][3] = {};
    const auto element = [&](float& a, float p, int head) {
      const StepFactors& f = factors[head];
      const float scale =
          kPass == Pass::kScaledMoments ? shared_.scales[i][2 * pair_ + head] : 1.0f;
      const float kept = a * f.running, old = kept * scale;
      a = fmaf(p, f.incoming, kept);
      take<kPass>(old, p * (f.change * scale) - old * f.share, moments[head]);
    };
#pragma unroll
    for (int k = 0; k < kOwned; ++k) {
      const int piece = threadIdx.x + k * kFolderThreads;
      if (piece >= pieces_) continue;
      const float4 p = values_[i * (pieces_ + pairs_) + piece];
      element(running_[k].x, p.x, 0);
      element(running_[k].y, p.y, 1);
      element(running_[k].z, p.z, 0);
      element(running_[k].w, p.w, 1);
    }
    shared_.moments_a[i][threadIdx.x] =
        make_float4(moments[0][0], moments[0][1], moments[0][2], moments[1][0]);
    shared_.moments_b[i][threadIdx.x] = make_float2(moments[1][1], moments[1][2]);
  }

  template <Pass kPass>
  __device__ static float combine(float x, float y) {
    return kPass == Pass::kLargest ? fmaxf(x, y) : x + y;
  }

  // Every step and pair of heads is looked at by a few threads; they add up the parts of all others
  // and judge a head each. Returns this thread's part of the verdict.
  template <Pass kPass>
  __device__ uint32_t look(const Item& item, int32_t first, int32_t count, bool& out_of_range) {
    const int own = look_.own, i = look_.step, pair = look_.pair, sharers = look_.sharers;
    float moments[2][3] = {};
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int thread = pair + pairs_ * (own + sharers * k);
      if (i >= count) continue;
      const float4 a = shared_.moments_a[i][thread];
      const float2 b = shared_.moments_b[i][thread];
      const float part[2][3] = {{a.x, a.y, a.z}, {a.w, b.x, b.y}};
      for (int j = 0; j < 6; ++j) {
        moments[j / 3][j % 3] = combine<kPass>(moments[j / 3][j % 3], part[j / 3][j % 3]);
      }
    }
    for (int other = sharers / 2; other > 0; other /= 2) {
      for (int j = 0; j < 6; ++j) {
        float& x = moments[j / 3][j % 3];
        x = combine<kPass>(x, __shfl_xor_sync(~0u, x, other));
      }
    }
    const int32_t g = 2 * pair + own % 2;
    const bool compares =
        i < count && own < 2 && g < params_.group_size && item.steps.block_of(first + i) > 0;
    const IncrementMoments sums =
        own % 2 == 0 ? IncrementMoments{moments[0][0], moments[0][1], moments[0][2]}
                     : IncrementMoments{moments[1][0], moments[1][1], moments[1][2]};
    if (!compares) return 0;
    if (kPass == Pass::kLargest) {
      shared_.scales[i][g] = out_of_range ? moment_scale(sums.aa) : 1.0f;
      return 0;
    }
    if (kPass == Pass::kMoments) out_of_range = !in_range(sums);
    const bool stable = is_stable(output_change(sums), thresholds_of(params_, item.kv_head));
    return (stable ? 0 : 1u << i) | (out_of_range ? kOutOfRange : 0);
  }

  // `states` of the heads; null: nothing was read.
  __device__ void write_result(const Item& item, int32_t index, const SoftmaxState* states,
                               int32_t num_steps, int32_t stop_block) {
    const int64_t first_row =
        int64_t{item.batch} * params_.num_q_heads + item.kv_head * params_.group_size;
    float shares[2];
    SoftmaxState state[2];
#pragma unroll
    for (int head = 0; head < 2; ++head) {
      const int32_t g = 2 * pair_ + head;
      if (states != nullptr && g < params_.group_size) state[head] = states[g];
      shares[head] = 1.0f / denominator_of(state[head], sink_of(params_, item.kv_head, g));
      if (threadIdx.x < pairs_ && g < params_.group_size) {
        params_.lse[first_row + g] = log_sum_exp(state[head]);
      }
    }
#pragma unroll
    for (int k = 0; k < kOwned; ++k) {
      const int piece = threadIdx.x + k * kFolderThreads;
      if (piece >= pieces_) continue;
      const int d = piece / (8 * pairs_) * 16 + piece / pairs_ % 8;
      T* low = static_cast<T*>(params_.out) + (first_row + 2 * pair_) * kDim + d;
      if (2 * pair_ < params_.group_size) {
        low[0] = Mma<T>::round(running_[k].x * shares[0]);
        low[8] = Mma<T>::round(running_[k].z * shares[0]);
      }
      if (2 * pair_ + 1 < params_.group_size) {
        low[kDim] = Mma<T>::round(running_[k].y * shares[1]);
        low[kDim + 8] = Mma<T>::round(running_[k].w * shares[1]);
      }
    }
    write_counts(item, index, num_steps, stop_block);
  }

  __device__ void write_counts(const Item& item, int32_t index, int32_t num_steps,
                               int32_t stop_block) {
    if (warp_ != 0) return;
    const int32_t end = num_steps == 0 ? 0 : item.steps.positions(num_steps - 1).end;
    int32_t tokens = 0;
    for (int32_t i = lane_; i < end; i += 32) {
      tokens += unit_tokens(item.walk.unit_at(i), params_.unit_size, item.visible).size();
    }
    tokens = __reduce_add_sync(~0u, tokens);
    if (lane_ != 0) return;
    params_.tokens_read[index] = tokens;
    params_.stop_block[index] = stop_block;
  }

  const DecodeParams& params_;
  const TeamSpace& space_;
  Shared& shared_;
  const int warp_, lane_;
  const int pairs_, pieces_;
  const int pair_;  // the two heads of this thread's pieces
  float4 running_[kOwned];
  // What this thread looks at when a batch is judged, shared with others.
  struct {
    int sharers, own, step, pair;
  } look_;
  // Of the batch at hand.
  const float4* values_;
  int verdict_;
};

}  // namespace art::cuda::sm90
