// Picks the SIMD target once, when it is first needed.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/kernels.h"

namespace art::cpu {
namespace {

struct Target {
  const char* name;
  bool supported;
  const Kernels& (*kernels)(DType dtype);
};

#if defined(__x86_64__) && defined(__linux__)
// Tiles are so much state that Linux wants to be asked, once for the process.
bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#elif defined(__x86_64__)
bool may_use_tiles() { return false; }
#endif

// The best ones first.
const std::vector<Target>& all_targets() {
  // The builtin looks at CPUID and at what the operating system saves (XCR0).
#if defined(__x86_64__)
  static const bool has_avx512 =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  static const bool has_dot_products =
      has_avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
#endif
  static const std::vector<Target> targets = {
#if defined(__x86_64__)
      {"amx", has_dot_products && may_use_tiles(), amx::kernels},
      {"avx512bf16", has_dot_products, avx512bf16::kernels},
      {"avx512", has_avx512, avx512::kernels},
      {"avx2",
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c"),
       avx2::kernels},
#elif defined(__aarch64__)
      {"neon", true, neon::kernels},
#endif
      {"baseline", true, baseline::kernels},
  };
  return targets;
}

const Target& choose_target() {
  const char* variable = std::getenv("ART_CPU");
  const std::string wanted = variable == nullptr ? "" : variable;
  std::string names;
  for (const Target& target : all_targets()) {
    if (target.supported && (wanted.empty() || wanted == target.name)) return target;
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

std::vector<std::pair<const char*, bool>> target_support() {
  std::vector<std::pair<const char*, bool>> support;
  for (const Target& target : all_targets()) support.emplace_back(target.name, target.supported);
  return support;
}

const Kernels& kernels(DType dtype) { return target().kernels(dtype); }

}  // namespace art::cpu
