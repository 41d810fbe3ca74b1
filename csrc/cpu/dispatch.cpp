// Picks the SIMD target once, when it is first needed.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace art::cpu {
namespace {

struct Target {
  const char* name;
  bool supported;
  const Kernels& (*kernels)(DType dtype);
};

const Target& choose_target() {
  // The builtin looks at CPUID and at what the operating system saves (XCR0).
#if defined(__x86_64__)
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool has_dot_products =
      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
#endif
  static const Target targets[] = {
#if defined(__x86_64__)
      {"avx512bf16", has_avx512 && has_dot_products, avx512bf16::kernels},
      {"avx512", has_avx512, avx512::kernels},
      {"avx2",
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c"),
       avx2::kernels},
#endif
      {"baseline", true, baseline::kernels},
  };
  const char* wanted = std::getenv("ART_CPU");
  std::string names;
  for (const Target& target : targets) {
    if (wanted == nullptr || *wanted == '\0') {
      if (target.supported) return target;
      continue;
    }
    if (std::string(wanted) == target.name && target.supported) return target;
    if (target.supported) names += std::string(names.empty() ? "" : ", ") + target.name;
  }
  throw std::runtime_error("ART_CPU must be one of " + names + " on this machine, got " + wanted);
}

const Target& target() {
  static const Target& chosen = choose_target();
  return chosen;
}

}  // namespace

const char* target_name() { return target().name; }

const Kernels& kernels(DType dtype) { return target().kernels(dtype); }

}  // namespace art::cpu
