"""Compiles every .cu file without torch, and fails on a warning, a spill or local memory.

Run where there is nvcc; no GPU and no CUDA build of torch is needed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"
ARCHS = ("80", "90a")
FLAGS = ("-std=c++20", "-O3", "-Werror=all-warnings", "-Xptxas=-v", f"-I{CSRC}")
MEMORY = re.compile(r"(\d+) bytes (?:stack frame|spill stores|spill loads)")


def compile_one(source: Path, arch: str) -> str | None:
    """Compile one file for one arch; returns what is wrong with it."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}", "-c"]
        command += [str(source), "-o", f"{folder}/out.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    log = done.stdout + done.stderr
    if done.returncode != 0:
        return log
    if any(int(size) for size in MEMORY.findall(log)):
        return "a kernel uses local memory:\n" + log
    return None


def main() -> int:
    """Compile all files for all archs."""
    jobs = [(path, arch) for path in sorted(CSRC.rglob("*.cu")) for arch in ARCHS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        problems = list(pool.map(lambda job: compile_one(*job), jobs))
    for (path, arch), problem in zip(jobs, problems, strict=True):
        print(f"{'failed' if problem else 'ok':6} sm_{arch:4} {path.relative_to(CSRC)}")
        if problem:
            print(problem)
    return 1 if any(problems) else 0


if __name__ == "__main__":
    sys.exit(main())
