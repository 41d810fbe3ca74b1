// Which tokens of a sequence a head may see, and in which order their units are read.
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "core/params.h"

namespace art {

// Of the oldest tokens, which sink_recent reads first. It pins these and as many of the newest, the
// next that it reads, unless it is told how many.
constexpr int32_t kSinkTokens = 64;

struct TokenRange {
  int32_t begin;
  int32_t end;

  ART_HD int32_t size() const { return end - begin; }
};

ART_HD TokenRange visible_tokens(int32_t seq_len, int32_t seq_start, int32_t sliding_window) {
  int32_t begin = seq_start;
  if (sliding_window > 0 && seq_len - sliding_window > begin) begin = seq_len - sliding_window;
  return {begin < seq_len ? begin : seq_len, seq_len};
}

// An ordered list of units, all with a visible token.
struct Walk {
  WalkOrder order;
  int32_t first_unit;
  int32_t num_units;
  int32_t sink_units;
  int32_t num_pinned;
  const int32_t* units;  // [num_units], for kExplicit

  ART_HD int32_t unit_at(int32_t position) const {
    const int32_t from_the_end = first_unit + num_units - 1 - position;
    switch (order) {
      case WalkOrder::kOldestFirst:
        return first_unit + position;
      case WalkOrder::kRecentFirst:
        return from_the_end;
      case WalkOrder::kSinkRecent:
        return position < sink_units ? first_unit + position : from_the_end + sink_units;
      case WalkOrder::kExplicit:  // no default: a compiler warns where an order is missing
        break;
    }
    return units[position];
  }
};

// A built-in walk over all units with a visible token. Units are aligned at token 0.
ART_HD Walk built_in_walk(WalkOrder order, TokenRange visible, int32_t unit_size,
                          int32_t num_pinned) {
  Walk walk = {order, 0, 0, (kSinkTokens + unit_size - 1) / unit_size, 0, nullptr};
  if (visible.size() > 0) {
    walk.first_unit = visible.begin / unit_size;
    walk.num_units = (visible.end - 1) / unit_size + 1 - walk.first_unit;
  }
  walk.num_pinned = num_pinned < walk.num_units ? num_pinned : walk.num_units;
  return walk;
}

// The visible tokens of one unit.
ART_HD TokenRange unit_tokens(int32_t unit, int32_t unit_size, TokenRange visible) {
  const int32_t begin = unit * unit_size;
  const int32_t end = visible.end - begin > unit_size ? begin + unit_size : visible.end;
  return {begin > visible.begin ? begin : visible.begin, end};
}

// The units of an explicit walk that have a visible token, in their order. `kept` may be the
// input. Returns the walk over them; pinned positions are counted before units are dropped.
// `entries`, where it is wanted: their positions in the walk as it was given.
ART_HD Walk explicit_walk(const int32_t* units, int32_t num_units, int32_t num_pinned,
                          TokenRange visible, int32_t unit_size, int32_t* kept,
                          int32_t* entries = nullptr) {
  Walk walk = {WalkOrder::kExplicit, 0, 0, 0, 0, kept};
  for (int32_t i = 0; i < num_units; ++i) {
    if (unit_tokens(units[i], unit_size, visible).size() <= 0) continue;
    if (entries != nullptr) entries[walk.num_units] = i;
    kept[walk.num_units++] = units[i];
    if (i < num_pinned) ++walk.num_pinned;
  }
  return walk;
}

}  // namespace art
