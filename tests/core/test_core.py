"""Functions of csrc/core that only GPU kernels use or that must be exact, for the host."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.skipif(not CSRC.exists(), reason="needs the sources")
def test_divisions_and_sizes(tmp_path):
    program = tmp_path / "core_checks"
    command = [COMPILER, "-std=c++20", "-O1", "-Wall", "-Werror", f"-I{CSRC}"]
    subprocess.run([*command, HERE / "core_checks.cpp", "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
