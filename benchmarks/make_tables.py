"""Fills the tables of README.md and docs/ from the result files, so that no figure is ever typed.

    python benchmarks/make_tables.py            # rewrites them
    python benchmarks/make_tables.py --check    # fails if one is not what the results say

A section ``<!-- table:NAME -->`` to ``<!-- /table -->`` receives the table NAME of ``TABLES``, of
every device with a file ``results/<prefix>-<device>.json``. Only those of GPUs may have none, and
an empty section.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

from common import RESULTS, ROOT, slug
from cpu_tables import (
    decode_excerpt,
    decode_limits_table,
    decode_table,
    guided_decode_excerpt,
    guided_decode_table,
    kvpress_table,
    memory_table,
    presses_table,
    steps_table,
)
from gpu_report import COLUMNS, EXPLANATION, cases_of, cells, verdicts
from table_parts import Results, Row, by_case, conditions, divergence, markdown

SECTION = re.compile(r"(<!-- table:(\w+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)
# What a reader of the README gets of the points of bench_gpu.py.
GPU_EXCERPT = {
    *("B1_S32768_H32/8_D128_bf16_p16", "B4_S32768_H32/8_D128_bf16_p16"),
    *("B8_S8192_H32/8_D128_bf16_p16", "B32_S8192_H32/8_D128_bf16_p16"),
    *("B32_S32768_H32/8_D128_bf16_p16", "B128_S32768_H32/8_D128_bf16_p16"),
    *("B32_S32768_H32/8_D128_bf16_p16_ragged", "B1_S32768_H32/8_D64_bf16_p16"),
}
GPU_EXCERPT_COLUMNS = ("case", "us", "FlashInfer", "ratio", "never", "half", "g5", "g10", "g25")


def gpu_steps_table(results: Results) -> str:
    names = {
        "sdpa_dynamic": "sdpa, `DynamicCache`",
        "sdpa_static": "sdpa, `StaticCache`, graph",
        "exact": "exact",
        "exact_graphed": "exact, graph",
    }
    cases = by_case(results["rows"])
    impls = list(next(iter(cases.values())))
    rows = []
    for case, measured in cases.items():
        cells = [f"`{case}`"]
        for impl in impls:
            row = measured[impl]
            read = f" ({row['read']:.0%})" if row["guided"] else ""
            cells.append(f"{row['us'] / 1e3:.2f}{read}")
        rows.append(cells)
    head = (
        f"{results['model']}: milliseconds of a decode step, in brackets the part of the "
        "cache that was read; without, there was too little for looking to pay"
    )
    header = ["case", *(names.get(impl, f"`{impl}`, graph") for impl in impls)]
    return f"{head}. {conditions(results)}.\n\n{markdown(header, rows)}"


def walks_table(results: Results) -> str:
    cases = list(dict.fromkeys(row["case"] for row in results["rows"]))
    header = ["walk (d_scale, d_direction, patience)"]
    for case in cases:
        header += [f"{case}: read", "KL", "found"]
    impls: dict[str, list[str]] = {}
    for row in results["rows"]:
        cells = impls.setdefault(row["impl"], [f"`{row['impl']}`"])
        found = f"{row['found']} of {row['needles']}"
        cells += [f"{row['read']:.0%}", divergence(row["kl"]), found]
    head = f"{results['model']}; text: `{results['text']}`. {conditions(results)}."
    return f"{head}\n\n{markdown(header, list(impls.values()))}"


def guided_labels(results: Results) -> dict[str, str]:
    """What the rows of the table are called, by their names in the file, in order."""
    rules = {
        name: f"({d_scale:g}, {d_direction:g}, {patience})"
        for name, (d_scale, d_direction, patience) in results["presets"].items()
    }
    return {
        "exact": "exact",
        **{f"guided {rule}": f"`guided`, `{name}`" for name, rule in rules.items()},
        "guided mass 0.2": "`guided`, `ResidualMass(0.2)`",
        f"guided {rules['quality']} and mass 0.1": "`guided`, `quality` and `ResidualMass(0.1)`",
        f"sink_recent {rules['balanced']}": "`sink_recent`, rule of `balanced`",
        f"oldest_first {rules['balanced']}": "`oldest_first` (the paper's), rule of `balanced`",
        "oldest_first (1e-07, 0.001, 5)": "`oldest_first`, `Stability.paper()`",
    }


def guided_table(results: Results) -> str:
    """The presets and what is shown beside them, as far as the package's walk was measured."""
    labels = guided_labels(results)
    texts, facts = {}, {}
    for row in results["summary"]:
        if row["impl"] not in labels or row.get("texts") == "tuning":
            continue
        kind = facts if "found" in row else texts
        kind[row["case"].removesuffix("_needles"), row["impl"]] = row
    if not any(impl.startswith("guided") for _, impl in texts):
        return ""
    cases = sorted({case for case, _ in texts}, key=lambda case: int(case[1:]))
    has_facts = {case for case, _ in facts}
    header = ["walk, rule"]
    for case in cases:
        header += [f"{case}: read", "KL", "top-1", *(["found"] if case in has_facts else [])]
    # What the others are compared with; only its facts are in the file.
    exact = {"read": 1.0, "kl": 0.0, "top1": 1.0}
    rows = []
    for impl, label in labels.items():
        cells = [label]
        for case in cases:
            row = exact if impl == "exact" else texts.get((case, impl))
            found = facts.get((case, impl))
            cells += (
                [f"{row['read']:.1%}", divergence(row["kl"]), f"{row['top1']:.1%}"]
                if row
                else 3 * ["-"]
            )
            if case in has_facts:
                cells.append(f"{found['found']} of {found['of']}" if found else "-")
        if set(cells[1:]) != {"-"}:
            rows.append(cells)
    counts = [int(row["windows"]) for row in texts.values()]
    windows = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
    commits = sorted({row["commit"] for row in results["rows"] if row["impl"] in labels})
    where = conditions(results | {"commit": ", ".join(commits)})
    head = f"{results['model']}; {windows} windows of texts that the presets were not chosen on"
    return f"{head}; `python benchmarks/bench_guided.py`. {where}.\n\n{markdown(header, rows)}"


