"""What the tables of make_tables.py have in common."""

from __future__ import annotations

from typing import Any

Results = dict[str, Any]
Row = dict[str, Any]


def markdown(header: list[str], rows: list[list[str]], *, left: int = 1) -> str:
    """A table; the first ``left`` columns are text, the rest numbers."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *rows))


def conditions(results: Results) -> str:
    """What was measured where, as the line above a table."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = [results["device"]]
    parts += [f"{results['cores']} cores"] if "cores" in results else []
    parts += [results["simd"]] if results.get("simd") else []
    parts += [f"driver {results['driver']}"] if results.get("driver") else []
    parts += [versions, f"commit {results['commit']}"]
    return "; ".join(parts)


def by_case(rows: list[Row]) -> dict[str, dict[str, Row]]:
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["impl"]] = row
    return cases


def divergence(value: float) -> str:
    """A KL divergence; rounding of float32 logits alone gives 1e-12 to 1e-10."""
    return "0" if value < 1e-9 else f"{value:.2g}"
