"""Builds the compiled library: torch-free kernels behind a stable-ABI operator layer.

The CUDA part is built when torch has CUDA and nvcc is found. ART_CUDA_ARCHS (such as "8.0;9.0a")
chooses the GPUs; TORCH_CUDA_ARCH_LIST is the default for it.
"""

import os
import subprocess
from pathlib import Path

import pybind11
import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).parent
STABLE_ABI_TARGET = "2.11"
STABLE_ABI_VERSION = "0x020b000000000000"
# Code for 8.0 also runs on 8.6, 8.7 and 8.9, code for 10.0 on 10.3 and code for 12.0 on 12.1. A
# tensor-core file takes about 4 s for each of them.
DEFAULT_CUDA_ARCHS = ("8.0", "9.0a", "10.0", "12.0")

CXX_FLAGS = [
    *("-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wall"),
    # Vectors are only passed between functions that are always inlined.
    "-Wno-psabi",
]
NVCC_FLAGS = [
    *("-std=c++20", "-O3", "-Xcompiler=-fvisibility=hidden", "-Werror=all-warnings"),
    # Divisions and roots to two units in the last place: the stopping rule stands behind them.
    *("-prec-div=false", "-prec-sqrt=false"),
    # Device code shrinks to a quarter; the driver unpacks what is used.
    "-Xfatbin=-compress-all",
]


def known_cuda_archs() -> list[str]:
    """The default archs that this nvcc can compile for, PTX for the newest of them."""
    nvcc = str(Path(CUDA_HOME) / "bin" / "nvcc")
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = set(listed.stdout.split())
    archs = [a for a in DEFAULT_CUDA_ARCHS if "compute_" + a.rstrip("a").replace(".", "") in known]
    # What is specific to one GPU ("9.0a") cannot be compiled for the next.
    return [*archs[:-1], archs[-1].rstrip("a") + "+PTX"]


with_cuda = torch.version.cuda is not None and CUDA_HOME is not None
if with_cuda:
    chosen = os.environ.get("ART_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST")
    os.environ["TORCH_CUDA_ARCH_LIST"] = chosen or ";".join(known_cuda_archs())

paths = sorted((ROOT / "csrc").rglob("*.c[pu]*"))
sources = [path for path in paths if path.suffix in (".cpp", ".cu")]
if not with_cuda:
    sources = [p for p in sources if p.suffix == ".cpp" and not p.stem.endswith("_cuda")]
headers = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh")]

extension = (CUDAExtension if with_cuda else CppExtension)(
    name="art_torch._C",
    sources=[str(path.relative_to(ROOT)) for path in sources],
    depends=sorted(str(path.relative_to(ROOT)) for path in headers),
    # torch bundles an older pybind11: ours has to come first.
    include_dirs=[pybind11.get_include(), str(ROOT / "csrc")],
    define_macros=[
        ("TORCH_TARGET_VERSION", STABLE_ABI_VERSION),
        ("ART_STABLE_ABI_TARGET", f'"{STABLE_ABI_TARGET}"'),
        *([("USE_CUDA", None)] if with_cuda else []),
    ],
    extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
    extra_link_args=["-s"],
)

setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension})
