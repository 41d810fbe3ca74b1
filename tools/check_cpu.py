"""Checks csrc/cpu without torch: all SIMD targets against float64, and what watches their memory.

    python tools/check_cpu.py                 # everything
    python tools/check_cpu.py native valgrind # these parts

native    every target that this machine runs, by the program in tests/cpu
spills    hot loops of the AVX-512 BF16 and AMX targets keep no vectors on the stack
sanitize  the same program with the address, undefined-behaviour and thread sanitizers
valgrind  memcheck of the targets that it can run
aarch64   cross-compiled, under qemu

A part whose tools are not there is left out, and says so. Needs g++ and nothing else.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hot_loops import describe, hot_loops

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [*sorted((ROOT / "csrc/cpu").glob("*.cpp")), *sorted((ROOT / "tests/cpu").glob("*.cpp"))]
# Lines tell where a tool found something.
FLAGS = (
    *("-std=c++20", "-g1", "-fvisibility=hidden", f"-I{ROOT / 'csrc'}", "-pthread"),
    *("-Wall", "-Wextra", "-Wno-missing-field-initializers", "-Wno-psabi"),
)
OPTIMISED = ("-O3", "-fPIC", "-fwrapv", "-Werror")  # as setup.py compiles
SANITIZERS = {
    "address,undefined": ("-O1", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
    "thread": ("-O1",),
}
# No spills in these, and instructions that their loops must have if the search finds them.
SPILL_FREE = {"avx512bf16": ("vdpbf16ps", "vpdpbusd"), "amx": ("vdpbf16ps",)}
VALGRIND_TARGETS = ("avx2", "baseline")  # it does not know AVX-512
VALGRIND = ("valgrind", "--quiet", "--error-exitcode=9", "--leak-check=full")
AARCH64 = ("aarch64-linux-gnu-g++", "qemu-aarch64")
COMMAND_SECONDS = 300  # far more than any takes: so that nothing hangs


class LeftOut(Exception):
    """A part cannot run here; the text says why."""


class Failed(Exception):
    """A part found something; the text says what."""


def run(command: list[str], **environment: str) -> str:
    """What a command prints; it must succeed."""
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=COMMAND_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{' '.join(command)}: not done after {COMMAND_SECONDS} s") from error
    if done.returncode != 0:
        said = " ".join(f"{k}={v}" for k, v in environment.items())
        raise Failed(f"{said} {' '.join(command)}: exit code {done.returncode}\n{done.stdout}")
    return done.stdout


def build(folder: Path, compiler: str, *flags: str) -> Path:
    """The program of tests/cpu, with its object files beside it."""
    folder.mkdir()
    program = folder / "cpu_checks"

    def compile_one(source: Path) -> str:
        output = folder / f"{source.stem}.o"
        run([compiler, *FLAGS, *flags, "-c", str(source), "-o", str(output)])
        return str(output)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    run([compiler, *FLAGS, *flags, *objects, "-o", str(program)])
    return program


class Parts:
    """The parts, each a method that returns lines to print."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.compiler = os.environ.get("CXX", "g++")
        self.native_program: Path | None = None
        self.codes: dict[str, str] = {}  # digests of key codes, by who wrote them

    def native_build(self) -> Path:
        """The program as setup.py would compile it, built once."""
        if self.native_program is None:
            self.native_program = build(self.folder / "native", self.compiler, *OPTIMISED)
        return self.native_program

    def check(self, who: str, command: list[str], target: str, *options: str) -> str:
        """Run the program with one target."""
        line = run([*command, *options], ART_CPU=target).strip()
        digest = re.search(r"key codes (\w+)", line)
        if digest is None or not line.startswith(f"{target}:"):
            raise Failed(f"{who}: expected a line about {target}, got {line!r}")
        self.codes[" ".join([who, target, *options])] = digest[1]
        return line

    def targets(self, command: list[str]) -> dict[str, bool]:
        """Names of the targets, and whether this machine runs them."""
        lines = run([*command, "--targets"], ART_CPU="").split("\n")
        return {name: supported == "1" for name, supported in map(str.split, filter(None, lines))}

    def native(self) -> list[str]:
        """Every target, as it is compiled for use."""
        command = [str(self.native_build())]
        return [
            self.check("native", command, target)
            if supported
            else f"{target}: compiled, left out: this machine does not run it"
            for target, supported in self.targets(command).items()
        ]

    def spills(self) -> list[str]:
        """Hot loops of the targets with AVX-512 BF16."""
        if platform.machine() != "x86_64":
            raise LeftOut(f"the AVX-512 targets are not compiled for {platform.machine()}")
        if shutil.which("objdump") is None:
            raise LeftOut("no objdump")
        folder, lines = self.native_build().parent, []
        for target, expected in SPILL_FREE.items():
            loops = hot_loops(folder / f"target_{target}.o")
            for name in expected:
                if not any(loop.has(name) for loop in loops):
                    raise Failed(f"{target}: expected a loop with {name}, found none")
            if spilling := [describe(loop) for loop in loops if loop.spills]:
                raise Failed("\n".join(spilling))
            lines.append(f"{target}: {len(loops)} hot loops, none moves vectors to the stack")
        return lines

    def sanitize(self) -> list[str]:
        """Every target with sanitizers."""
        lines = []
        for kind, flags in SANITIZERS.items():
            folder = self.folder / kind.replace(",", "-")
            program = build(folder, self.compiler, f"-fsanitize={kind}", *flags)
            # Threads share work the same way on all targets.
            names = [name for name, runs in self.targets([str(program)]).items() if runs]
            for target in names if kind != "thread" else names[-1:]:
                self.check(kind, [str(program)], target, "--reduced")
                lines.append(f"{target}: {kind} sanitizer finds nothing")
        return lines

    def valgrind(self) -> list[str]:
        """Memcheck."""
        if shutil.which(VALGRIND[0]) is None:
            raise LeftOut("no valgrind")
        program = str(self.native_build())
        known = self.targets([program])
        chosen = [target for target in VALGRIND_TARGETS if known.get(target)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            command = [*VALGRIND, program]
            list(pool.map(lambda t: self.check("valgrind", command, t, "--reduced"), chosen))
        return [f"{target}: memcheck finds nothing" for target in chosen]

    def aarch64(self) -> list[str]:
        """Another architecture."""
        if platform.machine() == "aarch64":
            raise LeftOut("this machine is one, see native")
        if missing := [tool for tool in AARCH64 if shutil.which(tool) is None]:
            raise LeftOut(f"no {' and no '.join(missing)}")
        compiler, emulator = AARCH64
        # Statically, so that no foreign library has to be found.
        program = build(self.folder / "aarch64", compiler, "-static", *OPTIMISED)
        command = [emulator, str(program)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(
                pool.map(lambda t: self.check("aarch64", command, t), self.targets(command))
            )

    def compare_codes(self) -> None:
        """The same table makes the same key codes everywhere."""
        for reduced in (False, True):
            codes = {k: v for k, v in self.codes.items() if k.endswith("--reduced") == reduced}
            if len(set(codes.values())) > 1:
                raise Failed(f"expected the same key codes everywhere, got {codes}")


def attempt(name: str, part: Callable[[], list[str]]) -> bool:
    """Run one part and print what came of it. Whether it found nothing."""
    start = time.perf_counter()
    try:
        lines, verdict = part(), "ok"
    except LeftOut as reason:
        lines, verdict = [str(reason)], "left out"
    except Failed as found:
        lines, verdict = [str(found)], "FAILED"
    print(f"{name}: {verdict}, {time.perf_counter() - start:.0f} s")
    print("".join(f"  {line}\n" for text in lines for line in text.split("\n")), end="", flush=True)
    return verdict != "FAILED"


PARTS = ("native", "spills", "sanitize", "valgrind", "aarch64")


def main() -> int:
    """Run the parts."""
    parser = argparse.ArgumentParser(description="Check csrc/cpu without torch")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    chosen = parser.parse_args().parts or PARTS
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"parts must be among {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as folder:
        parts = Parts(Path(folder))
        results = [attempt(name, getattr(parts, name)) for name in PARTS if name in chosen]
        try:
            parts.compare_codes()
        except Failed as found:
            print(found)
            results.append(False)
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
