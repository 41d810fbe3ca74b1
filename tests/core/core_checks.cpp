// Checks of the pure functions in csrc/core that only GPU kernels use. Prints what is wrong.
#include <cstdio>
#include <random>

#include "core/divider.h"
#include "core/schedule.h"

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
    const art::Divider divider(divisor);
    expect(divider.quotient(n) == n / divisor, "quotient", n, divisor);
    expect(divider.remainder(n) == n % divisor, "remainder", n, divisor);
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
  const int32_t max_clusters[3] = {66, 32, 16};  // an H100
  const auto blocks = [&](int64_t items, int64_t steps) {
    return art::cuda_cluster_blocks(items, steps, 132, max_clusters);
  };
  expect(blocks(8, 512) == 8, "8 items", blocks(8, 512), 8);
  expect(blocks(16, 512) == 4, "16 items", blocks(16, 512), 4);
  expect(blocks(32, 512) == 2, "32 items", blocks(32, 512), 2);
  expect(blocks(64, 512) == 2, "64 items", blocks(64, 512), 2);
  expect(blocks(67, 512) == 0, "67 items", blocks(67, 512), 0);
  expect(blocks(8, 16) == 4, "few steps", blocks(8, 16), 4);
  expect(blocks(1, 1) == 2, "one step", blocks(1, 1), 2);
}

}  // namespace

int main() {
  check_divider();
  check_exchange();
  check_cluster_blocks();
  std::printf("%d failures\n", num_failures);
  return num_failures == 0 ? 0 : 1;
}
