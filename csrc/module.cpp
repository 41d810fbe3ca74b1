// Build information for Python. The operators register themselves when this library is loaded.
#include <pybind11/pybind11.h>

#include "cpu/kernels.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of the compiled art_torch library.";
  m.def("cpu_target", &art::cpu::target_name, "Name of the SIMD target in use.");
  m.def(
      "cpu_targets",
      [] {
        pybind11::dict targets;
        for (const auto& [name, supported] : art::cpu::target_support()) targets[name] = supported;
        return targets;
      },
      "Names of all SIMD targets, the best first, and whether this machine runs them.");
  m.attr("stable_abi_target") = ART_STABLE_ABI_TARGET;
}
