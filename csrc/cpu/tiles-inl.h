// Which rows of a KV cache are read, in which order, and how they are fetched ahead of their use.
// Included by each target inside its own namespace, after tile_scales-inl.h.

namespace {

constexpr int kLineBytes = 64;

// Rows of cache lines.
struct Run {
  const char* begin;
  int64_t stride;  // bytes between rows
  int32_t lines;   // of a row
  int32_t rows;
};

// The lines of a tile's keys or values, in their order: rows that touch are one.
struct Runs {
  Run runs[kTileTokens];
  int32_t num_runs = 0;
  int32_t lines = 0;

  template <class T>
  ART_INLINE void add_rows(const T* rows, int64_t stride, int32_t dim, int32_t count) {
    const bool touch = stride == dim;
    const int64_t bytes = int64_t{sizeof(T)} * dim * (touch ? count : 1);
    const auto row_lines = static_cast<int32_t>((bytes + kLineBytes - 1) / kLineBytes);
    if (touch) count = 1;
    runs[num_runs++] = {reinterpret_cast<const char*>(rows), stride * int64_t{sizeof(T)}, row_lines,
                        count};
    lines += row_lines * count;
  }
};

// Fetches lines ahead, in the order in which they will be read: prefetchers of the hardware follow
// only such a sequence, and software alone keeps too few lines on their way. Into the first-level
// cache: on Zen 5 the second is 5-20 % slower. But rows that share few of its sets would drive one
// another out (32 heads of 128 side by side, bfloat16: 0.37 of the stream, into the second 0.53).
class Fetcher {
 public:
  // Fetches all of `parts`, but not the first `lead` lines, and of the last part no more than its
  // first `next_lead`.
  Fetcher(const Runs* const (&parts)[3], int32_t lead, int32_t next_lead)
      : parts_(parts), budget_(parts[0]->lines + parts[1]->lines + next_lead) {
    skip(lead);
  }

  // To be called with every kBytes that are read; `index` counts the calls.
  template <int kBytes>
  ART_INLINE void fetch(int32_t index) {
    constexpr int kLines = kBytes > kLineBytes ? kBytes / kLineBytes : 1;
    constexpr int kEvery = kBytes < kLineBytes ? kLineBytes / kBytes : 1;
    if (kEvery > 1 && index % kEvery != 0) return;
    if (left_ == 0) next_row();
    if (__builtin_expect(left_ < kLines || budget_ < kLines, 0)) return fetch_lines(kLines);
#pragma GCC unroll 32
    for (int i = 0; i < kLines; ++i) prefetch(at_ + i * kLineBytes);
    at_ += kLines * kLineBytes;
    left_ -= kLines;
    budget_ -= kLines;
  }

  void finish() { fetch_lines(budget_); }

 private:
  ART_INLINE void prefetch(const char* line) const {
    if (shares_sets_) {
      __builtin_prefetch(line, 0, 2);
    } else {
      __builtin_prefetch(line, 0, 3);
    }
  }

  // Goes to where lines are left, if there are any.
  ART_INLINE void next_row() {
    if (rows_ == 0) return next_run();
    --rows_;
    row_ += run_.stride;
    at_ = row_;
    left_ = run_.lines;
  }

  __attribute__((noinline)) void next_run() {
    while (part_ < 3 && index_ == parts_[part_]->num_runs) {
      ++part_;
      index_ = 0;
    }
    if (part_ == 3) return;
    run_ = parts_[part_]->runs[index_++];
    rows_ = run_.rows - 1;
    shares_sets_ = rows_ > 0 && run_.stride % 1024 == 0;
    at_ = row_ = run_.begin;
    left_ = run_.lines;
  }

  void skip(int32_t lines) {
    budget_ -= lines;
    while (lines > 0) {
      if (left_ == 0) next_row();
      const int32_t skipped = lines < left_ ? lines : left_;
      at_ += skipped * kLineBytes;
      left_ -= skipped;
      lines -= skipped;
    }
  }

