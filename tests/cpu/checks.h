// The checks, and what they count.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "exact.h"
#include "problem.h"

namespace checks {

// A decision nearer to its threshold may be made otherwise than in float64. Then the case is drawn
// again, so that all stops can be compared.
constexpr double margin_of(DType dtype) { return dtype == DType::kFloat32 ? 2e-3 : 1e-2; }
constexpr uint32_t kMostDraws = 50;

struct Totals {
  int failures = 0;
  int items = 0;
  int early_stops = 0;
  int shared_runs = 0;     // in which two threads worked at the same item
  double worst_out = 0.0;  // the largest error, as a part of what is allowed
  double worst_lse = 0.0;
  double worst_mass = 0.0;
  uint64_t digest = 0xcbf29ce484222325;  // of all key codes
};

// Prints what was expected and what came instead.
__attribute__((format(printf, 3, 4))) void fail(Totals& totals, const std::string& name,
                                                const char* format, ...);

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, Free>;

// From a cache line on.
Memory allocate(size_t bytes);

// Calls run(worker) for all workers, each on a thread of its own.
template <class Run>
void on_threads(int64_t num_workers, const Run& run) {
  std::vector<std::thread> threads;
  for (int64_t worker = 1; worker < num_workers; ++worker) threads.emplace_back(run, worker);
  run(0);
  for (std::thread& thread : threads) thread.join();
}

void check_attention(const std::string& name, const Case& what, DType dtype, Totals& totals);
void check_guided(const std::string& name, const Case& what, DType dtype, Totals& totals);

// Attention of one problem, on one and two threads.
void check_result(const std::string& name, const DecodeParams& params, const Exact& exact,
                  Totals& totals);

void check_append(const std::string& name, const Case& what, DType dtype, Totals& totals);

}  // namespace checks