TRIED_NAMES = {
    "guided": "the package's walk",
    "codes2": "2 bits for the whole range",
    "codes4": "4 bits",
    "oracle": "the keys themselves",
}


def tried_table(results: Results) -> str:
    """What was tried beside the package's walk, by the texts that the presets were chosen on."""
    presets = {
        f"({d_scale:g}, {d_direction:g}, {patience})": name
        for name, (d_scale, d_direction, patience) in results["presets"].items()
    }
    walks: dict[str, dict[str, Row]] = {}
    for row in results["summary"]:
        for numbers, name in presets.items():
            if row["impl"].endswith(f" {numbers}"):
                walks.setdefault(row["impl"].removesuffix(f" {numbers}"), {})[name] = row
                break
        else:
            rule = row["impl"].removeprefix("guided ")
            for numbers, name in presets.items():
                rule = rule.replace(numbers, f"`{name}`")
            rule = re.sub(r"mass ([\d.]+)", r"`ResidualMass(\1)`", rule)
            walks[f"the package's walk, {rule}"] = {"": row}
    header = ["walk, and rule where it is another"]
    for name in ("quality", "balanced"):
        header += [f"`{name}`: read", "KL"]
    rows = []
    for walk, of_rules in walks.items():
        cells = [TRIED_NAMES.get(walk, walk)]
        for name in ("quality", "balanced"):
            row = of_rules.get(name) or (of_rules.get("") if name == "balanced" else None)
            cells += [f"{row['read']:.1%}", divergence(row["kl"])] if row else ["", ""]
        rows.append(cells)
    return f"{results['model']}. {conditions(results)}.\n\n{markdown(header, rows)}"


def gpu_head(results: Results) -> str:
    ceiling = results["ceiling_gbps"]
    head = f"A plain read reaches {ceiling:,.0f} GB/s. " if ceiling else ""
    return f"{head}{conditions(results)}.\n\n"


def gpu_rows(results: Results) -> list[dict[str, str]]:
    lines = map(cells, cases_of(results["rows"]).values())
    return [dict(zip(COLUMNS, line, strict=True)) for line in lines]


