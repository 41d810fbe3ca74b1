"""Ratios of the rows of bench_gpu.py, and the goals they are held against."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gpu_points import GUIDED_PERCENT

Row = dict[str, Any]
Ratios = dict[str, float]

CASE = re.compile(r"B(\d+)_S(\d+)_.*?(_ragged)?")
WALK_NOTE = re.compile(r"scores ([\d.]+) us, order ([\d.]+) us")  # of art_guided_walk
FLASHINFER = {"flashinfer_fa2": "fa2", "flashinfer_xqa": "xqa"}


@dataclass
class Case:
    """What was measured at one point."""

    name: str
    batch: int
    tokens: int
    ragged: bool
    rows: dict[str, Row]
    ratios: Ratios = field(default_factory=dict)

    def us(self, impl: str) -> float | None:
        row = self.rows.get(impl)
        return None if row is None else row["us"]

    @property
    def flashinfer(self) -> tuple[float, str] | None:
        """The best of FlashInfer, and which it is."""
        times = [(us, short) for impl, short in FLASHINFER.items() if (us := self.us(impl))]
        return min(times, default=None)

    @property
    def walk_parts(self) -> tuple[float, float] | None:
        """Microseconds of the scores of a guided walk, and of its order."""
        note = self.rows.get("art_guided_walk", {}).get("note", "")
        match = WALK_NOTE.fullmatch(note)
        return (float(match[1]), float(match[2])) if match else None

    def over(self, impl: str, us: float | None) -> float | None:
        """Time of ``impl`` / ``us``."""
        own = self.us(impl)
        return own / us if own and us else None

    def over_proportional(self, impl: str) -> float | None:
        """Time of an early stop / (time of dense x fraction of the bytes that it reads)."""
        dense = self.us("art_dense")
        if dense is None or self.us(impl) is None:
            return None
        fraction = self.rows[impl]["bytes"] / self.rows["art_dense"]["bytes"]
        return self.over(impl, dense * fraction)


def ratios_of(case: Case) -> Ratios:
    """The ratios that can be formed from what was measured."""
    dense, read = case.us("art_dense"), case.us("read")
    flashinfer = case.flashinfer[0] if case.flashinfer else None
    found = {
        "dense / FlashInfer": case.over("art_dense", flashinfer),
        "never / FlashInfer": case.over("art_never", flashinfer),
        "half / FlashInfer": case.over("art_half", flashinfer),
        "dense / cudnn": case.over("art_dense", case.us("cudnn")),
        "dense / sdpa_flash": case.over("art_dense", case.us("sdpa_flash")),
        "of plain read": read / dense if read and dense else None,
        "never / dense": case.over("art_never", dense),
        "invariant / dense": case.over("art_invariant", dense),
        "oldest / dense": case.over("art_oldest", dense),
        "half": case.over_proportional("art_half"),
        "fifth": case.over_proportional("art_fifth"),
        "uneven": case.over_proportional("art_uneven"),
    }
    if parts := case.walk_parts:
        scores, order = parts
        found["order, us"] = order
        found["order / scores"] = order / scores
        if read:
            of_codes = case.rows["art_guided_walk"]["bytes"] / case.rows["read"]["bytes"]
            found["scores / read of codes"] = scores / (read * of_codes)
    if flashinfer:
        for percent in GUIDED_PERCENT:
            if us := case.us(f"art_guided_{percent}"):
                found[f"guided {percent} %"] = flashinfer / us
    return {name: value for name, value in found.items() if value is not None}


def cases_of(rows: list[Row]) -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for row in rows:
        name = row["case"]
        if name not in cases:
            match = CASE.fullmatch(name)
            if match is None:
                raise ValueError(f"not the name of a case: {name!r}")
            cases[name] = Case(name, int(match[1]), int(match[2]), bool(match[3]), {})
        cases[name].rows[row["impl"]] = row
    for case in cases.values():
        case.ratios = ratios_of(case)
    return cases


def from_us(us: float) -> Callable[[Case], bool]:
    """Points of equal lengths where FlashInfer takes at least ``us`` microseconds."""
    return lambda case: not case.ragged and (case.flashinfer or (0.0,))[0] >= us


def below_us(us: float) -> Callable[[Case], bool]:
    return lambda case: not case.ragged and (case.flashinfer or (us,))[0] < us


def dense_from_us(us: float) -> Callable[[Case], bool]:
    return lambda case: (case.us("art_dense") or 0.0) >= us


def alone_at(tokens: int) -> Callable[[Case], bool]:
    return lambda case: case.batch == 1 and case.tokens == tokens


@dataclass(frozen=True)
class Goal:
    """A bound on a ratio; without one it is only reported."""

    title: str
    ratio: str
    where: Callable[[Case], bool]
    limit: float | None = None
    at_least: bool = False
    mean: bool = False

    def values(self, cases: dict[str, Case]) -> list[tuple[float, str]]:
        """The worst first."""
        found = [
            (case.ratios[self.ratio], case.name)
            for case in cases.values()
            if self.ratio in case.ratios and self.where(case)
        ]
        if self.mean and found:
            logarithms = [math.log(value) for value, _ in found]
            return [(math.exp(sum(logarithms) / len(found)), f"mean of {len(found)}")]
        return sorted(found, reverse=not self.at_least)

    def met(self, value: float) -> bool:
        if self.limit is None:
            return True
        return value >= self.limit if self.at_least else value <= self.limit

    @property
    def bound(self) -> str:
        if self.limit is None:
            return ""
        return f"{'>=' if self.at_least else '<='} {self.limit:.3f}"


def always(case: Case) -> bool:
    return True


def is_usual(case: Case) -> bool:
    """32 query and 8 KV heads of 128, sequences of equal lengths."""
    return "_H32/8_D128_" in case.name and not case.ragged


def with_tokens(least: int, below: int, context: int) -> Callable[[Case], bool]:
    """Usual batches of so many tokens, in contexts of at least ``context``."""

    def where(case: Case) -> bool:
        total = case.batch * case.tokens
        return is_usual(case) and least <= total < below and case.tokens >= context

    return where


def usual_alone_at(tokens: int) -> Callable[[Case], bool]:
    return lambda case: is_usual(case) and alone_at(tokens)(case)


def many_codes(case: Case) -> bool:
    return is_usual(case) and case.rows["art_guided_walk"]["bytes"] >= 300e6


def guided_goals() -> list[Goal]:
    """FlashInfer's dense time over that of guided steps, by tokens in the batch."""
    million, many = 1 << 20, 1 << 40

    def at_8k(least: int, below: int) -> Callable[[Case], bool]:
        where = with_tokens(least, below, 0)
        return lambda case: where(case) and case.tokens == 8192

    goals = [
        (5, "from 1M tokens, contexts from 32k", with_tokens(million, many, 32768), 5.5),
        (10, "from 1M tokens, contexts from 32k", with_tokens(million, many, 32768), 4.6),
        (15, "from 1M tokens", with_tokens(million, many, 32768), 3.8),
        (25, "from 1M tokens", with_tokens(million, many, 32768), 2.7),
        (15, "from 1M tokens, contexts of 8k", at_8k(million, many), 3.4),
        (25, "from 1M tokens, contexts of 8k", at_8k(million, many), 2.6),
        (15, "256k tokens, contexts from 32k", with_tokens(1 << 18, million, 32768), 3.3),
        (25, "256k tokens, contexts from 32k", with_tokens(1 << 18, million, 32768), 2.5),
        (15, "256k tokens, contexts of 8k", at_8k(1 << 18, million), 3.1),
        (25, "256k tokens, contexts of 8k", at_8k(1 << 18, million), 2.3),
        (15, "64k tokens", with_tokens(1 << 16, 1 << 18, 0), 2.2),
        (25, "64k tokens", with_tokens(1 << 16, 1 << 18, 0), 1.9),
        (15, "B1 32k", usual_alone_at(32768), 1.6),
        (25, "B1 32k", usual_alone_at(32768), 1.45),
        (25, "everywhere", always, 1.0),
    ]
    return [
        Goal(f"FlashInfer / guided {percent} %, {title}", f"guided {percent} %", where, limit, True)
        for percent, title, where, limit in goals
    ]


