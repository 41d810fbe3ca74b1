"""Time of one decode step's attention on the CPU, against PyTorch's own on the same tokens.

    python benchmarks/bench_decode.py            # minutes; writes results/decode-<device>.json
    python benchmarks/bench_decode.py --quick    # seconds; only prints

Implementations, which take turns with the last-level cache flushed before each call:

    art_dense    art_torch.decode_attention without a criterion: exact
    art_never    the same with Stability on, and a patience that is never completed
    art_half     Stability.paper(), on tokens that let it stop after exactly half of them
    sdpa_packed  scaled_dot_product_attention on a static contiguous cache, the query heads of a
                 group packed as queries of one head, [B, Hkv, G, D]: its fastest form on a CPU
    read         a plain read of the same bytes

All use the same tokens, in memory with huge pages. art_torch reads them from shuffled pages.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import (
    FLUSH_BYTES,
    Bystanders,
    Timings,
    describe_machine,
    huge_pages,
    progress_bar,
    take_turns,
    write_results,
)
from decode_inputs import DTYPES, HALF, Case, Inputs, make_inputs
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

import art_torch

QUIET_CORES = 0.05  # what others may use while a case is measured
NEVER = art_torch.Stability(0.0, 0.0, patience=2**30)
GOALS = {
    "criterion": ("criterion that never fires: cost", "< 5 %", lambda x: x < 0.05, "{:+.1%}"),
    "half": ("time at half read / dense", "<= 0.60", lambda x: x <= 0.60, "{:.2f}"),
    "sdpa": ("speed against sdpa_packed", ">= 1 x", lambda x: x >= 1.0, "{:.2f} x"),
}


SHAPES = (
    (1, 8192, 9, 3, 64),
    (1, 32768, 32, 8, 128),
    (8, 4096, 32, 8, 128),
    (1, 8192, 32, 32, 128),
)
QUICK_SHAPES = ((1, 2048, 9, 3, 64), (2, 1024, 8, 2, 128))


def make_calls(case: Case, inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """The implementations, each checked to do what its name says."""
    packed = inputs.query.view(case.batch, case.num_kv_heads, -1, case.head_dim)

    def art(criterion: art_torch.Stability | None) -> art_torch.DecodeResult:
        return art_torch.decode_attention(
            inputs.query,
            inputs.storage.key_cache,
            inputs.storage.value_cache,
            inputs.block_table,
            inputs.seq_lens,
            criterion=criterion,
        )

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(packed, inputs.keys, inputs.values)

    expected = sdpa().view_as(inputs.query)
    for criterion, read in ((None, 1), (NEVER, 1), (HALF, 2)):
        result = art(criterion)
        tolerance = 1e-4 if case.dtype == "f32" else 1e-2
        torch.testing.assert_close(result.out, expected, rtol=tolerance, atol=tolerance)
        if not (result.tokens_read == case.tokens // read).all():
            raise RuntimeError(
                f"{case.name}: expected {case.tokens // read} tokens read with {criterion}, got "
                f"{result.tokens_read.tolist()}"
            )
    return {
        "art_dense": lambda: art(None),
        "art_never": lambda: art(NEVER),
        "art_half": lambda: art(HALF),
        "sdpa_packed": sdpa,
        "read": lambda: inputs.all_pages.sum(),
    }


def rounds_of(case: Case, least: int) -> int:
    """More rounds where a call is short, for its time is noisier."""
    return max(least, min(4 * least, 2**31 // case.kv_bytes))


def measure(
    case: Case, rounds: int, attempts: int, flush: Tensor, advance: Callable[..., None]
) -> tuple[Timings, float]:
    """Times a case, again while other processes disturb it, and keeps the quietest attempt.

    Returns:
        The times, and how many cores others kept busy meanwhile.
    """
    torch.set_num_threads(case.threads)
    calls = make_calls(case, make_inputs(case))
    quietest: tuple[Timings, float] | None = None
    for attempt in range(attempts):
        label = case.name + (f", attempt {attempt + 1}" if attempt else "")
        # The bar counts rounds of first attempts.
        step = 0 if attempt else 1
        bystanders = Bystanders()
        timings = take_turns(calls, rounds, flush, partial(advance, label, step))
        disturbance = bystanders.cores()
        if quietest is None or disturbance < quietest[1]:
            quietest = timings, disturbance
        if disturbance < QUIET_CORES:
            break
        time.sleep(min(60, 5 * attempt))
    assert quietest is not None
    return quietest


def rows_of(case: Case, timings: Timings, disturbance: float) -> list[dict[str, Any]]:
    notes = {
        "art_half": "stops after exactly half of the tokens",
        "sdpa_packed": "contiguous cache",
        "read": "the same pages in order",
    }
    rows = []
    for impl in timings.samples:
        num_bytes = case.kv_bytes // 2 if impl == "art_half" else case.kv_bytes
        row = {"case": case.name, "impl": impl, **timings.row(impl), "bytes": num_bytes}
        note = notes.get(impl, "")
        rows.append({**row, "note": note, "others_cores": round(disturbance, 3)})
    return rows


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Per case, the three figures that have a goal, from minima."""
    least: dict[str, dict[str, float]] = {}
    for row in rows:
        least.setdefault(row["case"], {})[row["impl"]] = row["us_min"]
    return {
        case: {
            "criterion": us["art_never"] / us["art_dense"] - 1,
            "half": us["art_half"] / us["art_dense"],
            "sdpa": us["sdpa_packed"] / us["art_dense"],
        }
        for case, us in least.items()
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    by_case: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_case.setdefault(row["case"], {})[row["impl"]] = row
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    times = Table("case", title="One decode step's attention: minimum and median, ms", box=SIMPLE)
    for impl in impls:
        times.add_column(impl, justify="right")
    goals = Table("case", title="Ratios of minima, and GB/s at the minimum", box=SIMPLE)
    for title in (*GOALS, "art_dense GB/s", "sdpa_packed GB/s", "read GB/s"):
        goals.add_column(title, justify="right")
    figures = ratios(rows)
    for case, measured in by_case.items():
        least_and_median = (
            f"{measured[impl]['us_min'] / 1e3:.2f} {measured[impl]['us'] / 1e3:7.2f}"
            for impl in impls
        )
        times.add_row(case, *least_and_median)
        cells = []
        for name, (_, _, met, form) in GOALS.items():
            value = figures[case][name]
            cells.append(f"[{'green' if met(value) else 'red'}]{form.format(value)}[/]")
        for impl in ("art_dense", "sdpa_packed", "read"):
            cells.append(f"{measured[impl]['bytes'] / measured[impl]['us_min'] / 1e3:.1f}")
        goals.add_row(case, *cells)
    console.print(times, goals)
    disturbed = sum(impls["read"]["others_cores"] >= QUIET_CORES for impls in by_case.values())
    if disturbed:
        console.print(f"other processes disturbed {disturbed} of {len(by_case)} cases")
    for name, (title, goal, met, form) in GOALS.items():
        values = sorted(figure[name] for figure in figures.values())
        low, high = form.format(values[0]), form.format(values[-1])
        missed = sum(not met(value) for value in values)
        verdict = f"missed in {missed} of {len(values)} cases" if missed else "met in all cases"
        console.print(f"{name}: {title} {low} to {high}, goal {goal} {verdict}", highlight=False)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Decode attention on the CPU against sdpa")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, writes no result file")
    parser.add_argument("--rounds", type=int, help="calls per implementation; default: 25 or more")
    parser.add_argument("--attempts", type=int, help="at a case that others disturb; default 3")
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 and 2")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    shapes = QUICK_SHAPES if arguments.quick else SHAPES
    threads = arguments.threads or ([1] if arguments.quick else [1, 2])
    cases = [
        Case(*shape, dtype, page_size, count)
        for page_size in (64, 256)
        for shape in shapes
        for dtype in DTYPES
        for count in threads
    ]
    cases = [case for case in cases if arguments.cases in case.name]
    if not cases:
        raise SystemExit(f"no case has {arguments.cases!r} in its name")
    rounds = {
        case: arguments.rounds or (3 if arguments.quick else rounds_of(case, 25)) for case in cases
    }
    attempts = arguments.attempts or (1 if arguments.quick else 3)
    results = describe_machine()
    flush = huge_pages(FLUSH_BYTES // 8, dtype=torch.int64).fill_(1)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode(), progress_bar("bench_decode", sum(rounds.values())) as advance:
        for case in cases:
            rows += rows_of(case, *measure(case, rounds[case], attempts, flush, advance))
    reads = [row["bytes"] / row["us_min"] / 1e3 for row in rows if row["impl"] == "read"]
    results.update(threads=threads, ceiling_gbps=round(max(reads), 1), rows=rows)
    show(rows, console)
    if arguments.output or not arguments.quick:
        console.print(f"written to {write_results('decode', results, arguments.output)}")


if __name__ == "__main__":
    main()
