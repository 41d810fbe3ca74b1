"""The goals of bench_decode.py, and its rows as tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from decode_implementations import FRACTIONS
from decode_inputs import Case
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table
from table_parts import Row, by_case

QUIET_CORES = 0.05  # what others may use while a case is measured
LONG = 4096  # tokens from which on memory, and not the call, decides; goals are for those
BF16_SIMD = ("amx", "avx512bf16")
OVERHEAD_US = 25.0  # that stopping at a fraction may cost beside its part of the time

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


def case_column(cases: list[Case]) -> Column:
    return Column("case", min_width=max(len(case.name) for case in cases))


def times_table(measured: dict[str, Measured], cases: list[Case], impls: list[str]) -> Table:
    title = "One decode step's attention: minimum and median, ms"
    table = Table(case_column(cases), title=title, box=SIMPLE)
    for impl in impls:
        table.add_column(impl.removeprefix("art_"), justify="right")
    for case in cases:
        rows = [measured[case.name].get(impl) for impl in impls]
        cells = [row and f"{row['us_min'] / 1e3:.3f} {row['us'] / 1e3:.3f}" for row in rows]
        table.add_row(case.name, *cells)
    return table


def show(rows: list[Row], cases: list[Case], simd: str, console: Console) -> None:
    """Prints times, figures, and for each goal in how many cases it was missed."""
    measured = by_case(rows)
    title = "Figures from minima; coloured where there is a goal"
    table = Table(case_column(cases), title=title, box=SIMPLE)
    for title in (*GOALS, "read GB/s"):
        table.add_column(title, justify="right")
    reached: dict[tuple[str, float], list[float]] = {}
    for case in cases:
        of_case, cells = measured[case.name], []
        for name, goal in GOALS.items():
            figure = goal.figure(of_case)
            limit = goal.limit(case, simd) if case.tokens >= LONG else None
            text = "" if figure is None else goal.form.format(figure)
            if figure is not None and limit is not None:
                reached.setdefault((name, limit), []).append(figure)
                text = f"[{'green' if goal.met(figure, limit) else 'red'}]{text}[/]"
            cells.append(text)
        read = of_case["read"]
        table.add_row(case.name, *cells, f"{read['bytes'] / read['us_min'] / 1e3:.1f}")
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    console.print(times_table(measured, cases, impls), table)
    disturbed = sum(of_case["read"]["others_cores"] >= QUIET_CORES for of_case in measured.values())
    if disturbed:
        console.print(f"other processes disturbed {disturbed} of {len(measured)} cases")
    for (name, limit), figures in reached.items():
        goal = GOALS[name]
        low, high, wanted = map(goal.form.format, (min(figures), max(figures), limit))
        missed = sum(not goal.met(figure, limit) for figure in figures)
        verdict = f"missed in {missed} of {len(figures)} cases" if missed else "met in all cases"
        sign = "<=" if goal.at_most else ">="
        console.print(
            f"{name}: {goal.title} {low} to {high}, goal {sign} {wanted} {verdict}", highlight=False
        )
