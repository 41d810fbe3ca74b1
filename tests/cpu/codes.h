// Key codes as their format says, without a thought for speed.
#pragma once

#include <cstdint>
#include <vector>

#include "core/params.h"
#include "problem.h"

namespace checks {

// A pool of records, pages of it in random order.
struct Codes {
  art::EncodeParams params = {};
  std::vector<uint8_t> memory;
  std::vector<int32_t> table;

  Codes() = default;
  Codes(const Codes&) = delete;
  Codes& operator=(const Codes&) = delete;
};

void build(const Problem& problem, uint32_t seed, Codes& codes);

// What encoding all complete groups must have written.
std::vector<uint8_t> exact_records(const Codes& codes);

// Natural log-sum-exp of the units of 16 tokens of one query head, by the keys that codes stand for
// and by the keys themselves after the last complete group. From the unit of token 0 on; -inf for
// units without a visible token.
std::vector<double> exact_units(const art::GuidedParams& params, int32_t batch, int32_t head);

}  // namespace checks
