"""Calls that hang, in processes of their own: there a hang is a failed test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

pytestmark = pytest.mark.cuda

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run(script, *arguments, timeout):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    environment.pop("ART_CHECKED", None)
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout.splitlines()[-1]


# Three processes, so that they can run side by side.
@pytest.mark.parametrize("part", range(3))
def test_random_patterns(part, gpu, report):
    report(run("watchdog.py", "--first", str(1000 * part), "--count", "1000", timeout=280))


def test_a_full_device(gpu, report):
    report(run("full_device.py", timeout=200))