GOALS = (
    Goal("dense / FlashInfer, mean", "dense / FlashInfer", from_us(0), 1.0, mean=True),
    Goal("never / FlashInfer, mean", "never / FlashInfer", from_us(0), 1.0, mean=True),
    Goal("dense / FlashInfer from 50 us", "dense / FlashInfer", from_us(50), 1.02),
    Goal("never / FlashInfer from 50 us", "never / FlashInfer", from_us(50), 1.02),
    Goal("dense / FlashInfer from 20 us", "dense / FlashInfer", from_us(20), 1.05),
    Goal("never / FlashInfer from 20 us", "never / FlashInfer", from_us(20), 1.05),
    Goal("dense / FlashInfer below 20 us", "dense / FlashInfer", below_us(20)),
    Goal("ragged: dense / FlashInfer", "dense / FlashInfer", lambda c: c.ragged, 0.9),
    Goal("ragged: never / FlashInfer", "never / FlashInfer", lambda c: c.ragged, 0.9),
    Goal(
        "B > 1, from 100 us: of plain read",
        "of plain read",
        lambda c: c.batch > 1 and dense_from_us(100)(c),
        0.96,
        at_least=True,
    ),
    Goal(
        "B = 1, from 100 us: of plain read",
        "of plain read",
        lambda c: c.batch == 1 and dense_from_us(100)(c),
        0.92,
        at_least=True,
    ),
    Goal("criterion from 100 us: never / dense", "never / dense", dense_from_us(100), 1.015),
    Goal("criterion everywhere: never / dense", "never / dense", always, 1.03),
    Goal("half / (dense x fraction), from 100 us", "half", dense_from_us(100), 1.05),
    Goal("half / (dense x fraction)", "half", always, 1.05),
    Goal("fifth / (dense x fraction), from 100 us", "fifth", dense_from_us(100), 1.05),
    Goal("fifth / (dense x fraction)", "fifth", always, 1.05),
    Goal("uneven / (dense x fraction)", "uneven", always, 1.15),
    Goal("B1 32k: half / FlashInfer dense", "half / FlashInfer", alone_at(32768), 0.70),
    Goal("B1 128k: half / FlashInfer dense", "half / FlashInfer", alone_at(131072), 0.60),
    Goal("batch_invariant / dense", "invariant / dense", always),
    Goal("oldest_first / dense", "oldest / dense", always),
    *guided_goals(),
    Goal("scores / a plain read of 300 MB of codes", "scores / read of codes", many_codes, 1.15),
    Goal("order / scores from 1M tokens", "order / scores", with_tokens(1 << 20, 1 << 40, 0), 0.08),
    Goal("order at B1 128k, us", "order, us", usual_alone_at(131072), 6.0),
    Goal("dense / cuDNN (contiguous), mean", "dense / cudnn", always, mean=True),
    Goal("dense / flash (contiguous), mean", "dense / sdpa_flash", always, mean=True),
)


