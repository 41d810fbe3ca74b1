// Checks of one SIMD target, the one that ART_CPU names, against float64: attention and where it
// stops, key codes and the walks that they guide, new tokens. Needs no torch, so that it runs where
// there is none, and under tools that watch every access to memory.
//
//   cpu_checks            the whole table
//   cpu_checks --reduced  each case with one dtype
//   cpu_checks --targets  names of the targets, and whether this machine runs them
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "checks.h"
#include "cpu/arena.h"
#include "cpu/kernels.h"
#include "table.h"

namespace checks {

void fail(Totals& totals, const std::string& name, const char* format, ...) {
  if (++totals.failures > 20) return;
  std::printf("%s: ", name.c_str());
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::printf("\n");
}

Memory allocate(size_t bytes) {
  const size_t line = art::cpu::Arena::kAlignment;
  return Memory(std::aligned_alloc(line, (bytes + line - 1) / line * line));
}

namespace {

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kInt8};
constexpr const char* kDTypeNames[] = {"float32", "float16", "bfloat16", "int8"};

int print_targets() {
  for (const auto& [name, supported] : art::cpu::target_support()) {
    std::printf("%s %d\n", name, supported);
  }
  return 0;
}

int check_all(bool reduced) {
  Totals totals;
  const std::vector<Case> cases = all_cases();
  for (size_t i = 0; i < cases.size(); ++i) {
    for (size_t dtype = 0; dtype < 4; ++dtype) {
      if (reduced && dtype != i % 4) continue;
      const std::string name = cases[i].name + ", " + kDTypeNames[dtype];
      const auto check = cases[i].guided ? check_guided : check_attention;
      check(name, cases[i], kDTypes[dtype], totals);
      check_append(name, cases[i], kDTypes[dtype], totals);
    }
  }
  // A table in which nothing stops, or nothing is shared, would check little.
  if (totals.early_stops == 0) fail(totals, "table", "expected items that stop early, got none");
  if (totals.shared_runs == 0) fail(totals, "table", "expected items that are shared, got none");
  std::printf(
      "%s: %zu cases, %d items of which %d stop early, %d runs on two threads, %d failures; "
      "largest "
      "errors as parts of what is allowed: outputs %.2f, lse %.2f, estimated mass %.2f; key codes "
      "%016llx\n",
      art::cpu::target_name(), cases.size(), totals.items, totals.early_stops, totals.shared_runs,
      totals.failures, totals.worst_out, totals.worst_lse, totals.worst_mass,
      static_cast<unsigned long long>(totals.digest));
  return totals.failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace checks

int main(int argc, char** argv) {
  const std::string option = argc > 1 ? argv[1] : "";
  if (option == "--targets") return checks::print_targets();
  if (option.empty() || option == "--reduced") return checks::check_all(!option.empty());
  std::fprintf(stderr, "expected --reduced or --targets, got %s\n", option.c_str());
  return 2;
}
