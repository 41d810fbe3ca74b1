"""Fills the tables of README.md from the result files, so that no figure is ever typed.

    python benchmarks/make_tables.py            # rewrites README.md
    python benchmarks/make_tables.py --check    # fails if README.md is not what the results say

A section ``<!-- table:NAME -->`` to ``<!-- /table -->`` receives the table NAME: ``decode``,
``guided``, ``guided_decode``, ``kvpress``, ``memory``, ``presses``, ``steps``, ``walks``, ``gpu``
or ``gpu_steps``, of every device with a file ``results/NAME-<device>.json``. Only those of GPUs may
have none, and an empty section. ``kvpress`` and ``presses`` are in docs/kvpress.md (``--readme``).
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, slug
from gpu_report import COLUMNS, EXPLANATION, cases_of, cells

Results = dict[str, Any]
Row = dict[str, Any]
SECTION = re.compile(r"(<!-- table:(\w+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)
# Cases of bench_decode.py that are in the file only: short ones, float16, and other pages than
# ARTCache's default.
ONLY_IN_FILE = re.compile(r"_S(128|1024)_|_f16_|_p(?!64\b|64_)")
MIB = 1 << 20
# What a reader of the README gets of the points of bench_gpu.py.
GPU_EXCERPT = {
    *("B1_S8192_H32/8_D128_bf16_p16", "B1_S32768_H32/8_D128_bf16_p16"),
    *("B1_S131072_H32/8_D128_bf16_p16", "B4_S32768_H32/8_D128_bf16_p16"),
    *("B8_S8192_H32/8_D128_bf16_p16", "B8_S32768_H32/8_D128_bf16_p16"),
    *("B32_S8192_H32/8_D128_bf16_p16", "B32_S32768_H32/8_D128_bf16_p16"),
    *("B128_S8192_H32/8_D128_bf16_p16", "B128_S32768_H32/8_D128_bf16_p16"),
    *("B32_S32768_H32/8_D128_bf16_p16_ragged", "B8_S8192_H32/32_D128_bf16_p16"),
    *("B32_S8192_H64/8_D128_bf16_p16", "B32_S8192_H32/8_D64_bf16_p16"),
    "B1_S32768_H32/8_D64_bf16_p16",
}


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


def decode_table(results: Results) -> str:
    """Times as fast as others, of whom a file may lack some."""
    others = {"sdpa_packed": "sdpa", "vllm": "vLLM", "ggml_f16": "ggml f16", "ort": "ONNX Runtime"}
    cases = by_case([row for row in results["rows"] if not ONLY_IN_FILE.search(row["case"])])
    others = {
        impl: title
        for impl, title in others.items()
        if any(impl in measured for measured in cases.values())
    }
    header = ["case", "art_dense ms", "art_never", "art_half", *(f"/ {o}" for o in others.values())]
    rows = []
    for case, measured in cases.items():
        us = {impl: row["us_min"] for impl, row in measured.items()}
        dense = us["art_dense"]
        half = f"x {us['art_half'] / dense:.2f}" if "art_half" in us else ""
        cells = [f"`{case}`", f"{dense / 1e3:.2f}", f"{us['art_never'] / dense - 1:+.1%}", half]
        cells += [f"{us[impl] / dense:.2f} x" if impl in us else "" for impl in others]
        rows.append(cells)
    text = "Minima of interleaved runs, caches flushed"
    ceiling = f"a plain read reaches {results['ceiling_gbps']:.1f} GB/s"
    return f"{text}; {ceiling}. {conditions(results)}.\n\n{markdown(header, rows)}"


def kvpress_table(results: Results) -> str:
    columns = {
        "KV MiB": "kv_bytes",
        "process grew by MiB": "resident_bytes",
        "at most, while decoding": "peak_decode_bytes",
    }
    rows = [
        [f"`{row['press']}`", f"`{row['impl']}`"]
        + [f"{row[key] / MIB:,.1f}" for key in columns.values()]
        for row in results["rows"]
    ]
    prompt = re.sub(r".*_S(\d+)_.*", r"\1", results["rows"][0]["case"])
    head = f"{results['model']}; a prompt of {prompt} tokens, presses that keep 20 %"
    table = markdown(["press", "cache", *columns], rows, left=2)
    return f"{head}. {conditions(results)}.\n\n{table}"


def presses_table(results: Results) -> str:
    names = {
        "press": "press alone, `DynamicCache`",
        "exact": "exact, `ARTCache`",
    }
    header = ["press, keeps", "attention", "KV MiB", "read of it", "ms", "KL, press", "KL, full"]
    rows = []
    for row in results["rows"]:
        cells = [f"{row['press']}, {row['keeps']:.0%}"]
        cells += [names.get(row["impl"], f"`{row['impl']}`, rule of `balanced`")]
        cells += [f"{row['kv_bytes'] / MIB:,.0f}", f"{row['read']:.1%}", f"{row['us'] / 1e3:.1f}"]
        rows.append([*cells, divergence(row["kl_press"]), divergence(row["kl_full"])])
    prompt = re.sub(r".*_S(\d+)_.*", r"\1", results["rows"][0]["case"])
    head = f"{results['model']}; a prompt of {prompt} tokens, steps that took turns"
    return f"{head}. {conditions(results)}.\n\n{markdown(header, rows, left=2)}"


def memory_table(results: Results) -> str:
    names = {"dynamic": "`DynamicCache`, sdpa", "art": "`ARTCache`, exact"}
    header = ["case", "cache", "KV MiB", "peak MiB", "peak while decoding MiB", "ms a token"]
    rows = [
        [
            f"`{row['case']}`",
            names[row["impl"]],
            f"{row['kv_bytes'] / MIB:,.0f}",
            f"{row['peak_bytes'] / MIB:,.0f}",
            f"{row['peak_decode_bytes'] / MIB:,.0f}",
            f"{row['us_min'] / 1e3:.1f}",
        ]
        for row in results["rows"]
    ]
    return f"{results['model']}. {conditions(results)}.\n\n{markdown(header, rows, left=2)}"


def steps_table(results: Results) -> str:
    names = {
        "sdpa": "sdpa, `DynamicCache`",
        "sdpa_static": "sdpa, `StaticCache`",
        "exact": "exact, `ARTCache`",
    }
    header = ["case", "attention", "KV read", "ms", "of sdpa's", "attention part", "of sdpa's"]
    rows = []
    for case, impls in by_case(results["rows"]).items():
        for name, row in impls.items():
            cells = [f"`{case}`", names.get(name, f"`{name}`, rule of `balanced`")]
            cells.append(f"{row['read']:.1%}")
            for key in ("us", "attention_us"):
                cells.append(f"{row[key] / 1e3:.1f}")
                cells.append(f"x {row[key] / impls['sdpa'][key]:.2f}")
            rows.append(cells)
    head = f"{results['model']}; medians of steps that took turns, in ms"
    return f"{head}. {conditions(results)}.\n\n{markdown(header, rows, left=2)}"


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


def divergence(value: float) -> str:
    """A KL divergence; rounding of float32 logits alone gives 1e-12 to 1e-10."""
    return "0" if value < 1e-9 else f"{value:.2g}"


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


def guided_decode_table(results: Results) -> str:
    """Times as fast as reading everything, of guided steps and of PyTorch."""
    names = ("art_guided_5", "art_guided_10", "art_guided_15", "art_guided_25", "sdpa_packed")
    header = ["case", "art_dense ms", "guided_walk ms", *(name[4:] for name in names[:-1]), "sdpa"]
    rows = []
    for case, impls in by_case(results["rows"]).items():
        us = {name: row["us_min"] for name, row in impls.items()}
        dense = us["art_dense"]
        times = [f"{us[name] / 1e3:.2f}" for name in ("art_dense", "art_guided_walk")]
        rows.append([f"`{case}`", *times, *(f"{dense / us[name]:.2f} x" for name in names)])
    head = "Minima of interleaved runs, caches flushed; speed-ups over art_dense"
    return f"{head}. {conditions(results)}.\n\n{markdown(header, rows)}"


def gpu_table(results: Results, names: Collection[str] | None = None) -> str:
    """Of the cases with these names, or of all."""
    cases = cases_of(results["rows"])
    points = [
        [f"`{name}`", *texts]
        for name, *texts in map(cells, cases.values())
        if names is None or name in names
    ]
    ceiling = results["ceiling_gbps"]
    head = f"A plain read reaches {ceiling:,.0f} GB/s. " if ceiling else ""
    return f"{head}{conditions(results)}.\n\n{EXPLANATION}\n\n{markdown(list(COLUMNS), points)}"


def gpu_excerpt(results: Results) -> str:
    name = f"benchmarks/results/gpu-{slug(results['device'])}.md"
    return f"{gpu_table(results, GPU_EXCERPT)}\nAll points: [{name}]({name}).\n"


TABLES: dict[str, Callable[[Results], str]] = {
    "decode": decode_table,
    "guided": guided_table,
    "guided_decode": guided_decode_table,
    "kvpress": kvpress_table,
    "memory": memory_table,
    "presses": presses_table,
    "steps": steps_table,
    "walks": walks_table,
    "gpu": gpu_excerpt,
    "gpu_steps": gpu_steps_table,
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
        files = sorted(results_folder.glob(f"{name}-*.json"))
        if not files and name not in OPTIONAL:
            raise FileNotFoundError(
                f"no {name}-*.json in {results_folder}: run benchmarks/bench_{name}.py"
            )
        tables = [TABLES[name](json.loads(file.read_text())) for file in files]
        return match[1] + "\n".join(table for table in tables if table) + match[4]

    return SECTION.sub(section, text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fill the tables of the README from the results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="only compare")
    arguments = parser.parse_args()
    text = arguments.readme.read_text(encoding="utf-8")
    filled = fill(text, arguments.results)
    if arguments.check and filled != text:
        raise SystemExit(f"{arguments.readme}: tables differ from the results; run make_tables.py")
    if not arguments.check:
        arguments.readme.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main()
