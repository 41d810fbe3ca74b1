// Which groups of a head have codes, and where the records are.
#pragma once

#include <cstdint>

#include "core/key_codes.h"
#include "core/macros.h"
#include "core/params.h"
#include "core/walk.h"

namespace art {

struct GroupRange {
  int32_t begin;
  int32_t end;
};

// Groups that became complete since a head had coded_lens tokens.
ART_HD GroupRange new_groups(const EncodeParams& params, int32_t batch, int32_t head) {
  const DecodeParams& cache = params.cache;
  const int32_t len =
      cache.seq_lens[batch * cache.seq_lens_batch_stride + head * cache.seq_lens_head_stride];
  const int32_t coded = params.coded_lens == nullptr
                            ? 0
                            : params.coded_lens[batch * params.coded_lens_batch_stride +
                                                head * params.coded_lens_head_stride];
  return {coded / kGroupTokens, len / kGroupTokens};
}

// Complete groups with a visible token.
ART_HD GroupRange coded_groups(TokenRange visible) {
  return {visible.begin / kGroupTokens, visible.size() > 0 ? visible.end / kGroupTokens : 0};
}

ART_HD const int32_t* code_table_of(const CodePool& codes, int32_t batch, int32_t head) {
  return codes.table + batch * codes.table_batch_stride + head * codes.table_head_stride;
}

ART_HD uint8_t* record_of(const CodePool& codes, int64_t page, int32_t head) {
  return codes.records + page * codes.page_stride + head * codes.head_stride;
}

}  // namespace art
