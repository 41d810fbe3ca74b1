// How the units of a guided walk are ranked: integers only, so that neither the order of a sum nor
// the device changes a rank. Logarithms count steps of 1/64 to base 2.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/bits.h"
#include "core/key_codes.h"
#include "core/macros.h"
#include "core/walk.h"

namespace art {

constexpr float kStepsPerNat = 92.33248261689366f;  // 64 / ln 2
constexpr float kNatsPerStep = 0.010830424696249145f;
constexpr int32_t kLeastSteps = -32767;
constexpr int32_t kMostSteps = 32767;
constexpr int32_t kBucketSteps = 8;  // a bucket holds units within 1/8 to base 2
constexpr int32_t kNumBuckets = 256;
constexpr int32_t kSinkUnits = kSinkTokens / kUnitTokens;

// A unit's log-sum-exp in int16; what is not finite counts as the least.
ART_HD int16_t quantise_steps(float steps) {
  const float rounded = std::rint(steps);
  if (!(rounded > kLeastSteps) || rounded == INFINITY) return kLeastSteps;
  return static_cast<int16_t>(rounded < kMostSteps ? rounded : kMostSteps);
}

// round(2^31 * 2^(-fraction / 64))
ART_HD uint32_t power_of_fraction(uint32_t fraction) {
  static constexpr uint32_t kPowers[64] = {
      0x80000000u, 0x7e9f0606u, 0x7d41d96eu, 0x7be86fbau, 0x7a92be8bu, 0x7940bb9eu, 0x77f25cceu,
      0x76a7980fu, 0x75606374u, 0x741cb528u, 0x72dc8374u, 0x719fc4b9u, 0x70666f76u, 0x6f307a41u,
      0x6dfddbccu, 0x6cce8ae1u, 0x6ba27e65u, 0x6a79ad56u, 0x69540ec9u, 0x683199edu, 0x6712460bu,
      0x65f60a7fu, 0x64dcdec3u, 0x63c6ba64u, 0x62b39509u, 0x61a3666du, 0x60962665u, 0x5f8bccdbu,
      0x5e8451d0u, 0x5d7fad59u, 0x5c7dd7a4u, 0x5b7ec8f2u, 0x5a82799au, 0x5988e209u, 0x5891fac1u,
      0x579dbc57u, 0x56ac1f75u, 0x55bd1cdbu, 0x54d0ad5au, 0x53e6c9dau, 0x52ff6b55u, 0x521a8ad7u,
      0x51382182u, 0x50582888u, 0x4f7a9930u, 0x4e9f6cd4u, 0x4dc69cddu, 0x4cf022cau, 0x4c1bf829u,
      0x4b4a169cu, 0x4a7a77d4u, 0x49ad1598u, 0x48e1e9bau, 0x4818ee22u, 0x47521cc6u, 0x468d6faeu,
      0x45cae0f2u, 0x450a6abbu, 0x444c0740u, 0x438fb0cbu, 0x42d561b4u, 0x421d1462u, 0x4166c34cu,
      0x40b268fau,
  };
  return kPowers[fraction];
}

// 2^(31 - below / 64), rounded down: the weight of a unit that many steps below the largest.
ART_HD uint64_t mass_below(uint32_t below) {
  return below >= 32 * 64 ? 0 : power_of_fraction(below % 64) >> below / 64;
}

// 64 * log2(mass / 2^31), rounded, is 64 * (exponent - 31) and the number of powers that are
// reached: 2^(1/64) to 2^1. Here is a mass > 0 with half a step more, from where it is rounded
// down.
struct ScaledMass {
  int32_t exponent;
  uint64_t scaled;

  ART_HD explicit ScaledMass(uint64_t mass) : exponent(highest_bit(mass)) {
    const uint64_t leading = exponent < 31 ? mass << (31 - exponent) : mass >> (exponent - 31);
    constexpr uint64_t kHalfStep = 0x80b1ed50;  // 2^31 * 2^(1/128)
    scaled = leading * kHalfStep >> 31;
  }
  // `power`: of the fraction that a power lacks to 2^1.
  ART_HD bool reaches(uint32_t power) const { return scaled >= 2 * uint64_t{power}; }
  ART_HD int32_t steps(int32_t reached) const { return 64 * (exponent - 31) + reached; }
};

// How many powers numbers from 2^31 on have reached, by their first eight bits: between two of
// these there is one power at most.
struct ReachedPowers {
  static constexpr int32_t kFirst = 128, kEnd = 258;  // a ScaledMass is below 2^32 * 2^(1/128)
  uint8_t at[kEnd - kFirst] = {};

  ReachedPowers() {
    for (int32_t i = kFirst; i < kEnd; ++i) {
      const auto is_reached = [&](int32_t count) {
        return uint64_t(i) << 24 >= 2 * uint64_t{power_of_fraction(64 - count)};
      };
      int32_t count = 0;
      while (count < 63 && is_reached(count + 1)) ++count;
      at[i - kFirst] = static_cast<uint8_t>(count);
    }
  }
};

inline const ReachedPowers kReachedPowers;

inline int32_t steps_of_mass(uint64_t mass) {
  const ScaledMass scaled(mass);
  const int32_t reached = kReachedPowers.at[(scaled.scaled >> 24) - ReachedPowers::kFirst];
  return scaled.steps(reached + scaled.reaches(power_of_fraction(63 - reached)));
}

// The same as a natural logarithm, of the mass after an entry of a walk. `largest`: steps of the
// head's largest unit, to which masses are relative. At the limit of int16 that is only a lower
// bound, and so would this be: then nobody shall trust it. `steps_of`: steps_of_mass(), or what
// gives the same.
template <class StepsOf>
ART_HD float log_of_rest(uint64_t mass, int32_t largest, const StepsOf& steps_of) {
  if (mass == 0) return -INFINITY;
  if (largest == kMostSteps) return INFINITY;
  return static_cast<float>(largest + steps_of(mass)) * kNatsPerStep;
}

ART_HD int32_t bucket_of(int32_t score, int32_t best) {
  const int32_t bucket = static_cast<uint32_t>(best - score) / kBucketSteps;
  return bucket < kNumBuckets ? bucket : kNumBuckets - 1;
}

// The units of a head with a visible token, and which of them are always read: the first of them,
// the last complete group and the tokens after it.
struct GuidedUnits {
  int32_t begin;
  int32_t end;
  int32_t sink_end;      // pinned: [begin, sink_end)
  int32_t recent_begin;  // and [recent_begin, end)

  ART_HD explicit GuidedUnits(TokenRange visible) : begin(0), end(0), sink_end(0), recent_begin(0) {
    if (visible.size() <= 0) return;
    begin = visible.begin / kUnitTokens;
    end = (visible.end - 1) / kUnitTokens + 1;
    sink_end = end - begin > kSinkUnits ? begin + kSinkUnits : end;
    const int32_t last_group = visible.end / kGroupTokens - 1;
    recent_begin = last_group > 0 ? last_group * kGroupUnits : 0;
    if (recent_begin < sink_end) recent_begin = sink_end;
  }

  ART_HD int32_t num_units() const { return end - begin; }
  ART_HD int32_t num_pinned() const { return (sink_end - begin) + (end - recent_begin); }
};

}  // namespace art
