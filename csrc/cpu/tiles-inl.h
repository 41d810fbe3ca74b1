// Which rows of a KV cache are read, in which order, and how they are fetched ahead of their use.
// Included by each target inside its own namespace, after simd-inl.h.

namespace {

constexpr int kLineBytes = 64;

// Cache lines side by side.
struct Run {
  const char* begin;
  int32_t lines;
};

// The lines of some rows, in their order: one run where they touch.
template <int kMaxRuns>
struct Runs {
  Run runs[kMaxRuns];
  int32_t num_runs = 0;
  int32_t lines = 0;

  template <class T>
  ART_INLINE void add_rows(const T* rows, int64_t stride, int32_t dim, int32_t count) {
    const bool touch = stride == dim;
    const int64_t bytes = int64_t{sizeof(T)} * dim * (touch ? count : 1);
    const Run run = {reinterpret_cast<const char*>(rows),
                     static_cast<int32_t>((bytes + kLineBytes - 1) / kLineBytes)};
    for (int32_t i = 0; i < (touch ? 1 : count); ++i) {
      runs[num_runs++] = {run.begin + i * stride * int64_t{sizeof(T)}, run.lines};
      lines += run.lines;
    }
  }
  template <int kOthers>
  ART_INLINE void add(const Runs<kOthers>& others) {
    for (int32_t i = 0; i < others.num_runs; ++i) runs[num_runs++] = others.runs[i];
    lines += others.lines;
  }
};

// Fetches lines into the first-level cache, in the order in which they will be read: prefetchers of
// the hardware follow only such a sequence, and software alone keeps too few lines on their way.
// On Zen 5, fetching into the second level is 5-20 % slower.
class Fetcher {
 public:
  // Fetches `budget` lines of the runs, after the first `skipped`.
  Fetcher(const Run* runs, int32_t num_runs, int32_t skipped, int32_t budget)
      : next_(runs), end_(runs + num_runs), budget_(budget) {
    while (skipped > 0 && next_ != end_) {
      const Run run = *next_++;
      const int32_t lines = skipped < run.lines ? skipped : run.lines;
      at_ = run.begin + lines * kLineBytes;
      left_ = run.lines - lines;
      skipped -= lines;
    }
  }

  // To be called with every kBytes that are read; `index` counts the calls.
  template <int kBytes>
  ART_INLINE void fetch(int32_t index) {
    constexpr int kLines = kBytes > kLineBytes ? kBytes / kLineBytes : 1;
    constexpr int kEvery = kBytes < kLineBytes ? kLineBytes / kBytes : 1;
    if (kEvery > 1 && index % kEvery != 0) return;
    if (__builtin_expect(left_ < kLines || budget_ < kLines, 0)) return fetch_lines(kLines);
#pragma GCC unroll 32
    for (int i = 0; i < kLines; ++i) __builtin_prefetch(at_ + i * kLineBytes, 0, 3);
    at_ += kLines * kLineBytes;
    left_ -= kLines;
    budget_ -= kLines;
  }

  void finish() { fetch_lines(budget_); }

 private:
  __attribute__((noinline)) void fetch_lines(int32_t count) {
    if (count > budget_) count = budget_;
    budget_ -= count;
    for (; count > 0; --count) {
      while (left_ == 0) {
        if (next_ == end_) return;
        at_ = next_->begin;
        left_ = next_++->lines;
      }
      __builtin_prefetch(at_, 0, 3);
      at_ += kLineBytes;
      --left_;
    }
  }

  const char* at_ = nullptr;
  int32_t left_ = 0;  // lines of the run that it is in
  const Run* next_;
  const Run* end_;
  int32_t budget_;
};

// Rows of one tile: only visible tokens, so nothing has to be masked and no other memory is read.
template <class T>
struct Tile {
  const T* keys[kScoreStride];
  const T* values[kScoreStride];
  int32_t positions[kTileTokens];
  int32_t num_tokens = 0;
  Runs<kTileTokens> key_runs, value_runs;

  // Whole vectors of rows are computed; the repeated rows get no weight.
  void pad() {
    for (int32_t i = num_tokens; i < round_up(num_tokens, kTilePadding); ++i) {
      keys[i] = keys[num_tokens - 1];
      values[i] = values[num_tokens - 1];
    }
  }
};

// Goes through the visible tokens of a step, in the order in which they lie in memory where the
// walk is one from the newest backwards: the order within a step only rounds differently.
template <class T>
class TokenCursor {
 public:
  TokenCursor(const DecodeParams& params, const Item& item, int32_t step)
      : params_(params),
        item_(item),
        keys_(static_cast<const T*>(params.key.data) + item.kv_head * params.key.head_stride),
        values_(static_cast<const T*>(params.value.data) +
                item.kv_head * params.value.head_stride) {
    const auto positions = item.steps.positions(step);
    left_ = positions.end - positions.begin;
    const int32_t last = positions.end - 1;
    backwards_ = item.walk.unit_at(positions.begin) > item.walk.unit_at(last);
    position_ = backwards_ ? last : positions.begin;
    tokens_ = tokens_of(position_);
  }

  // Takes the next tokens, as many as a tile holds; false if there is none.
  bool fill(Tile<T>& tile) {
    tile.num_tokens = tile.key_runs.num_runs = tile.value_runs.num_runs = 0;
    tile.key_runs.lines = tile.value_runs.lines = 0;
    while (left_ > 0 && tile.num_tokens < kTileTokens) add_run(tile);
    return tile.num_tokens > 0;
  }

 private:
  TokenRange tokens_of(int32_t position) const {
    return unit_tokens(item_.walk.unit_at(position), params_.unit_size, item_.visible);
  }

  // Tokens that lie side by side in a page.
  void add_run(Tile<T>& tile) {
    const int32_t begin = tokens_.begin;
    const int32_t slot = begin / params_.page_size;
    const int64_t page_begin = int64_t{slot} * params_.page_size;
    const int64_t page_end = page_begin + params_.page_size;
    const int32_t free = kTileTokens - tile.num_tokens;
    int32_t end = begin;
    while (left_ > 0 && tokens_.begin == end && end < page_end && end - begin < free) {
      end = tokens_.end - begin < free ? tokens_.end : begin + free;
      tokens_.begin = end;
      if (end < tokens_.end) break;
      if (--left_ > 0) tokens_ = tokens_of(position_ += backwards_ ? -1 : 1);
    }
    add_rows(tile, item_.block_table[slot], begin - page_begin, begin, end - begin);
  }

  void add_rows(Tile<T>& tile, int64_t page, int64_t offset, int32_t token, int32_t count) const {
    const int64_t key_stride = params_.key.token_stride, value_stride = params_.value.token_stride;
    const T* key = keys_ + page * params_.key.page_stride + offset * key_stride;
    const T* value = values_ + page * params_.value.page_stride + offset * value_stride;
    for (int32_t i = 0; i < count; ++i) {
      tile.keys[tile.num_tokens + i] = key + i * key_stride;
      tile.values[tile.num_tokens + i] = value + i * value_stride;
      tile.positions[tile.num_tokens + i] = token + i;
    }
    tile.num_tokens += count;
    if (params_.key.dim_stride == 1) {
      tile.key_runs.add_rows(key, key_stride, params_.head_dim, count);
    }
    tile.value_runs.add_rows(value, value_stride, params_.value_dim, count);
  }

  const DecodeParams& params_;
  const Item& item_;
  const T* keys_;
  const T* values_;
  int32_t left_;  // units
  bool backwards_;
  int32_t position_;
  TokenRange tokens_;  // of the unit at the position, not taken yet
};

}  // namespace
