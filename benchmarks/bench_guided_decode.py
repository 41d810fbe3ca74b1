"""Time of guided decode attention on the CPU, against reading everything.

    python benchmarks/bench_guided_decode.py            # minutes; writes results/
    python benchmarks/bench_guided_decode.py --quick    # seconds; only prints

Implementations, which take turns with the last-level cache flushed before each call:

    art_dense        art_torch.decode_attention without a criterion
    art_guided_walk  the walk alone: scores from key codes, and their order
    art_guided_5     scores, order, and attention that stops after about so many percent of the
    art_guided_10    tokens (at a patience that random tokens complete there, criterion included)
    art_guided_15
    art_guided_25
    sdpa_packed      as in bench_decode.py: PyTorch's fastest form, on a contiguous cache

Shapes are those of bench_decode.py, in pages of 64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_decode import QUICK_SHAPES, SHAPES, rounds_of
from common import (
    FLUSH_BYTES,
    Bystanders,
    describe_machine,
    huge_pages,
    progress_bar,
    take_turns,
    write_results,
)
from decode_implementations import PAGE_SIZE
from decode_inputs import Case, Inputs, make_inputs
from gpu_points import EVERY_CHANGE, stop_after
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import art_torch
from art_torch.guided import GROUP_TOKENS

PERCENT = (5, 10, 15, 25)


def make_calls(case: Case, inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """The implementations, each checked to read what its name says."""
    storage = inputs.storage
    groups = torch.arange(case.batch * (case.tokens // GROUP_TOKENS), dtype=torch.int32)
    code_table = groups.view(case.batch, -1)
    record = art_torch.key_code_bytes(case.head_dim)
    codes = huge_pages(groups.numel(), case.num_kv_heads, record, dtype=torch.uint8)
    cache = (inputs.block_table, inputs.seq_lens)
    art_torch.encode_keys(storage.key_cache, *cache, codes, code_table)
    packed = inputs.query.view(case.batch, case.num_kv_heads, -1, case.head_dim)
    attention = partial(
        art_torch.decode_attention, inputs.query, storage.key_cache, storage.value_cache, *cache
    )
    calls: dict[str, Callable[[], Any]] = {
        "art_dense": attention,
        "art_guided_walk": lambda: art_torch.guided_walk(
            inputs.query, storage.key_cache, *cache, codes, code_table
        ),
    }
    for percent in PERCENT:
        patience, tokens = stop_after(case.tokens, percent / 100)
        name = f"art_guided_{percent}"
        calls[name] = partial(
            attention,
            walk="guided",
            key_codes=codes,
            code_table=code_table,
            criterion=art_torch.Stability(EVERY_CHANGE, EVERY_CHANGE, patience),
        )
        read = calls[name]().tokens_read
        if not (read == tokens).all():
            raise RuntimeError(f"{case.name}: expected {tokens} tokens read, got {read.tolist()}")
    calls["sdpa_packed"] = lambda: F.scaled_dot_product_attention(
        packed, inputs.keys, inputs.values
    )
    return calls


def show(rows: list[dict[str, Any]], console: Console) -> None:
    by_case: dict[str, dict[str, float]] = {}
    for row in rows:
        by_case.setdefault(row["case"], {})[row["impl"]] = row["us_min"]
    table = Table(title="Minima: ms, and times as fast as art_dense", box=SIMPLE)
    table.add_column("case")
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    for impl in impls:
        table.add_column(impl.removeprefix("art_"), justify="right")
    for case, us in by_case.items():
        dense = us["art_dense"]
        table.add_row(case, *(f"{us[impl] / 1e3:.2f} {dense / us[impl]:5.2f}x" for impl in impls))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Guided decode attention on the CPU")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, writes no result file")
    parser.add_argument("--rounds", type=int, help="calls per implementation; default: 15 or more")
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 and 2")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    arguments = parser.parse_args()
    shapes = QUICK_SHAPES if arguments.quick else SHAPES
    threads = arguments.threads or ([1] if arguments.quick else [1, 2])
    cases = [
        Case(*shape, dtype, PAGE_SIZE, count)
        for shape in shapes
        for dtype in ("f32", "bf16")
        for count in threads
    ]
    rounds = {
        case: arguments.rounds or (3 if arguments.quick else rounds_of(case, 15)) for case in cases
    }
    results, rows = describe_machine(), []
    flush = huge_pages(FLUSH_BYTES // 8, dtype=torch.int64).fill_(1)
    with torch.inference_mode(), progress_bar("guided", sum(rounds.values())) as advance:
        for case in cases:
            torch.set_num_threads(case.threads)
            calls, bystanders = make_calls(case, make_inputs(case)), Bystanders()
            timings = take_turns(calls, rounds[case], flush, partial(advance, case.name, 1))
            others = round(bystanders.cores(), 3)
            for impl in timings.samples:
                row = {"case": case.name, "impl": impl, **timings.row(impl)}
                rows.append({**row, "others_cores": others})
    results.update(threads=threads, rows=rows)
    console = Console(width=None if Console().is_terminal else 160)
    show(rows, console)
    if arguments.output or not arguments.quick:
        console.print(f"written to {write_results('guided_decode', results, arguments.output)}")


if __name__ == "__main__":
    main()
