"""What bench_guided.py prints and draws: means with intervals, facts found, and the picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import guided_texts
import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from art_torch import Stability

Row = dict[str, Any]
RESAMPLES = 10_000


def interval(values: Iterable[float]) -> tuple[float, float]:
    """95 % interval of the mean: the percentiles of the means of resampled windows."""
    array = np.asarray(list(values), dtype=np.float64)
    picks = np.random.default_rng(0).integers(0, len(array), (RESAMPLES, len(array)))
    low, high = np.percentile(array[picks].mean(1), (2.5, 97.5))
    return float(low), float(high)


def grouped(rows: list[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def length_of(case: str) -> int:
    return int(case[1:].split("_")[0])


def summary(rows: list[Row]) -> Row:
    """Means over windows."""
    kl = [row["kl"] for row in rows]
    low, high = interval(kl)
    return {
        "windows": len(rows),
        "read": float(np.mean([row["read"] for row in rows])),
        "kl": float(np.mean(kl)),
        "kl_low": low,
        "kl_high": high,
        "worst": max(kl),
        "top1": float(np.mean([row["top1"] for row in rows])),
    }


def of_texts(rows: list[Row], names: Iterable[str]) -> list[Row]:
    """Teacher-forced rows of these texts, exact ones aside."""
    kept = set(names)
    return [row for row in rows if row["text"] in kept and "kl" in row]


@dataclass(frozen=True)
class Facts:
    """Facts that the exact model finds, and what became of them."""

    found: int
    of: int
    lost: list[float]  # margins by which the exact model finds those that are not found, in nats
    read: float


def needles(rows: list[Row]) -> dict[tuple[str, str], Facts]:
    """Per case and setting."""
    rows = [row for row in rows if "margins" in row]
    exact = {
        (row["case"], row["text"], row["window"]): row["margins"]
        for row in rows
        if row["impl"] == "exact"
    }
    facts = {}
    for (case, impl), group in grouped(rows, "case", "impl").items():
        pairs = [
            (margin, known)
            for row in group
            for margin, known in zip(
                row["margins"], exact[case, row["text"], row["window"]], strict=True
            )
            if known > 0
        ]
        lost = sorted(known for margin, known in pairs if margin <= 0)
        read = float(np.mean([row["read"] for row in group]))
        facts[case, impl] = Facts(len(pairs) - len(lost), len(pairs), lost, read)
    return facts


def summaries(rows: list[Row]) -> list[Row]:
    """One row per kind of text, case and setting, for those who read only the file."""
    result = []
    for kind, names in (("tuning", guided_texts.TUNING), ("held_out", guided_texts.HELD_OUT)):
        for (case, impl), group in grouped(of_texts(rows, names), "case", "impl").items():
            mean = {key: float(f"{value:.4g}") for key, value in summary(group).items()}
            result.append({"texts": kind, "case": case, "impl": impl, **mean})
    for (case, impl), facts in needles(rows).items():
        result.append({"case": case, "impl": impl, **asdict(facts)})
    return result


def labels(presets: Mapping[str, Stability]) -> Callable[[str], str]:
    names = {f"guided {_numbers(rule)}": name for name, rule in presets.items()}
    return lambda impl: f"{impl} = {names[impl]}" if impl in names else impl


def show(rows: list[Row], presets: Mapping[str, Stability]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    label = labels(presets)
    for title, names in (
        ("tuning texts", guided_texts.TUNING),
        ("held-out texts", guided_texts.HELD_OUT),
    ):
        chosen = of_texts(rows, names)
        if chosen:
            console.print(_fidelity_table(f"Guided walk, {title}", chosen, label))
    found = needles(rows)
    if found:
        console.print(_needle_table(found, label))


def _fidelity_table(title: str, rows: list[Row], label: Callable[[str], str]) -> Table:
    table = Table(title=title, box=SIMPLE)
    table.add_column("context")
    table.add_column("walk and rule")
    for name in ("windows", "read", "KL", "95 %", "worst window", "top-1"):
        table.add_column(name, justify="right")
    groups = grouped(rows, "case", "impl")
    for case, impl in sorted(groups, key=lambda key: (length_of(key[0]), key[1])):
        mean = summary(groups[case, impl])
        table.add_row(
            case,
            label(impl),
            str(mean["windows"]),
            f"{mean['read']:.1%}",
            f"{mean['kl']:.2g}",
            f"{mean['kl_low']:.2g} to {mean['kl_high']:.2g}",
            f"{mean['worst']:.2g}",
            f"{mean['top1']:.1%}",
        )
    return table


def _needle_table(found: dict[tuple[str, str], Facts], label: Callable[[str], str]) -> Table:
    table = Table(title="Facts found, of those that the exact model finds", box=SIMPLE)
    table.add_column("context")
    table.add_column("walk and rule")
    table.add_column("found", justify="right")
    table.add_column("read", justify="right")
    table.add_column("exact margins of those lost, nats")
    for case, impl in sorted(found, key=lambda key: (length_of(key[0]), key[1])):
        facts = found[case, impl]
        lost = " ".join(f"{margin:.2g}" for margin in facts.lost[:6])
        table.add_row(
            f"S{length_of(case)}",
            label(impl),
            f"{facts.found} of {facts.of}",
            f"{facts.read:.1%}",
            lost + (" ..." if len(facts.lost) > 6 else ""),
        )
    return table


# Orders of the picture. That by 4-bit codes is nearly that by exact keys: dashed, to see both.
CURVES = {
    "guided": ("guided", "o-"),
    "codes4": ("by 4-bit codes", "s--"),
    "oracle": ("by exact keys", "o-"),
    "quest": ("by Quest's bounds", "o-"),
    "sink_recent": ("sink_recent", "o-"),
    "recent_first": ("recent_first", "o-"),
}


def draw(rows: list[Row], presets: Mapping[str, Stability], path: Path) -> None:
    """KL against the share read by the presets' rules: a line per order, a panel per context."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = grouped(of_texts(rows, guided_texts.HELD_OUT), "case", "impl")
    cases = sorted({case for case, _ in groups}, key=length_of)
    if not cases:
        return
    figure, panels = plt.subplots(
        1, len(cases), figsize=(5 * len(cases), 4.2), sharey=True, squeeze=False
    )
    for panel, case in zip(panels[0], cases, strict=True):
        for walk, (label, style) in CURVES.items():
            impls = {name: f"{walk} {_numbers(rule)}" for name, rule in presets.items()}
            points = {
                name: summary(groups[case, impl])
                for name, impl in impls.items()
                if (case, impl) in groups
            }
            read, kl, low, high = (
                np.array([mean[key] for mean in points.values()])
                for key in ("read", "kl", "kl_low", "kl_high")
            )
            # The same colours where a file has no results for an order.
            (line,) = panel.plot(100 * read, kl, style, ms=4, label=label, zorder=2 + len(style))
            panel.fill_between(100 * read, low, high, alpha=0.15, color=line.get_color())
            for name, mean in points.items():
                if walk == "guided":
                    at = 100 * mean["read"], mean["kl"]
                    panel.annotate(
                        name, at, (0, 7), textcoords="offset points", fontsize=8, ha="center"
                    )
        panel.set(yscale="log", xlabel="KV tokens read, %", xlim=(0, None))
        panel.set_title(f"{length_of(case)} tokens")
        panel.grid(alpha=0.3, which="both")
    panels[0][0].set_ylabel("KL(exact || setting), mean of windows, 95 %")
    panels[0][-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _numbers(rule: Stability) -> str:
    return f"({rule.d_scale:g}, {rule.d_direction:g}, {rule.patience})"
