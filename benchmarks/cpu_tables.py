"""Tables of what was measured on a CPU: the operator, whole steps and memory."""

from __future__ import annotations

import re

from decode_report import part_of_read
from table_parts import Results, Row, by_case, conditions, divergence, markdown

# Of the cases of bench_decode.py and bench_guided_decode.py, what a reader of the README gets.
CPU_EXCERPT = re.compile(r"B1_S(8192_H9/3_D64|32768_H32/8_D128|8192_H32/32_D128)_(f32|bf16)_p64_t2")
IN_PAGES_OF_64 = re.compile(r".*_p64(_.*)?")
MIB = 1 << 20

OTHERS = {
    "sdpa_packed": "sdpa",
    "vllm": "vLLM",
    "ggml_f16": "ggml f16",
    "ggml_bf16": "ggml bf16",
    "ort": "ONNX Runtime",
}


def decode_head(results: Results) -> str:
    ceiling = f"a plain read reaches {results['ceiling_gbps']:.1f} GB/s"
    return f"Minima of interleaved runs, caches flushed; {ceiling}. {conditions(results)}."


def speed_over(measured: dict[str, Row], impl: str, ours: str = "art_dense") -> str:
    """How many times as fast as another; nothing where it was not measured."""
    if impl not in measured or ours not in measured:
        return ""
    return f"{measured[impl]['us_min'] / measured[ours]['us_min']:.2f} x"


def decode_table(results: Results, wanted: re.Pattern[str] = IN_PAGES_OF_64) -> str:
    """Times as fast as others, of whom a file may lack some."""
    cases = by_case([row for row in results["rows"] if wanted.fullmatch(row["case"])])
    others = {
        impl: title
        for impl, title in OTHERS.items()
        if any(impl in measured for measured in cases.values())
    }
    header = ["case", "art_dense ms", "art_never", "art_half", *(f"/ {o}" for o in others.values())]
    rows = []
    for case, measured in cases.items():
        us = {impl: row["us_min"] for impl, row in measured.items()}
        dense = us["art_dense"]
        half = f"x {us['art_half'] / dense:.2f}" if "art_half" in us else ""
        cells = [f"`{case}`", f"{dense / 1e3:.2f}", f"{us['art_never'] / dense - 1:+.1%}", half]
        rows.append([*cells, *(speed_over(measured, impl) for impl in others)])
    return f"{decode_head(results)}\n\n{markdown(header, rows)}"


def decode_excerpt(results: Results) -> str:
    return decode_table(results, CPU_EXCERPT)


def decode_limits_table(results: Results) -> str:
    """What does not reach what it could: memory, int8 and other layouts, small parts."""
    header = ["case", "of a plain read", "tokens of keys contiguous", "a tenth / a tenth of dense"]
    header += ["int8", "int8 / ONNX Runtime int8"]
    rows = []
    for case, measured in by_case(results["rows"]).items():
        if "_f16_" in case or "_ragged" in case or "art_half" not in measured:
            continue
        dense, tenth = measured["art_dense"], measured["art_tenth"]
        part = dense["us_min"] * tenth["bytes"] / dense["bytes"]
        contiguous = measured.get("art_tokens_last", {}).get("us_min")
        cells = [f"`{case}`", f"{part_of_read(measured):.2f}"]
        cells.append(f"x {contiguous / dense['us_min']:.2f}" if contiguous else "")
        cells.append(f"{tenth['us_min'] / part:.2f}")
        cells.append(speed_over(measured, "art_dense", "art_int8"))
        rows.append([*cells, speed_over(measured, "ort_int8", "art_int8")])
    calls = ""
    if times := results.get("call_us"):
        each = ", ".join(f"{us:.1f} us by `{name}`" for name, us in times.items())
        calls = f" A call that reads next to nothing: {each}."
    return f"{decode_head(results)}{calls}\n\n{markdown(header, rows)}"


def guided_decode_table(results: Results, wanted: re.Pattern[str] = IN_PAGES_OF_64) -> str:
    """Times as fast as reading everything, of guided steps and of PyTorch."""
    names = ("art_guided_5", "art_guided_10", "art_guided_15", "art_guided_25", "sdpa_packed")
    header = ["case", "art_dense ms", "guided_walk ms", *(name[4:] for name in names[:-1]), "sdpa"]
    rows = []
    for case, impls in by_case(results["rows"]).items():
        if not wanted.fullmatch(case):
            continue
        us = {name: row["us_min"] for name, row in impls.items()}
        dense = us["art_dense"]
        times = [f"{us[name] / 1e3:.2f}" for name in ("art_dense", "art_guided_walk")]
        rows.append([f"`{case}`", *times, *(f"{dense / us[name]:.2f} x" for name in names)])
    head = "Minima of interleaved runs, caches flushed; speed-ups over art_dense"
    return f"{head}. {conditions(results)}.\n\n{markdown(header, rows)}"


def guided_decode_excerpt(results: Results) -> str:
    return guided_decode_table(results, CPU_EXCERPT)


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
