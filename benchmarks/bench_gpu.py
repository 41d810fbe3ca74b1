"""Time of one decode step's attention on a GPU, against its peers on the same tokens.

    python benchmarks/bench_gpu.py                 # ten minutes; a second call goes on
    python benchmarks/bench_gpu.py --budget 120    # stops after two minutes, between two points
    python benchmarks/bench_gpu.py --only 'B1_|never'    # on cases and implementations
    python benchmarks/bench_gpu.py --list          # what would be measured; needs no GPU
    python benchmarks/bench_gpu.py --report FILE   # tables and goals of a result file, likewise

Writes ``results/gpu-<device>.json``, one row per case and implementation, and a table beside it.

    art_dense       art_torch.decode_attention without a criterion: exact
    art_never       the same with thresholds of zero, which random tokens never meet
    art_half        thresholds that every block meets, and a patience that ends half way
    art_fifth       the same after a fifth
    art_uneven      one threshold per head: the heads stop one after the other, all the way
    art_guided_walk the order of a guided walk: scores from key codes, and sorting; its bytes are
                    those of the codes, which `read` is the ceiling for
    art_guided_10   the whole step of a guided walk (scores, order, attention) that ends after
                    10 % of the tokens; also 5, 15 and 25
    art_invariant   art_dense with batch_invariant=True
    art_oldest      art_dense with walk="oldest_first"
    flashinfer_fa2  FlashInfer's decode on tensor cores, its plan not timed
    flashinfer_xqa  FlashInfer's xqa decode
    cudnn           scaled_dot_product_attention by cuDNN, on a contiguous cache
    sdpa_flash      the same by FlashAttention
    read            a plain read of the same number of bytes: the best of three kernels

All but the contiguous ones read random pages. What an implementation does not support stands in
the note of its row. Each result is first compared with float32.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import RESULTS, _commit, device_name, slug, write_results
from gpu_implementations import Prepared, inputs_needed, prepare
from gpu_inputs import Pool, make_inputs
from gpu_points import GUIDED_PERCENT, SMOKE_TABLE, TABLE, Point, parse_points
from gpu_report import COLUMNS, Row, cases_of, cells, problems, verdicts
from gpu_timing import GraphTimer, LoopTimer, watchdog
from make_tables import gpu_table
from rich.console import Console

import art_torch

RUNS = 5
PATIENCE_SECONDS = 60.0  # with one implementation at one point
POOL_BYTES = 6 << 30  # room for the rotating inputs of any point that is smaller
SMOKE_POOL_BYTES = 32 << 20
PACKAGES = ("triton", "flashinfer-python")
WIDTHS = (40, 8, 12, 6, 6, 5, 5, 6, 5, 6, 6, 5, *(5 for _ in GUIDED_PERCENT))

Job = tuple[Point, list[str]]


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def driver_version() -> str | None:
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return answer.splitlines()[0].strip()


def describe(device: torch.device, commit: str | None) -> dict[str, Any]:
    """The head of the result file."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "art_torch": art_torch.__version__,
        **{name: package_version(name) for name in PACKAGES},
    }
    if device.type == "cuda":
        versions["cudnn"] = str(torch.backends.cudnn.version())
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device_name(),
        "driver": driver_version() if device.type == "cuda" else None,
        "versions": {name: text for name, text in versions.items() if text},
        "commit": commit or _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "ceiling_gbps": None,
        "rows": [],
    }


class ResultFile:
    """The rows so far, on disk after every point."""

    def __init__(self, head: dict[str, Any], folder: Path, fresh: bool) -> None:
        self.path = folder / f"gpu-{slug(head['device'])}.json"
        self.results = head
        if not fresh and self.path.exists():
            earlier = json.loads(self.path.read_text())
            for key in ("commit", "driver", "versions"):
                if earlier[key] != head[key]:
                    raise SystemExit(
                        f"{self.path} was measured with {key} {earlier[key]}, this is "
                        f"{head[key]}: move it away, or start anew with --fresh"
                    )
            self.results = earlier

    @property
    def rows(self) -> list[Row]:
        return self.results["rows"]

    def add(self, rows: list[Row]) -> None:
        """Adds rows, orders all by case as measured, and writes the file."""
        self.rows.extend(rows)
        cases = list(dict.fromkeys(row["case"] for row in self.rows))
        self.rows.sort(key=lambda row: cases.index(row["case"]))
        reads = [r["bytes"] / r["us"] / 1e3 for r in self.rows if r["impl"] == "read" and r["us"]]
        self.results["ceiling_gbps"] = round(max(reads), 1) if reads else None
        # A run that is ended while it writes must not lose what was there.
        partial = self.path.with_suffix(".partial")
        write_results("gpu", self.results, partial)
        partial.replace(self.path)
        self.path.with_suffix(".md").write_text(gpu_table(self.results))


