"""Builds for the GPU of this machine, tests on it, and writes down what came of it.

    python tools/gpu_test.py                 # the tests marked `cuda`
    python tools/gpu_test.py --sanitize      # compute-sanitizer on a reduced table of calls
    python tools/gpu_test.py -- -k graphs    # what follows goes to pytest

Needs no environment of its own: any Python with torch, pytest and what builds the package. With
pytest-xdist the tests run side by side. Results go to `benchmarks/results/tests-<device>.json`
and, as a table, to the `.md` file beside it. What is there of the same commit and the same versions
stays: the part of the other of the two runs, and tests, if they were in other files.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
REDUCED = "tests/cuda/reduced.py"
# Without tests of the GPU; some of them import what a GPU machine need not have.
NO_GPU_TESTS = ("tests/test_examples.py", "tests/test_benchmarks.py")
# (compute-sanitizer's tool, arguments of the script)
SANITIZED = (
    ("memcheck", ()),
    ("memcheck", ("--out-of-range",)),
    ("racecheck", ()),
    ("synccheck", ()),
)
ERRORS_FOUND = 9

Part = dict[str, Any]


# ---------------------------------------------------------------- the machine


def run_quietly(*command: str) -> str | None:
    """What a command prints, or None where it does not exist or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def commit() -> str | None:
    """The commit, with ``+`` when tracked files differ from it; None outside a git checkout."""
    found = run_quietly("git", "rev-parse", "--short=12", "HEAD")
    changed = run_quietly("git", "status", "--porcelain", "--untracked-files=no")
    return f"{found}{'+' if changed else ''}" if found else None


def installed(package: str) -> str | None:
    """Version of a package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe_machine(given_commit: str | None) -> Part:
    """Head of the result file."""
    packages = ("numpy", "triton", "transformers", "hypothesis", "pytest", "pytest-xdist")
    source = (ROOT / "art_torch" / "__init__.py").read_text(encoding="utf-8")
    driver = run_quietly("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "art_torch": re.findall(r'__version__ = "(.*)"', source)[0],
        **{package: found for package in packages if (found := installed(package))},
    }
    return {
        "device": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "driver": driver.splitlines()[0] if driver else None,
        "versions": versions,
        "commit": given_commit or commit(),
    }


def build() -> None:
    """Compiles what changed, for this GPU only, unless ART_CUDA_ARCHS says otherwise."""
    major, minor = torch.cuda.get_device_capability()
    own = f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else "")
    environment = {"ART_CUDA_ARCHS": own, "MAX_JOBS": str(os.cpu_count())} | os.environ
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def with_package_on_path() -> dict[str, str]:
    """Environment in which scripts find the package as it was built here."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


# ---------------------------------------------------------------- pytest


def left_out() -> dict[str, str]:
    """Test files that are not run, and why."""
    reasons = {path: "no test of it needs a GPU" for path in NO_GPU_TESTS}
    for file in sorted((ROOT / "tests" / "hf").glob("test_*.py")):
        if not file.name.startswith("test_cuda"):
            reasons[f"tests/hf/{file.name}"] = "no test of it needs a GPU"
    for path, module in (("tests/hf", "transformers"), ("tests/test_hypothesis.py", "hypothesis")):
        if importlib.util.find_spec(module) is None:
            reasons[path] = f"{module} is not installed"
    return reasons


def run_tests(workers: str, more: list[str]) -> Part:
    """Runs pytest and returns what its report says."""
    environment = with_package_on_path()
    ignored = left_out()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"]
    command += ["--name-failures"]
    command += [f"--ignore={path}" for path in ignored]
    side_by_side = workers != "1" and importlib.util.find_spec("xdist") is not None
    if side_by_side:
        command += ["-n", workers, "--dist", "worksteal"]
        environment.setdefault("OMP_NUM_THREADS", "1")  # the reference runs on the CPU
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        done = subprocess.run(
            [*command, f"--junitxml={report}", *more], cwd=ROOT, env=environment, check=False
        )
        part = read_report(report)
    part["duration_s"] = round(time.perf_counter() - start, 1)
    part["exit_code"] = done.returncode
    part["workers"] = workers if side_by_side else "1"
    part["arguments"] = more
    part["left_out"] = {path: reason for path, reason in ignored.items() if "no test" not in reason}
    return part


