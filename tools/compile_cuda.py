"""Compiles the .cu files without torch, and fails on a warning, a spill or local memory.

    python tools/compile_cuda.py              # every file
    python tools/compile_cuda.py sm80 append  # those with one of these words in their path
    python tools/compile_cuda.py --verbose    # and a table of what each kernel takes

Run where there is nvcc; no GPU and no CUDA build of torch is needed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"
ARCHS = ("80", "90a")
FLAGS = (
    *("-std=c++20", "-O3", "-prec-div=false", "-prec-sqrt=false"),
    *("-Werror=all-warnings", "-Xptxas=-v", f"-I{CSRC}"),
)
# Both archs in one call share the host's part of the work.
TARGETS = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
KERNEL = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
LOCAL_MEMORY = re.compile(r"(\d+) bytes (?:stack frame|spill stores|spill loads)")


@dataclass
class Kernel:
    """What ptxas reports of one kernel on one arch."""

    name: str
    arch: str
    registers: int
    shared_bytes: int  # static; what a launch asks for comes on top
    local_bytes: int  # stack frame, spilled stores and loads


@dataclass
class Compiled:
    """The outcome of one file."""

    path: Path
    log: str
    failed: bool
    seconds: float
    code_bytes: int
    kernels: list[Kernel]


def kernels_in(log: str) -> list[Kernel]:
    """The kernels that a log of ptxas -v tells of, by their mangled names."""
    kernels = []
    _, *pieces = KERNEL.split(log)
    for name, arch, report in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True):
        registers = re.search(r"Used (\d+) registers", report)
        if registers is None:
            raise RuntimeError(f"no number of registers in the report of {name}:\n{report}")
        shared = re.search(r"(\d+) bytes smem", report)
        local = sum(map(int, LOCAL_MEMORY.findall(report)))
        shared_bytes = int(shared[1]) if shared else 0
        kernels.append(Kernel(name, arch, int(registers[1]), shared_bytes, local))
    return kernels


def compile_one(path: Path) -> Compiled:
    """Compile one file for all archs."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out.o"
        command = ["nvcc", *FLAGS, *TARGETS, "-c", str(path), "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True)
        size = output.stat().st_size if output.exists() else 0
    log = done.stdout + done.stderr
    kernels = kernels_in(log)
    # Functions that are no kernels have frames too, if they are not inlined.
    local = any(map(int, LOCAL_MEMORY.findall(log)))
    seconds = time.perf_counter() - start
    return Compiled(path, log, done.returncode != 0 or local, seconds, size, kernels)


def demangled(names: list[str]) -> list[str]:
    """Names as they are written in C++, without what only tells the types of the arguments."""
    if shutil.which("c++filt") is None:
        return names
    text = "\n".join(names)
    done = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True)
    return [
        re.sub(r"\(.*|\bart::cuda::|^void ", "", line.replace("(anonymous namespace)::", ""))
        for line in done.stdout.splitlines()
    ]


def print_table(results: list[Compiled]) -> None:
    """Registers and memory of every kernel."""
    kernels = [kernel for result in results for kernel in result.kernels]
    names = demangled([kernel.name for kernel in kernels])
    print("\nregisters  smem  local  arch     kernel")
    for kernel, name in sorted(zip(kernels, names, strict=True), key=lambda row: row[1]):
        print(
            f"{kernel.registers:9} {kernel.shared_bytes:5} {kernel.local_bytes:6}"
            f"  {kernel.arch:7}  {name}"
        )


def main() -> int:
    """Compile, and report."""
    parser = argparse.ArgumentParser(description="Compile the CUDA files, allowing no spill")
    parser.add_argument("words", nargs="*", help="only files with one of these in their path")
    parser.add_argument("--verbose", action="store_true", help="registers and memory per kernel")
    arguments = parser.parse_args()
    paths = [
        path
        for path in sorted(CSRC.rglob("*.cu"))
        if not arguments.words
        or any(word in str(path.relative_to(CSRC)) for word in arguments.words)
    ]
    if not paths:
        raise SystemExit(f"no .cu file has one of {arguments.words} in its path")
    start = time.perf_counter()
    results = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for result in pool.map(compile_one, paths):
            results.append(result)
            verdict = "failed" if result.failed else "ok"
            print(
                f"{verdict:6} {result.path.relative_to(CSRC)}  {result.seconds:.1f} s,"
                f" {result.code_bytes >> 10} KiB",
                flush=True,
            )
            if result.failed:
                print(result.log)
    if arguments.verbose:
        print_table(results)
    kernels = sum(len(result.kernels) for result in results)
    failed = sum(result.failed for result in results)
    print(
        f"{len(paths)} files and {kernels} kernels for sm_{', sm_'.join(ARCHS)}"
        f" in {time.perf_counter() - start:.0f} s; {failed} files failed"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
