"""The results of bench_tensor_parallel.py as Markdown."""

from __future__ import annotations

from typing import Any

Results = dict[str, Any]


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
    rows = {(row["case"], row["impl"], row["gpus"]): row for row in results["rows"]}
    lines = [
        f"| case | implementation | KV read | 1 GPU, ms | {several} GPUs, ms | 1 / {several} |"
        f" launched after, 1 | {several} | kernels, 1 | {several} |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case, impl in dict.fromkeys((case, impl) for case, impl, _ in rows):
        one, all_of_them = rows.get((case, impl, 1)), rows.get((case, impl, several))
        measured = [row for row in (one, all_of_them) if row is not None and row["us"]]
        read = f"{measured[0]['read']:.1%}" if measured else ""
        cells = (f"`{case}`", f"`{impl}`", read, time_cell(one), time_cell(all_of_them))
        ratio = ""
        if len(measured) == 2 and several > 1:
            ratio = f"{measured[0]['us_all_layers'] / measured[1]['us_all_layers']:.2f}"
        parts = (
            f"{row[key] / 1e3:.1f}" if row is not None and row["us"] else ""
            for key in ("us_until_launched", "us_kernels")
            for row in (one, all_of_them)
        )
        lines.append("| " + " | ".join((*cells, ratio, *parts)) + " |")
    explanation = (
        "A decode step of a model of the shape of Llama 3.1 8B with random weights, medians, "
        "without CUDA graphs. *Launched after* is when Python had launched all kernels of the "
        "step: a step that takes no longer is bound by that. *Kernels* is how long those of two "
        "profiled steps kept a GPU busy, a step, without communication. L is the number of layers "
        "that were run. Where it is less than all, the time of all follows in parentheses, from "
        "those of L and L/2 layers, and the ratio is that of these times."
    )
    return f"{explanation}\n\n" + "\n".join(lines)


def time_cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["us"] is None:
        return row["note"].split(":")[0]
    text = f"{row['us'] / 1e3:.1f}"
    return (
        text if row["us_all_layers"] == row["us"] else f"{text} ({row['us_all_layers'] / 1e3:.1f})"
    )
