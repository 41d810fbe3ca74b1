// Division by a number that many threads divide by: an instruction or two instead of dozens.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace art {

// For dividends from 0 to 2^31 - 1 and divisors from 1 to 2^31 - 1. With 2^s the next power of two
// from the divisor d on and m = ceil(2^(31 + s) / d), below 2^32, n / d = n * m >> (31 + s): m is
// too large by less than 1, hence the product by less than 2^31, and 2^31 / 2^(31 + s) <= 1 / d
// (Granlund and Montgomery, Division by invariant integers using multiplication, theorem 4.2).
struct Divider {
  uint32_t multiplier = 1u << 31;
  int32_t shift = 0;
  int32_t divisor = 1;

  Divider() = default;
  explicit Divider(int32_t by) : divisor(by) {
    while ((int64_t{1} << shift) < by) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + by - 1) / by);
  }

  ART_HD int32_t quotient(int32_t n) const {
    return static_cast<int32_t>(uint64_t{multiplier} * static_cast<uint32_t>(n) >> (31 + shift));
  }
};

}  // namespace art