  __attribute__((noinline)) void fetch_lines(int32_t count) {
    if (count > budget_) count = budget_;
    budget_ -= count;
    for (; count > 0; --count) {
      if (left_ == 0) next_row();
      prefetch(at_);
      at_ += kLineBytes;
      --left_;
    }
  }

  const char* at_ = nullptr;
  int32_t left_ = 0;  // lines of the row that it is in
  const char* row_ = nullptr;
  int32_t rows_ = 0;  // of the run, after this one
  Run run_ = {};
  bool shares_sets_ = false;
  const Runs* const* parts_;
  int32_t part_ = 0;
  int32_t index_ = 0;
  int32_t budget_;
};

// Keys of tokens side by side: of a dimension each, in rows apart from one another.
template <class T>
struct Columns {
  const T* keys;  // of the first token and dimension
  int32_t count;
  int32_t room;  // tokens from the first to the end of the page
};

// Rows of one tile: only visible tokens, so nothing has to be masked and no other memory is read.
template <class T>
struct Tile {
  const T* keys[kScoreStride];
  const T* values[kScoreStride];
  int32_t positions[kTileTokens];
  int32_t num_tokens = 0;
  Runs key_runs, value_runs;
  // Of a cache whose token dimension is contiguous, instead of rows of keys.
  Columns<T> columns[kTileTokens];
  int32_t num_columns = 0;
  TileScales<T> scales;

  void clear() {
    num_tokens = num_columns = 0;
    key_runs.num_runs = key_runs.lines = value_runs.num_runs = value_runs.lines = 0;
  }

  // Takes tokens that lie side by side in a page.
  void add(const DecodeParams& params, const Item& item, int32_t token, int32_t count) {
    const int32_t slot = token / params.page_size, offset = token - slot * params.page_size;
    const int64_t page = item.block_table[slot];
    const int64_t key_stride = params.key.token_stride, value_stride = params.value.token_stride;
    const T* key = static_cast<const T*>(params.key.data) + page * params.key.page_stride +
                   offset * key_stride + item.kv_head * params.key.head_stride;
    const T* value = static_cast<const T*>(params.value.data) + page * params.value.page_stride +
                     offset * value_stride + item.kv_head * params.value.head_stride;
    for (int32_t i = 0; i < count; ++i) {
      keys[num_tokens + i] = key + i * key_stride;
      values[num_tokens + i] = value + i * value_stride;
      positions[num_tokens + i] = token + i;
    }
    scales.add(params, num_tokens, page, offset, item.kv_head, count);
    num_tokens += count;
    value_runs.add_rows(value, value_stride, params.value_dim, count);
    if (params.key.dim_stride == 1) {
      key_runs.add_rows(key, key_stride, params.head_dim, count);
    } else {
      columns[num_columns++] = {key, count, params.page_size - offset};
      key_runs.add_rows(key, params.key.dim_stride, count, params.head_dim);
    }
  }

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
      : params_(params), item_(item) {
    const auto positions = item.steps.positions(step);
    left_ = positions.end - positions.begin;
    const int32_t last = positions.end - 1;
    backwards_ = item.walk.unit_at(positions.begin) > item.walk.unit_at(last);
    position_ = backwards_ ? last : positions.begin;
    tokens_ = tokens_of(position_);
  }

  // Takes the next tokens, as many as a tile holds; false if there is none.
  bool fill(Tile<T>& tile) {
    tile.clear();
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
    const int32_t page_end = begin - begin % params_.page_size + params_.page_size;
    const int32_t free = kTileTokens - tile.num_tokens;
    int32_t end = begin;
    while (left_ > 0 && tokens_.begin == end && end < page_end && end - begin < free) {
      end = tokens_.end - begin < free ? tokens_.end : begin + free;
      tokens_.begin = end;
      if (end < tokens_.end) break;
      if (--left_ > 0) tokens_ = tokens_of(position_ += backwards_ ? -1 : 1);
    }
    tile.add(params_, item_, begin, end - begin);
  }

  const DecodeParams& params_;
  const Item& item_;
  int32_t left_;  // units
  bool backwards_;
  int32_t position_;
  TokenRange tokens_;  // of the unit at the position, not taken yet
};

}  // namespace
