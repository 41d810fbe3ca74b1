"""The search for vectors that hot loops keep on the stack."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Sums products with `sums` vectors at a time: there are 32 registers.
SOURCE = """
typedef float Vec __attribute__((vector_size(64)));
void add(const Vec* a, const Vec* b, Vec* to, long n) {
  Vec sums[COUNT] = {};
  for (long i = 0; i < n; ++i) {
#pragma GCC unroll 64
    for (int j = 0; j < COUNT; ++j) sums[j] += a[i] * b[COUNT * i + j];
  }
  for (int j = 0; j < COUNT; ++j) to[j] = sums[j];
}
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 disassemblies")
@pytest.mark.skipif(not (shutil.which("g++") and shutil.which("objdump")), reason="needs g++")
@pytest.mark.parametrize(("count", "spills"), [(8, False), (40, True)])
def test_spills(tmp_path, count, spills):
    source, output = tmp_path / "add.cpp", tmp_path / "add.o"
    source.write_text(SOURCE)
    flags = ("-O3", "-mavx512f", "-mprefer-vector-width=512", f"-DCOUNT={count}")
    subprocess.run(["g++", *flags, "-c", source, "-o", output], check=True)
    command = [sys.executable, ROOT / "tools" / "hot_loops.py", output]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.returncode == (1 if spills else 0), done.stdout
    assert ("moves to or from the stack" in done.stdout) == spills