def read_report(path: Path) -> Part:
    """Counts, failures and figures of a JUnit report."""
    totals, skips = Counter[str](), Counter[str]()
    by_file: dict[str, dict[str, float]] = {}
    failures: list[str] = []
    figures: dict[str, list[str]] = {}
    for case in ElementTree.parse(path).iter("testcase") if path.exists() else ():
        file = case.get("classname", "") or case.get("name", "")
        outcome = "passed"
        for kind in ("failure", "error", "skipped"):
            if (found := case.find(kind)) is not None:
                outcome = {"failure": "failed", "error": "errors"}.get(kind, kind)
                if kind == "skipped":
                    skips[found.get("message", "")] += 1
                else:
                    failures.append(f"{file}::{case.get('name')}")
        totals[outcome] += 1
        row = by_file.setdefault(file, {"seconds": 0.0})
        row[outcome] = row.get(outcome, 0) + 1
        row["seconds"] = round(row["seconds"] + float(case.get("time", 0)), 3)
        for found in case.iter("property"):
            if found.get("name") == "figure":
                figures.setdefault(file, []).append(found.get("value", ""))
    return {
        **{name: totals[name] for name in ("passed", "failed", "errors", "skipped")},
        "by_file": dict(sorted(by_file.items())),
        "skip_reasons": dict(skips),
        "failures": failures,
        "figures": figures,
    }


# ---------------------------------------------------------------- compute-sanitizer


def find_sanitizer() -> str | None:
    """Path of compute-sanitizer."""
    folders = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), "/usr/local/cuda"]
    places = [f"{folder}/{sub}" for folder in folders for sub in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], *places]))


