"""The results of bench_tensor_parallel.py as Markdown."""

from __future__ import annotations

from typing import Any

Results = dict[str, Any]
Row = dict[str, Any]


def markdown_of(results: Results) -> str:
    """Conditions, checks and times."""
    return "\n\n".join((conditions(results), checks_of(results), times_of(results))) + "\n"


def conditions(results: Results) -> str:
    versions = ", ".join(f"{name} {text}" for name, text in results["versions"].items())
    return (
        f"{results['gpus']} x {results['device']}, driver {results['driver']}; {versions}; commit "
        f"{results['commit']}, {results['date']}."
    )


def checks_of(results: Results) -> str:
    """In float32, several devices against one."""
    lines = [
        "| model | check | compared | different | inside the margin | passed |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for check in results["checks"]:
        cells = (
            check["model"],
            check["check"],
            check["compared"],
            check["different"],
            check.get("different_inside_margin", ""),
            "yes" if check["passed"] else "**no**",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def times_of(results: Results) -> str:
    """Milliseconds of a decode step, on one GPU and on all; in parentheses what is computed."""
    several = results["gpus"]
    rows = {(row["case"], row["impl"], row["gpus"], row["graph"]): row for row in results["rows"]}
    measured = [f"1 GPU, ms | {several} GPUs, ms | 1 / {several}"]
    for title in ("graph", "launched after", "kernels"):
        measured.append(f"{title}, 1 | {several}" + (f" | 1 / {several}" * (title == "graph")))
    lines = ["| case | implementation | KV read | " + " | ".join(measured) + " |"]
    lines.append("| --- | --- |" + " ---: |" * (lines[0].count("|") - 3))
    for case, impl in dict.fromkeys((case, impl) for case, impl, *_ in rows):
        one, others = (rows.get((case, impl, gpus, False)) for gpus in (1, several))
        graphs = [rows.get((case, impl, gpus, True)) for gpus in (1, several)]
        read = next((f"{row['read']:.1%}" for row in (one, others) if row and row["us"]), "")
        cells = [f"`{case}`", f"`{impl}`", read, time_cell(one), time_cell(others)]
        cells += [ratio(one, others), *map(time_cell, graphs), ratio(*graphs)]
        for key in ("us_until_launched", "us_kernels"):
            cells += [f"{row[key] / 1e3:.1f}" if row and row["us"] else "" for row in (one, others)]
        lines.append("| " + " | ".join(cells) + " |")
    return f"{EXPLANATION}\n\n" + "\n".join(lines)


EXPLANATION = (
    "A decode step of a model of the shape of Llama 3.1 8B with random weights, medians. Python "
    "launches the kernels of each step, as `generate()` does; in the columns *graph* a CUDA graph "
    "does. *Launched after* is when Python had launched all of a step: one that takes no longer is "
    "bound by that. *Kernels* is how long those of a step keep a GPU busy, without communication. "
    "L is the number of layers that were run. Where it is less than all, the time of all follows "
    "in parentheses, from those of L and L/2 layers, and the ratio is that of these times."
)


def ratio(one: Row | None, others: Row | None) -> str:
    if not (one and others and one["us"] and others["us"]):
        return ""
    return f"{one['us_all_layers'] / others['us_all_layers']:.2f}"


def time_cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row["us"] is None:
        return row["note"].split(":")[0]
    text = f"{row['us'] / 1e3:.1f}"
    if row["us_all_layers"] == row["us"]:
        return text
    return f"{text} ({row['us_all_layers'] / 1e3:.1f})"
