// Checks of pure functions in csrc/core: those that only GPU kernels use, and those that have to be
// exact. Prints what is wrong.
#include <cmath>
#include <cstdio>
#include <random>

#include "core/divider.h"
#include "core/key_codes.h"
#include "core/schedule.h"
#include "core/termination.h"
#include "core/unit_order.h"

namespace {

int num_failures = 0;

void expect(bool holds, const char* what, long long a, long long b) {
  if (holds || ++num_failures > 20) return;
  std::printf("%s: %lld, %lld\n", what, a, b);
}

void check_divider() {
  constexpr int32_t kMax = 0x7fffffff;
  std::mt19937 random(1);
  const auto check = [](int32_t divisor, int32_t n) {
    expect(art::Divider(divisor).quotient(n) == n / divisor, "quotient", n, divisor);
  };
  for (int32_t divisor = 1; divisor <= 5000; ++divisor) {
    for (int i = 0; i < 20; ++i) {
      const int32_t n = static_cast<int32_t>(random() & kMax), multiple = n / divisor * divisor;
      check(divisor, n);
      check(divisor, multiple);
      if (multiple > 0) check(divisor, multiple - 1);
    }
    check(divisor, 0);
    check(divisor, kMax);
  }
  for (int i = 0; i < 100000; ++i) {
    const int32_t divisor = static_cast<int32_t>(random() & kMax) | 1;
    check(divisor, static_cast<int32_t>(random() & kMax));
    check(divisor, divisor);
    check(divisor, divisor - 1);
    check(divisor, kMax);
  }
}

// Sizes that the kernels rely on, for all slots and inboxes there are.
void check_exchange() {
  for (int32_t blocks_log2 = 1; blocks_log2 <= 3; ++blocks_log2) {
    for (int64_t slot = 16; slot <= 8448; slot += 16) {
      for (int64_t inbox = 32; inbox <= 4096; inbox *= 2) {
        for (int32_t max_pending = 1; max_pending <= 3; ++max_pending) {
          constexpr int64_t kRoom = 40 << 10;
          const art::CudaExchange found =
              art::cuda_exchange(blocks_log2, slot, inbox, kRoom, max_pending);
          const int64_t bytes = ((slot << found.ring_log2) + (inbox << found.inbox_log2))
                                << found.batch_log2;
          expect(bytes <= kRoom, "room", slot, inbox);
          expect(found.batch_steps() <= 8 && found.ring_batches() <= 8, "sizes", slot, inbox);
          // A batch may be folded while `pending` wait, so their slots have to be there.
          expect(found.pending() <= found.ring_batches(), "pending", slot, inbox);
          expect(found.pending_log2 <= max_pending, "most pending", slot, inbox);
          // All that wait have a place in the inboxes of the thread blocks that judge in turn.
          expect(found.inbox_log2 + blocks_log2 >= found.pending_log2, "inbox", slot, inbox);
          const int32_t steps = 1000;
          int32_t counted = 0;
          for (int32_t batch = 0; batch < found.num_batches(steps); ++batch) {
            counted += found.steps_in(batch, steps);
          }
          expect(counted == steps, "steps", slot, inbox);
        }
      }
    }
  }
}

void check_cluster_blocks() {
  const int32_t max_clusters[3] = {66, 30, 15};  // an H200
  const auto blocks = [&](int64_t items, int64_t steps, int32_t head_dim = 128,
                          bool may_stop = true) {
    return art::cuda_cluster_blocks(items, steps, may_stop, head_dim, max_clusters);
  };
  expect(blocks(15, 512) == 8, "15 items", blocks(15, 512), 8);
  expect(blocks(16, 512) == 4, "16 items", blocks(16, 512), 4);
  expect(blocks(30, 512) == 4, "30 items", blocks(30, 512), 4);
  expect(blocks(32, 512) == 2, "32 items", blocks(32, 512), 2);
  expect(blocks(64, 512) == 2, "64 items", blocks(64, 512), 2);
  expect(blocks(67, 512) == 0, "67 items", blocks(67, 512), 0);
  expect(blocks(132, 512, 64) == 2, "132 small items", blocks(132, 512, 64), 2);
  expect(blocks(133, 512, 64) == 0, "133 small items", blocks(133, 512, 64), 0);
  expect(blocks(96, 130, 64) == 0, "that may stop soon", blocks(96, 130, 64), 0);
  expect(blocks(96, 130, 64, false) == 2, "that may not", blocks(96, 130, 64, false), 2);
  expect(blocks(8, 16) == 4, "few steps", blocks(8, 16), 4);
  expect(blocks(1, 1) == 2, "one step", blocks(1, 1), 2);
  const auto producers = [](int32_t most, int64_t steps, int32_t head_dim) {
    return art::cuda_cluster_producers(most, steps, head_dim);
  };
  expect(producers(2, 32, 128) == 2, "32 steps", producers(2, 32, 128), 2);
  expect(producers(2, 31, 128) == 1, "31 steps", producers(2, 31, 128), 1);
  expect(producers(2, 1, 64) == 2, "small steps", producers(2, 1, 64), 2);
  expect(producers(1, 99, 192) == 1, "only one", producers(1, 99, 192), 1);
}

void check_order_crews() {
  const int32_t max_clusters[3] = {132, 66, 33}, none[3] = {0, 0, 0};  // an H100
  const auto crew = [&](int64_t items, int64_t units) {
    return art::order_crew_log2(items, units, max_clusters);
  };
  expect(crew(8, 8192) == 3, "8 items", crew(8, 8192), 3);
  expect(crew(64, 8192) == 2, "64 items", crew(64, 8192), 2);
  expect(crew(1024, 8192) == 0, "1024 items", crew(1024, 8192), 0);
  expect(crew(8, 2048) == 2, "2048 units", crew(8, 2048), 2);
  expect(crew(8, 1023) == 0, "1023 units", crew(8, 1023), 0);
  expect(crew(1, 0) == 0, "no units", crew(1, 0), 0);
  expect(art::order_crew_log2(8, 8192, none) == 0, "no clusters", 8, 8192);
  const auto warps = [&](int64_t blocks, int64_t units) {
    return art::order_warps(blocks, units, /*group_size=*/4, /*multiprocessors=*/132);
  };
  expect(warps(64, 1024) == 16, "fills 16", warps(64, 1024), 16);
  expect(warps(256, 2048) == 8, "256 blocks", warps(256, 2048), 8);
  expect(warps(512, 512) == 4, "512 blocks", warps(512, 512), 4);
  expect(warps(1024, 512) == 2, "1024 blocks", warps(1024, 512), 2);
  expect(warps(1, 512) == 8, "a vector a lane", warps(1, 512), 8);
  expect(warps(1, 8) == 2, "one vector", warps(1, 8), 2);
}

// All float16 numbers, those half way between two of them, and their neighbours.
void check_halves() {
  for (uint32_t half = 0; half < 0x7bff; ++half) {
    const float here = art::float_of(half), next = art::float_of(half + 1);
    const float middle = here + (next - here) / 2;
    const uint32_t even = half % 2 == 0 ? half : half + 1;
    for (const uint32_t sign : {0u, 0x8000u}) {
      const float s = sign == 0 ? 1.0f : -1.0f;
      expect(art::half_of(s * here) == (half | sign), "half", half, sign);
      expect(art::half_of(s * middle) == (even | sign), "middle", half, sign);
      expect(art::half_of(s * std::nextafter(middle, 0.0f)) == (half | sign), "below", half, sign);
      expect(art::half_of(s * std::nextafter(middle, next)) == ((half + 1) | sign), "above", half,
             sign);
    }
  }
  expect(art::float_of(0x3c00) == 1.0f && art::float_of(0xc000) == -2.0f, "numbers", 1, -2);
  expect(art::half_of(art::kLargestHalf) == 0x7bff, "largest", art::half_of(65504.0f), 0x7bff);
}

void check_codes() {
  for (int i = -40; i <= 80; ++i) {
    const float x = i / 16.0f, rounded = std::nearbyint(x);
    const int32_t expected = rounded < 0 ? 0 : (rounded > 3 ? 3 : static_cast<int32_t>(rounded));
    expect(art::code_of(x + 7.0f, 7.0f, 1.0f) == static_cast<uint32_t>(expected), "code", i, 16);
  }
  expect(art::code_of(1e30f, 0.0f, 6e-8f) == 3 && art::code_of(5.0f, 0.0f, 0.0f) == 0, "codes", 3,
         0);
}

// Every place of a record is used once.
void check_layout() {
  for (int32_t dim = 32; dim <= 256; dim += 16) {
    const art::CodeLayout layout(dim);
    bool codes[64 * 256] = {}, grid[256] = {};
    for (int32_t d = 0; d < dim; ++d) {
      const int32_t position = layout.position(d);
      expect(position >= 0 && position < dim && !grid[position], "position", dim, d);
      grid[position] = true;
      for (int32_t t = 0; t < art::kGroupTokens; ++t) {
        const int32_t place = 4 * layout.byte(t, d) + art::CodeLayout::shift(d) / 2;
        expect(place >= 0 && place < 64 * dim && !codes[place], "place", t, d);
        codes[place] = true;
      }
    }
    expect(layout.record_bytes() == 20 * dim && layout.record_bytes() % 16 == 0, "bytes", dim, 0);
  }
}

// The integers of a guided walk against the functions that they stand for.
void check_masses() {
  for (int32_t below = 0; below < 3000; ++below) {
    const double exact = std::exp2(31 - below / 64.0);
    const double got = static_cast<double>(art::mass_below(below));
    expect(got <= exact + 0.5 && got > exact - 1.5, "mass", below, static_cast<long long>(got));
  }
  std::mt19937_64 random(2);
  for (int i = 0; i < 200000; ++i) {
    const uint64_t mass = (uint64_t{1} << 31) + (random() >> (31 + random() % 33));
    const double exact = 64 * std::log2(static_cast<double>(mass) / 2147483648.0);
    expect(std::abs(art::steps_of_mass(mass) - exact) <= 0.5 + 1e-6, "steps", mass,
           art::steps_of_mass(mass));
  }
  expect(art::steps_of_mass(uint64_t{1} << 31) == 0, "one", 0, 0);
  for (int i = 0; i < 200000; ++i) {  // what is left may weigh less than the largest unit
    const uint64_t mass = (random() >> (32 + random() % 32)) + 1;
    const double exact = 64 * std::log2(static_cast<double>(mass) / 2147483648.0);
    expect(std::abs(art::steps_of_mass(mass) - exact) <= 0.5 + 1e-6, "small", mass,
           art::steps_of_mass(mass));
  }
  for (const float odd : {NAN, INFINITY, -INFINITY, -1e9f}) {
    expect(art::quantise_steps(odd) == art::kLeastSteps, "odd", art::quantise_steps(odd), 0);
  }
  expect(art::quantise_steps(1e9f) == 32767 && art::quantise_steps(-2.5f) == -2, "steps", 0, 0);
}

// Denominators where one part is far above the other, and what is never covered.
void check_residual_mass() {
  const float sinks[] = {-1e4f, -100.0f, -1.0f, 0.0f, 3.0f, 100.0f, 1e4f};
  for (const float max : sinks) {
    const art::SoftmaxState state = {max, 2.5f};
    expect(art::log_denominator(state, nullptr) == art::log_sum_exp(state), "no sink", max, 0);
    for (const float sink : sinks) {
      const double a = max + std::log(2.5), b = sink, largest = std::fmax(a, b);
      const double exact = largest + std::log(std::exp(a - largest) + std::exp(b - largest));
      const double error = art::log_denominator(state, &sink) - exact;
      expect(std::abs(error) <= 4e-7 * (1 + std::abs(exact)), "denominator", max, sink);
    }
  }
  const float limit = art::residual_limit(0.2), none = art::residual_limit(0.0);
  expect(std::abs(limit - std::log(0.25)) < 1e-6 && none == -INFINITY, "limit", 0, 0);
  const art::SoftmaxState one = {2.0f, 1.0f}, nothing, nan = {NAN, NAN}, infinite = {INFINITY, NAN};
  const float sink = -INFINITY, above = std::nextafter(2.0f + limit, 9.0f);
  expect(art::is_covered(one, nullptr, 2.0f + limit, limit), "at the limit", 0, 0);
  expect(!art::is_covered(one, nullptr, above + 1e-6f, limit), "above the limit", 0, 0);
  expect(art::is_covered(one, &sink, -INFINITY, none), "nothing left", 0, 0);
  expect(!art::is_covered(one, nullptr, -700.0f, none), "a little left", 0, 0);
  for (const float rest : {NAN, INFINITY}) {
    expect(!art::is_covered(one, nullptr, rest, 30.0f), "odd rest", 0, 0);
  }
  for (const art::SoftmaxState& state : {nothing, nan, infinite}) {
    for (const float rest : {-INFINITY, 0.0f, INFINITY}) {
      expect(!art::is_covered(state, nullptr, rest, 30.0f), "odd state", 0, 0);
    }
  }
  for (int verdicts = 0; verdicts < 4; ++verdicts) {
    const bool settled = verdicts & 1, covered = verdicts & 2;
    expect(art::stops(settled, covered, false) == (verdicts != 0), "either", verdicts, 0);
    expect(art::stops(settled, covered, true) == (verdicts == 3), "both", verdicts, 0);
  }
}

}  // namespace

int main() {
  check_halves();
  check_codes();
  check_layout();
  check_masses();
  check_residual_mass();
  check_divider();
  check_exchange();
  check_cluster_blocks();
  check_order_crews();
  std::printf("%d failures\n", num_failures);
  return num_failures == 0 ? 0 : 1;
}