@dataclass(frozen=True)
class Verdict:
    """One goal on what was measured."""

    title: str
    bound: str
    value: float
    at: str
    missed: int
    of: int

    @property
    def text(self) -> str:
        if not self.bound:
            return f"{self.of} points"
        return f"missed at {self.missed} of {self.of}" if self.missed else f"met at all {self.of}"


def verdicts(rows: list[Row]) -> list[Verdict]:
    """The worst value of each goal, for the goals that something was measured for."""
    cases = cases_of(rows)
    found = []
    for goal in GOALS:
        values = goal.values(cases)
        if not values:
            continue
        missed = sum(not goal.met(value) for value, _ in values)
        found.append(Verdict(goal.title, goal.bound, *values[0], missed, len(values)))
    return found


def problems(rows: list[Row]) -> list[str]:
    """One line per row that has no time, or a wrong result."""
    return [
        f"{row['case']} {row['impl']}: {row['note']}"
        for row in rows
        if row["us"] is None or "WRONG" in row["note"]
    ]


COLUMNS = (
    *("case", "us", "FlashInfer", "ratio", "never", "half", "fifth", "uneven", "read", "cuDNN"),
    *("scores", "order"),
    *(f"g{percent}" for percent in GUIDED_PERCENT),
)


def cells(case: Case) -> list[str]:
    """One line of the table, as in ``COLUMNS``."""

    def ratio(name: str, form: str = "{:.3f}", shift: float = 0.0) -> str:
        return form.format(case.ratios[name] + shift) if name in case.ratios else "-"

    dense, best, parts = case.us("art_dense"), case.flashinfer, case.walk_parts
    return [
        case.name,
        f"{dense:.1f}" if dense else "-",
        f"{best[0]:.1f} {best[1]}" if best else "-",
        ratio("dense / FlashInfer"),
        ratio("never / dense", "{:+.1%}", -1.0),
        ratio("half", "{:.2f}"),
        ratio("fifth", "{:.2f}"),
        ratio("uneven", "{:.2f}"),
        ratio("of plain read", "{:.0%}"),
        ratio("dense / cudnn"),
        *(f"{us:.1f}" for us in parts or ()),
        *(() if parts else ("-", "-")),
        *(ratio(f"guided {percent} %", "{:.2f}") for percent in GUIDED_PERCENT),
    ]


EXPLANATION = (
    "Medians of 5 runs of CUDA graphs over rotating inputs. *us*: the operator without a "
    "criterion; *ratio*: that over the best FlashInfer; *never*: what a criterion that never fires "
    "adds; *half*, *fifth*, *uneven*: time of a stop there over (dense x fraction of the bytes "
    "read), per-head stops for *uneven*; *read*: share of a plain read's speed; *cuDNN*: dense "
    "over cuDNN, which reads a contiguous cache; *scores*, *order*: microseconds of the two parts "
    "of a guided walk; *g5*, *g10*, *g15*, *g25*: FlashInfer's dense time over that of a guided "
    "step (scores, order, attention) which reads so many percent of the cache."
)
