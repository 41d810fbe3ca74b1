"""What the benchmarks share: the description of the machine, memory, timing, result files."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import platform
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"

# Several times the last-level cache, for it need not forget the oldest line first: after 64 MB one
# of 32 MB still held a part, and a call that followed another on the same tokens gained 20 %.
FLUSH_BYTES = 128 << 20
# After work PyTorch's threads wait for more at full speed, for a few milliseconds.
FALL_ASLEEP_SECONDS = 0.02


def recorded(step: Callable[[], Any], warm_up: int = 3, **options: Any) -> torch.cuda.CUDAGraph:
    """A step as a CUDA graph, after some that are run; options are of ``torch.cuda.graph``."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, **options):
        step()
    return graph


def device_name() -> str:
    """The CPU as ``lscpu`` names it, with family and model where the name alone is ambiguous."""
    try:
        text = subprocess.run(
            ["lscpu"], env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True, check=True
        ).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^([^:\n]+):\s*(.*)$", text, re.MULTILINE))
    name = fields.get("Model name", platform.machine())
    # Virtual machines often hide the model number ("AMD EPYC").
    if not re.search(r"\d", name) and "CPU family" in fields:
        name += f" family {fields['CPU family']} model {fields.get('Model', '?')}"
    return name


def slug(name: str) -> str:
    """``name`` as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe_machine(*packages: str) -> dict[str, Any]:
    """The head of a result file: where and with what it was measured, ``packages`` included."""
    import art_torch
    from art_torch import _C

    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "art_torch": art_torch.__version__,
        **{package: version(package) for package in packages},
    }
    return {
        "device": device_name(),
        "driver": None,
        "simd": _C.cpu_target(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": versions,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _commit() -> str | None:
    """The commit, with ``+`` when tracked files differ from it; None outside a git checkout."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


def run_child(script: str, *arguments: str) -> dict[str, Any]:
    """Runs a benchmark as a process of its own; returns the JSON of its last line."""
    command = [sys.executable, str(Path(script).resolve()), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def write_results(name: str, results: dict[str, Any], output: Path | None) -> Path:
    """Writes ``<name>-<device>.json`` into the results folder, or to ``output``."""
    path = output or RESULTS / f"{name}-{slug(results['device'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # One row per line: readable differences between two measurements.
    rows = results.pop("rows")
    head = json.dumps(results, indent=1)
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    path.write_text(f'{head[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')
    results["rows"] = rows
    return path


@contextlib.contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[..., None]]:
    """Yields ``advance(label, steps=1)``; the bar goes to stderr."""
    columns = (
        TextColumn(title),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=False) as progress:
        task = progress.add_task("", total=total)

        def advance(label: str, steps: int = 1) -> None:
            progress.update(task, description=label, advance=steps)

        yield advance


def huge_pages(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros in the kind of memory that art_torch's cache uses, so that nobody else has worse.

    Where the kernel grants huge pages only on request, reading ordinary memory takes up to twice
    as long.
    """
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    alignment = 2 << 20
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    region = mmap.mmap(-1, num_bytes + alignment, flags=flags)
    with contextlib.suppress(OSError):
        region.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(region, dtype=torch.uint8)
    start = -memory.data_ptr() % alignment
    return memory[start : start + num_bytes].view(dtype).view(shape)


def load_smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32 and its tokenizer."""
    sys.path.append(str(ROOT / "examples"))
    from models import smollm2
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    folder = smollm2()
    logging.disable_progress_bar()  # it would tear the benchmark's own
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


class Bystanders:
    """How many cores other processes, and other virtual machines, kept busy since it was made."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        user, nice, system, _, _, irq, softirq, steal = map(
            int, Path("/proc/stat").read_text().split()[1:9]
        )
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy - time.process_time(), time.perf_counter()

    def cores(self) -> float:
        """Average number of cores."""
        others, now = self._now()
        return max(0.0, (others - self._start[0]) / (now - self._start[1]))


class Timings:
    """Wall times of several implementations that took turns, in microseconds."""

    def __init__(self, samples: dict[str, list[float]]) -> None:
        self.samples = samples

    def row(self, name: str) -> dict[str, float]:
        """Median, smallest and largest time of one implementation."""
        times = self.samples[name]
        return {
            "us": round(median(times), 1),
            "us_min": round(min(times), 1),
            "us_max": round(max(times), 1),
        }


def turned(names: list[str], turn: int) -> list[str]:
    """``names``, another one of them first at every turn."""
    first = turn % len(names)
    return names[first:] + names[:first]


def take_turns(
    calls: dict[str, Callable[[], Any]],
    rounds: int,
    flush: torch.Tensor,
    advance: Callable[[], None],
    own_threads: Collection[str] = (),
) -> Timings:
    """Times ``calls`` one after the other, ``rounds`` times, with cold caches.

    Taking turns lets a change of the machine's speed hit all of them. The order is another one
    every time, for the call before may leave traces (a frequency, code and page tables in caches).

    Args:
        calls: What is timed.
        rounds: How often.
        flush: Memory that is read before each call, by the threads that PyTorch uses.
        advance: Called after each round.
        own_threads: Those of ``calls`` that compute with other threads than PyTorch's: before them
            PyTorch's fall asleep, and one thread flushes.
    """
    names = list(calls)
    shuffled = random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for call in calls.values():  # first calls build caches of their own
        call()
    for _ in range(rounds):
        shuffled.shuffle(names)
        for name in names:
            if name in own_threads and torch.get_num_threads() > 1:
                time.sleep(FALL_ASLEEP_SECONDS)
                flush.numpy().sum()
            else:
                flush.sum()
            start = time.perf_counter_ns()
            calls[name]()
            samples[name].append((time.perf_counter_ns() - start) / 1e3)
        advance()
    return Timings(samples)
