"""The goals of bench_decode.py, and its rows as tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from decode_implementations import FRACTIONS
from decode_inputs import Case
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

QUIET_CORES = 0.05  # what others may use while a case is measured
LONG = 4096  # tokens from which on memory, and not the call, decides; goals are for those
BF16_SIMD = ("amx", "avx512bf16")
OVERHEAD_US = 25.0  # that stopping at a fraction may cost beside its part of the time

Row = dict[str, Any]
Measured = dict[str, Row]  # the rows of one case, by implementation


@dataclass(frozen=True)
class Goal:
    """A figure of a case that shall reach a limit.

    Attributes:
        title: What it is.
        figure: The figure; None where something for it was not measured.
        limit: The limit for a case and a SIMD target; None where there is no goal.
        at_most: Whether the figure shall stay below the limit instead of above it.
        form: How to print both.
    """

    title: str
    figure: Callable[[Measured], float | None]
    limit: Callable[[Case, str], float | None]
    at_most: bool = False
    form: str = "{:.2f}"

    def met(self, figure: float, limit: float) -> bool:
        return figure <= limit if self.at_most else figure >= limit


def speed_against(peer: str, ours: str = "art_dense") -> Callable[[Measured], float | None]:
    def figure(measured: Measured) -> float | None:
        if peer not in measured or ours not in measured:
            return None
        return float(measured[peer]["us_min"] / measured[ours]["us_min"])

    return figure


def part_of_read(measured: Measured) -> float:
    """Of the bandwidth at which the same pages are read in order."""
    dense, read = measured["art_dense"], measured["read"]
    return float(dense["bytes"] / dense["us_min"] / (read["bytes"] / read["us_min"]))


def cost_of_criterion(measured: Measured) -> float:
    return float(measured["art_never"]["us_min"] / measured["art_dense"]["us_min"] - 1)


def time_at(impl: str) -> Callable[[Measured], float | None]:
    """Without ``OVERHEAD_US``, against the same part of the time of reading everything."""

    def figure(measured: Measured) -> float | None:
        if impl not in measured:
            return None
        dense, row = measured["art_dense"], measured[impl]
        part = dense["us_min"] * row["bytes"] / dense["bytes"]
        return float((row["us_min"] - OVERHEAD_US) / part)

    return figure


def only(dtype: str, limit: Callable[[Case], float | None]) -> Callable[[Case, str], float | None]:
    """A goal for one dtype, on targets that multiply bfloat16."""
    return lambda case, simd: limit(case) if case.dtype == dtype and simd in BF16_SIMD else None


def read_goal(case: Case) -> float | None:
    if case.page_size >= 1024:
        return 0.78 if case.head_dim == 128 and case.grouped and case.threads == 1 else 0.90
    if case.page_size == 64:
        if case.threads == 1:
            return 0.58
        return 0.75 if case.grouped else None
    return None


def sdpa_goal(case: Case, simd: str) -> float | None:
    return {"f32": 2.0, "bf16": 3.0 if simd in BF16_SIMD else None}.get(case.dtype)


GOALS = {
    "criterion": Goal(
        "criterion that never fires: cost",
        cost_of_criterion,
        lambda case, simd: 0.03,
        at_most=True,
        form="{:+.1%}",
    ),
    **{
        impl.removeprefix("art_"): Goal(
            f"time at {fraction:.0%} read, less {OVERHEAD_US:.0f} us, / {fraction:.0%} of dense",
            time_at(impl),
            lambda case, simd: 1.06,
            at_most=True,
        )
        for impl, fraction in FRACTIONS.items()
    },
    "read": Goal("bandwidth / that of a plain read", part_of_read, only("bf16", read_goal)),
    "sdpa": Goal("speed / packed sdpa", speed_against("sdpa_packed"), sdpa_goal),
    "vllm": Goal(
        "speed / vLLM",
        speed_against("vllm"),
        only("bf16", lambda case: 2.3 if case.threads == 1 else 1.9),
    ),
    "ggml f16": Goal(
        "speed / ggml with a float16 cache",
        speed_against("ggml_f16"),
        only("bf16", lambda case: 3.5 if case.grouped else 1.6),
    ),
    "ggml bf16": Goal(
        "speed / ggml with a bfloat16 cache", speed_against("ggml_bf16"), lambda case, simd: None
    ),
    "ort": Goal(
        "speed / ONNX Runtime",
        speed_against("ort"),
        only("f32", lambda case: 1.9 if case.grouped else 1.0),
    ),
    "ort int8": Goal(
        "speed with an int8 cache / ONNX Runtime with one",
        speed_against("ort_int8", "art_int8"),
        only("f32", lambda case: 1.3),
    ),
}


def by_case(rows: list[Row]) -> dict[str, Measured]:
    cases: dict[str, Measured] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["impl"]] = row
    return cases


def show(rows: list[Row], cases: list[Case], simd: str, console: Console) -> None:
    """Prints times, figures, and for each goal where it was missed."""
    measured = by_case(rows)
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    times = Table("case", title="One decode step's attention: minimum and median, ms", box=SIMPLE)
    for impl in impls:
        times.add_column(impl.removeprefix("art_"), justify="right")
    figures = Table("case", title="Figures from minima; coloured where there is a goal", box=SIMPLE)
    for title in (*GOALS, "read GB/s"):
        figures.add_column(title, justify="right")
    results: dict[str, list[tuple[float, bool]]] = {}
    for case in cases:
        of_case = measured[case.name]
        cells = [
            f"{of_case[impl]['us_min'] / 1e3:.3f} {of_case[impl]['us'] / 1e3:.3f}"
            if impl in of_case
            else ""
            for impl in impls
        ]
        times.add_row(case.name, *cells)
        cells = []
        for name, goal in GOALS.items():
            figure = goal.figure(of_case)
            limit = goal.limit(case, simd) if case.tokens >= LONG else None
            text = "" if figure is None else goal.form.format(figure)
            if figure is not None and limit is not None:
                met = goal.met(figure, limit)
                results.setdefault(name, []).append((figure, met))
                text = f"[{'green' if met else 'red'}]{text}[/]"
            cells.append(text)
        read = of_case["read"]
        figures.add_row(case.name, *cells, f"{read['bytes'] / read['us_min'] / 1e3:.1f}")
    console.print(times, figures)
    disturbed = sum(of_case["read"]["others_cores"] >= QUIET_CORES for of_case in measured.values())
    if disturbed:
        console.print(f"other processes disturbed {disturbed} of {len(measured)} cases")
    for name, found in results.items():
        form, values = GOALS[name].form, [figure for figure, _ in found]
        missed = sum(not met for _, met in found)
        verdict = f"missed in {missed} of {len(found)} cases" if missed else "met in all cases"
        low, high = form.format(min(values)), form.format(max(values))
        console.print(f"{name}: {GOALS[name].title} {low} to {high}; {verdict}", highlight=False)
