"""Other SIMD targets than the one that all tests run on, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import art_torch
from art_torch import _C

HERE = Path(__file__).parent
# All group sizes, dtypes and layouts, lengths that end anywhere.
TABLE = (
    "test_guided_walk.py::test_against_the_reference",
    "test_decode_attention.py::test_case",
)


def run(command, target):
    return subprocess.run(
        [sys.executable, *command],
        cwd=HERE.parent,
        env={**os.environ, "ART_CPU": target, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("target", [name for name in _C.cpu_targets() if name != _C.cpu_target()])
def test_target(target):
    if not _C.cpu_targets()[target]:
        pytest.skip(f"this machine does not run {target}")
    tests = [str(HERE / test) for test in TABLE]
    done = run(["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", "cpu", *tests], target)
    assert done.returncode == 0, done.stdout
    print_name = "import art_torch; print(art_torch.info().cpu_target)"
    assert run(["-c", print_name], target).stdout.strip() == target


def test_info():
    info = art_torch.info()
    assert info.cpu_targets["baseline"]
    assert info.cpu_targets[info.cpu_target]
    if not os.environ.get("ART_CPU"):  # the best one
        assert info.cpu_target == next(name for name, runs in info.cpu_targets.items() if runs)


CALLS = {
    "info": "art_torch.info()",
    "attention": "art_torch.decode_attention(query, keys, keys, table, lens)",
    "walk": "art_torch.guided_walk(query, keys, table, lens, codes, table)",
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_target_that_does_not_exist(call):
    program = f"""
import torch, art_torch
query, keys = torch.zeros(1, 2, 32), torch.zeros(1, 64, 1, 32)
table, lens = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([64], dtype=torch.int32)
codes = torch.zeros(1, 1, art_torch.key_code_bytes(32), dtype=torch.uint8)
{call}
"""
    done = run(["-c", program], "avx1024")
    assert done.returncode == 1
    assert "RuntimeError: ART_CPU must be one of " in done.stderr
    assert "got avx1024" in done.stderr
    assert "baseline" in done.stderr
