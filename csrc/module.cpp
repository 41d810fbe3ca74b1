// Build information for Python. The operators register themselves when this library is loaded.
#include <pybind11/pybind11.h>

#include "cpu/kernels.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of the compiled art_torch library.";
  m.def("cpu_target", &art::cpu::target_name,
        "Name of the SIMD target in use: avx512bf16, avx512, avx2 or baseline.");
  m.attr("stable_abi_target") = ART_STABLE_ABI_TARGET;
}