def gpu_table(results: Results) -> str:
    """All cases, for a file beside the results."""
    points = [[f"`{row['case']}`", *list(row.values())[1:]] for row in gpu_rows(results)]
    return f"{gpu_head(results)}{EXPLANATION}\n\n{markdown(list(COLUMNS), points)}"


def gpu_excerpt(results: Results) -> str:
    name = f"benchmarks/results/gpu-{slug(results['device'])}.md"
    points = [
        [f"`{row['case']}`", *(row[column] for column in GPU_EXCERPT_COLUMNS[1:])]
        for row in gpu_rows(results)
        if row["case"] in GPU_EXCERPT
    ]
    table = markdown(list(GPU_EXCERPT_COLUMNS), points)
    return f"{gpu_head(results)}{table}\nAll points: [{name}]({name}).\n"


def gpu_goals_table(results: Results) -> str:
    """What was aimed at, and the worst of the points that it is about."""
    rows = [
        [verdict.title, verdict.bound, f"{verdict.value:.3f}", f"`{verdict.at}`", verdict.text]
        for verdict in verdicts(results["rows"])
        if verdict.bound
    ]
    header = ["what", "aim", "worst", "at", "points"]
    return f"{gpu_head(results)}{markdown(header, rows)}"


# What a section shows: the prefix of the files, and how each becomes a table.
TABLES: dict[str, tuple[str, Callable[[Results], str]]] = {
    "decode": ("decode", decode_table),
    "decode_excerpt": ("decode", decode_excerpt),
    "decode_limits": ("decode", decode_limits_table),
    "decode_amx": ("decode_amx", decode_excerpt),
    "guided": ("guided", guided_table),
    "guided_decode": ("guided_decode", guided_decode_table),
    "guided_decode_excerpt": ("guided_decode", guided_decode_excerpt),
    "guided_decode_amx": ("guided_decode_amx", guided_decode_excerpt),
    "kvpress": ("kvpress", kvpress_table),
    "memory": ("memory", memory_table),
    "presses": ("presses", presses_table),
    "steps": ("steps", steps_table),
    "tried": ("tried", tried_table),
    "walks": ("walks", walks_table),
    "gpu": ("gpu", gpu_excerpt),
    "gpu_goals": ("gpu", gpu_goals_table),
    "gpu_steps": ("gpu_steps", gpu_steps_table),
}
OPTIONAL = {"gpu", "gpu_steps"}


def fill(text: str, results_folder: Path) -> str:
    """``text`` with every generated section renewed.

    Raises:
        ValueError: A section names no known table, or is not closed.
        FileNotFoundError: There are no results for a section.
    """
    opened, closed = text.count("<!-- table:"), len(SECTION.findall(text))
    if opened != closed:
        raise ValueError(f"{opened} sections <!-- table:... --> are opened and {closed} are closed")

    def section(match: re.Match[str]) -> str:
        name = match[2]
        if name not in TABLES:
            raise ValueError(f"table must be one of {', '.join(TABLES)}, got {name!r}")
        prefix, table_of = TABLES[name]
        files = sorted(results_folder.glob(f"{prefix}-*.json"))
        if not files and prefix not in OPTIONAL:
            raise FileNotFoundError(
                f"no {prefix}-*.json in {results_folder}: run benchmarks/bench_{prefix}.py"
            )
        tables = [table_of(json.loads(file.read_text())) for file in files]
        return match[1] + "\n".join(table for table in tables if table) + match[4]

    return SECTION.sub(section, text)


def pages() -> list[Path]:
    """README.md, and what has tables in docs/."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [page for page in found if SECTION.search(page.read_text(encoding="utf-8"))]


def main() -> None:
    parser = argparse.ArgumentParser(description="Fill tables of README.md and docs/ from results")
    parser.add_argument("pages", type=Path, nargs="*", help="others than those")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="only compare")
    arguments = parser.parse_args()
    for page in arguments.pages or pages():
        text = page.read_text(encoding="utf-8")
        filled = fill(text, arguments.results)
        if arguments.check and filled != text:
            raise SystemExit(f"{page}: tables differ from the results; run make_tables.py")
        if not arguments.check:
            page.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main()
