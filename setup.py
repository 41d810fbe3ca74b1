"""Builds the compiled library: torch-free C++ kernels behind a stable-ABI operator layer."""

from pathlib import Path

import pybind11
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
STABLE_ABI_TARGET = "2.11"
STABLE_ABI_VERSION = "0x020b000000000000"

sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))

extension = CppExtension(
    name="art_torch._C",
    sources=sources,
    depends=headers,
    # torch bundles an older pybind11: ours has to come first.
    include_dirs=[pybind11.get_include(), str(ROOT / "csrc")],
    define_macros=[
        ("TORCH_TARGET_VERSION", STABLE_ABI_VERSION),
        ("ART_STABLE_ABI_TARGET", f'"{STABLE_ABI_TARGET}"'),
    ],
    extra_compile_args=[
        *("-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wall"),
        # Vectors are only passed between functions that are always inlined.
        "-Wno-psabi",
    ],
    extra_link_args=["-s"],
)

setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension})