def jobs(points: list[Point], only: str, done: list[Row]) -> list[Job]:
    """The points with implementations that are wanted and have no row yet."""
    have = {(row["case"], row["impl"]) for row in done}
    wanted = []
    for point in points:
        names = [
            name
            for name in point.implementations
            if (point.name, name) not in have
            and (re.search(only, point.name) or re.search(only, name))
        ]
        if names:
            wanted.append((point, names))
    return wanted


def one_line(error: BaseException) -> str:
    """An exception as a note."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def failed(point: Point, name: str, note: str) -> Row:
    times = dict.fromkeys(("us", "us_min", "us_max"))
    return {"case": point.name, "impl": name, **times, "bytes": point.kv_bytes, "note": note}


class Measurement:
    """One point: its implementations are prepared one by one, and then take turns."""

    def __init__(self, point: Point, names: list[str], pool: Pool, results: ResultFile) -> None:
        self.point, self.names, self.results = point, names, results
        self.on_gpu = pool.device.type == "cuda"
        self.inputs = make_inputs(point, pool, inputs_needed(point.kv_bytes, names))
        self.prepared: dict[str, Prepared] = {}
        self.timers: dict[str, list[GraphTimer | LoopTimer]] = {}
        self.rows: dict[str, Row] = {}

    def run(self) -> list[Row]:
        for name in self.names:
            self.prepare(name)
        self.take_turns()
        return [self.rows[name] for name in self.names]

    def give_up(self, name: str, seconds: float) -> Callable[[], None]:
        """What the watchdog does: the next run must not try this again."""
        note = f"did not finish within {seconds:.0f} s"

        def write() -> None:
            print(f"{self.point.name} {name}: {note}; the run ends", flush=True)
            self.results.add([failed(self.point, name, note)])

        return write

    def prepare(self, name: str) -> None:
        try:
            # A peer may compile for longer than a kernel may hang.
            seconds = PATIENCE_SECONDS if name.startswith("art_") else 30 * PATIENCE_SECONDS
            timer = GraphTimer if self.on_gpu else LoopTimer
            with watchdog(seconds, self.give_up(name, seconds)):
                prepared = prepare(name, self.inputs)
                timers = [timer(calls, prepared.num_bytes) for calls in prepared.variants]
            self.prepared[name], self.timers[name] = prepared, timers
        except Exception as error:  # a peer may raise anything; it becomes the row's note
            self.rows[name] = failed(self.point, name, one_line(error))
            self.require_gpu()

    def require_gpu(self) -> None:
        """Ends the run where an error has left the GPU unusable; the next goes on behind it."""
        if not self.on_gpu:
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            self.results.add(list(self.rows.values()))
            raise SystemExit(f"{one_line(error)}; run again to go on behind it") from error

    def take_turns(self) -> None:
        """Every implementation once per round, so that a drift of the clocks hits all."""
        samples: dict[str, list[list[float]]] = {
            name: [[] for _ in timers] for name, timers in self.timers.items()
        }
        names = list(self.timers)
        for turn in range(RUNS):
            for offset in range(len(names)):
                name = names[(turn + offset) % len(names)]
                with watchdog(PATIENCE_SECONDS, self.give_up(name, PATIENCE_SECONDS)):
                    for timer, times in zip(self.timers[name], samples[name], strict=True):
                        times.append(timer.run())
        for name in names:
            times = min(samples[name], key=median)
            self.rows[name] = {
                "case": self.point.name,
                "impl": name,
                "us": round(median(times), 2),
                "us_min": round(min(times), 2),
                "us_max": round(max(times), 2),
                "bytes": self.prepared[name].num_bytes,
                "note": self.prepared[name].notes(),
            }


def table_line(texts: list[str]) -> str:
    columns = zip(texts, WIDTHS, strict=True)
    first, *rest = (
        text.ljust(width) if i == 0 else text.rjust(width)
        for i, (text, width) in enumerate(columns)
    )
    return " ".join((first, *rest))


def measure(work: list[Job], pool: Pool, results: ResultFile, deadline: float) -> None:
    """Until ``deadline`` on the clock of time.monotonic()."""
    console = Console(width=160, highlight=False)
    console.print(f"[bold]{table_line(list(COLUMNS))}[/]")
    # Captures must not be disturbed by objects that are freed in between.
    gc.collect()
    gc.freeze()
    gc.disable()
    start = time.monotonic()
    for done, (point, names) in enumerate(work):
        if time.monotonic() > deadline:
            console.print(f"budget spent: {done} of {len(work)} points; run again to go on")
            break
        results.add(Measurement(point, names, pool, results).run())
        gc.collect()
        if pool.device.type == "cuda":
            torch.cuda.empty_cache()
        case = cases_of(results.rows)[point.name]
        ratio = case.ratios.get("dense / FlashInfer", 0.0)
        colour = "red" if ratio > 1.02 else "green" if ratio else "default"
        console.print(f"[{colour}]{table_line(cells(case))}[/] {time.monotonic() - start:4.0f} s")


def show_summary(rows: list[Row]) -> None:
    """The goals, and what went wrong."""
    console = Console(width=160, highlight=False)
    for verdict in verdicts(rows):
        colour = "default" if not verdict.bound else "red" if verdict.missed else "green"
        console.print(
            f"{verdict.title:<42} {verdict.value:7.3f} {verdict.bound:>9}  "
            f"[{colour}]{verdict.text}[/], worst {verdict.at}"
        )
    # A peer that refuses many points says the same at each.
    told: dict[str, list[str]] = {}
    for line in problems(rows):
        case, rest = line.split(" ", 1)
        told.setdefault(rest, []).append(case)
    for rest, cases in told.items():
        more = f" and {len(cases) - 1} more" if len(cases) > 1 else ""
        console.print(f"{rest} ({cases[0]}{more})", markup=False)  # errors have brackets


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Decode attention on a GPU against its peers")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--only", default="", help="regular expression: case or implementation")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--fresh", action="store_true", help="forget all rows in the file")
    parser.add_argument("--commit", help="of the sources, where they are no git checkout")
    parser.add_argument("--list", action="store_true", help="print what would be measured")
    parser.add_argument("--report", type=Path, help="show a result file; measure nothing")
    parser.add_argument("--smoke", action="store_true", help="two tiny points, on the CPU")
    return parser.parse_args()


def show_report(path: Path) -> None:
    results = json.loads(path.read_text())
    print(table_line(list(COLUMNS)))
    for case in cases_of(results["rows"]).values():
        print(table_line(cells(case)))
    show_summary(results["rows"])


def show_list(work: list[Job]) -> None:
    for point, names in work:
        print(f"{point.name}  {point.kv_bytes / 2**30:.2f} GiB  {' '.join(names)}")
    print(f"{len(work)} points, {sum(len(names) for _, names in work)} rows")


def main() -> None:
    arguments = parse_arguments()
    deadline = time.monotonic() + arguments.budget
    if arguments.report:
        return show_report(arguments.report)
    points = parse_points(SMOKE_TABLE if arguments.smoke else TABLE)
    if arguments.list:
        return show_list(jobs(points, arguments.only, []))
    device = torch.device("cpu" if arguments.smoke else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this benchmark needs an NVIDIA GPU (try --list, --report or --smoke)")
    results = ResultFile(describe(device, arguments.commit), arguments.out, arguments.fresh)
    work = jobs(points, arguments.only, results.rows)
    if not jobs(points, arguments.only, []):
        raise SystemExit(f"no case and no implementation matches {arguments.only!r}")
    if work:
        least = SMOKE_POOL_BYTES if arguments.smoke else POOL_BYTES
        pool = Pool(max(least, *(point.kv_bytes for point, _ in work)), device)
        measure(work, pool, results, deadline)
    show_summary(results.rows)
    print(f"{len(results.rows)} rows in {results.path}")
    if any(problem for problem in problems(results.rows) if " art_" in problem):
        sys.exit("the operator failed, or was wrong")


if __name__ == "__main__":
    main()