def sanitize(tools: list[str], limit: float) -> Part:
    """Runs compute-sanitizer's tools over the reduced table."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print("compute-sanitizer is not installed: nothing was checked", file=sys.stderr)
        return {"version": None, "runs": []}
    text = run_quietly(sanitizer, "--version") or ""
    runs = [run_tool(sanitizer, tool, args, limit) for tool, args in SANITIZED if tool in tools]
    return {"version": text.splitlines()[-1] if text else None, "runs": runs}


def run_tool(sanitizer: str, tool: str, arguments: tuple[str, ...], limit: float) -> Part:
    """Runs one tool; what it found, or why it did not run."""
    environment = with_package_on_path()
    # Every tensor in an allocation of its own: only so does reading beside it show.
    environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(ERRORS_FOUND)]
    command += ["--print-limit", "20", "--kernel-name", "kns=3art4cuda"]
    command += [sys.executable, REDUCED, *arguments]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit
        )
        code, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        code, output = None, (error.stdout or b"").decode(errors="replace")
    summary = re.findall(r"=+ ((?:\w+ )?SUMMARY: .*)", output)
    result = {0: "clean", ERRORS_FOUND: "errors", None: f"stopped after {limit:.0f} s"}
    run = {
        "tool": tool,
        "script": " ".join([REDUCED, *arguments]),
        "result": result.get(code, f"did not run to its end (exit code {code})"),
        "summary": summary[-1] if summary else None,
        "calls": output.count("\nok ") + output.startswith("ok "),
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(f"{tool:10} {run['script']}: {run['result']}", flush=True)
    if run["result"] != "clean":
        run["output"] = output[-4000:]
        print(output[-12000:])
    return run


# ---------------------------------------------------------------- results


def table(results: Part) -> str:
    """The results as Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines = [
        f"# GPU tests, {results['device']}\n",
        f"Driver {results['driver']}; {versions}; commit {results['commit']}.\n",
    ]
    if tests := results.get("tests"):
        lines.append(
            "| tests | passed | failed | skipped | s |\n| --- | ---: | ---: | ---: | ---: |"
        )
        rows = [*tests["by_file"].items(), ("all", tests | {"seconds": tests["duration_s"]})]
        for name, row in rows:
            failed = row.get("failed", 0) + row.get("errors", 0)
            cells = (row.get("passed", 0), failed, row.get("skipped", 0), f"{row['seconds']:.1f}")
            lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
        lines += ["", *(f"- skipped, {n}: {why}" for why, n in tests["skip_reasons"].items())]
        lines += [f"- {figure}" for some in tests["figures"].values() for figure in some]
    if sanitizer := results.get("sanitizer"):
        lines.append(
            "\n| compute-sanitizer | script | result | summary |\n| --- | --- | --- | --- |"
        )
        for run in sanitizer["runs"]:
            lines.append(f"| {run['tool']} | `{run['script']}` | {run['result']} | "
                         f"{run['summary'] or ''} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def with_files_of(before: Part, part: Part) -> Part:
    """Test results, with those of an earlier run if that was one of other test files."""
    mine, others = part["by_file"], before["by_file"]
    if mine.keys() & others.keys():  # the same tests again
        return part
    totals = {
        name: part[name] + sum(row.get(name, 0) for row in others.values())
        for name in ("passed", "failed", "errors", "skipped")
    }
    return {
        **part,
        **totals,
        "duration_s": round(part["duration_s"] + before["duration_s"], 1),
        "arguments": [before["arguments"], part["arguments"]],
        "by_file": dict(sorted({**mine, **others}.items())),
        "skip_reasons": dict(Counter(before["skip_reasons"]) + Counter(part["skip_reasons"])),
        "failures": before["failures"] + part["failures"],
        "figures": {**before["figures"], **part["figures"]},
    }


def write(head: Part, name: str, part: Part, folder: Path) -> Path:
    """Writes one part of the results beside the other one, if that still holds."""
    slug = re.sub(r"[^a-z0-9]+", "-", head["device"].lower()).strip("-")
    path = folder / f"tests-{slug}.json"
    results = dict(head)
    for place in (RESULTS / path.name, path):
        if place.exists():
            before = json.loads(place.read_text(encoding="utf-8"))
            if all(before.get(key) == value for key, value in head.items()):
                results |= {key: before[key] for key in ("tests", "sanitizer") if key in before}
    if name == "tests" and "tests" in results:
        part = with_files_of(results["tests"], part)
    results[name] = {"date": time.strftime("%Y-%m-%d", time.gmtime()), **part}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(table(results), encoding="utf-8")
    return path


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--sanitize", action="store_true", help="run compute-sanitizer instead of the tests")
    tools = sorted({tool for tool, _ in SANITIZED})
    add("--tools", nargs="+", default=tools, choices=tools, help="of compute-sanitizer")
    add("--limit", type=float, default=500.0, help="seconds for each of its runs")
    add("--workers", default="auto", help="of pytest-xdist")
    add("--no-build", action="store_true", help="use what is built already")
    add("--commit", default=os.environ.get("ART_COMMIT"), help="where there is no git checkout")
    add("--output", type=Path, default=RESULTS, help="folder of the results")
    add("pytest", nargs="*", help="after --: arguments of pytest")
    return parser.parse_args()


def main() -> int:
    """Runs what was asked for; the exit code tells whether it went well."""
    arguments = parse_arguments()
    if not torch.cuda.is_available():
        print(f"there is no GPU that torch {torch.__version__} can use", file=sys.stderr)
        return 2
    if not arguments.no_build:
        build()
    head = describe_machine(arguments.commit)
    if arguments.sanitize:
        name, part = "sanitizer", sanitize(arguments.tools, arguments.limit)
        good = bool(part["runs"]) and all(run["result"] == "clean" for run in part["runs"])
    else:
        name, part = "tests", run_tests(arguments.workers, arguments.pytest)
        good = part["exit_code"] == 0
    print(f"written to {write(head, name, part, arguments.output)}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
