"""Runs the benchmark scripts as a user would."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


def run_script(name, *arguments):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def benchmark_fixture(name):
    """A fixture that is the module of ``benchmarks`` of this name."""

    @pytest.fixture(name=name)
    def module(monkeypatch):
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module(name)

    return module
