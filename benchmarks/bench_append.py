"""Time of writing new keys and values into a paged cache on a GPU.

    python benchmarks/bench_append.py           # a minute; writes results/append-<device>.json
    python benchmarks/bench_append.py --smoke   # seconds, on the CPU; only prints

    append_kv    art_torch.append_kv, keys and values of one layer
    index_copy   Tensor.index_copy_ of keys and of values, where the cache can be seen as rows
    copy         copy_ of as many contiguous bytes: the ceiling
    host_call    what one call of append_kv takes on the host, the GPU's work aside

Medians of CUDA-graph replays over rotating inputs. Bytes are those read and those written.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_gpu import describe
from common import write_results
from gpu_timing import GraphTimer, LoopTimer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import art_torch

RUNS = 5
HOST_CALLS = 2000
ROTATED_BYTES = 1 << 30  # more than any last-level cache
MAX_INPUTS = 32  # layers that take turns
DECODE_TOKENS = 256  # up to here every token is of another sequence
DECODE_PAGES = 256  # in a layer's cache, where only few tokens are written
DECODE_GOAL = ("T64_H8_D128_bf16_nhd_p16", 3.0)
PREFILL_GOAL = ("T32768_H8_D128_bf16_nhd_p16", 0.9)


@dataclass(frozen=True)
class Case:
    """New tokens of one layer, and the layout of the cache that takes them."""

    tokens: int
    num_kv_heads: int
    head_dim: int
    layout: str = "nhd"
    page_size: int = 16

    @property
    def name(self) -> str:
        shape = f"T{self.tokens}_H{self.num_kv_heads}_D{self.head_dim}_bf16"
        return f"{shape}_{self.layout}_p{self.page_size}"

    @property
    def num_bytes(self) -> int:
        """Keys and values, read and written."""
        return 2 * 2 * 2 * self.tokens * self.num_kv_heads * self.head_dim

    @property
    def num_pages(self) -> int:
        return max(DECODE_PAGES, -(-self.tokens // self.page_size))


CASES = (
    *(Case(tokens, 8, 128) for tokens in (1, 16, 64, 256, 2048, 8192, 32768)),
    Case(64, 8, 128, "hnd"),
    Case(64, 32, 128),
    Case(64, 8, 64),
    Case(32768, 8, 128, "hnd"),
    Case(32768, 8, 128, "hnd", 64),
    Case(32768, 8, 128, "tokens_last"),
)
SMOKE_CASES = (Case(4, 2, 64), Case(300, 2, 64, "hnd"), Case(300, 2, 64, "tokens_last"))


@dataclass
class Inputs:
    """One layer."""

    key: Tensor  # [tokens, num_kv_heads, head_dim]
    value: Tensor
    key_cache: Tensor  # [num_pages, page_size, num_kv_heads, head_dim]
    value_cache: Tensor
    slots: Tensor  # [tokens]
    copy_from: Tensor  # as many contiguous bytes as keys and values
    copy_to: Tensor


def empty_cache(case: Case, layout: str, device: torch.device) -> Tensor:
    pages, page, heads, dim = case.num_pages, case.page_size, case.num_kv_heads, case.head_dim
    kind = {"dtype": torch.bfloat16, "device": device}
    if layout == "nhd":
        return torch.zeros(pages, page, heads, dim, **kind)
    if layout == "hnd":
        return torch.zeros(pages, heads, page, dim, **kind).transpose(1, 2)
    return torch.zeros(pages, heads, dim, page, **kind).permute(0, 3, 1, 2)


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    pages = torch.randperm(case.num_pages, generator=generator)
    positions = torch.arange(case.tokens)
    if case.tokens <= DECODE_TOKENS:  # the next token of so many sequences
        offsets = torch.randint(case.page_size, (case.tokens,), generator=generator)
        slots = pages[: case.tokens] * case.page_size + offsets
    else:
        slots = pages[positions // case.page_size] * case.page_size + positions % case.page_size
    shape = (case.tokens, case.num_kv_heads, case.head_dim)
    key, value = torch.randn(2, *shape, device=device, dtype=torch.bfloat16).unbind(0)
    copy_from = torch.randn(2, *shape, device=device, dtype=torch.bfloat16)
    return Inputs(
        key,
        value,
        empty_cache(case, case.layout, device),
        # Only keys may have contiguous tokens.
        empty_cache(case, "nhd" if case.layout == "tokens_last" else case.layout, device),
        slots.to(device),
        copy_from,
        torch.empty_like(copy_from),
    )


def append(inputs: Inputs) -> None:
    art_torch.append_kv(
        inputs.key, inputs.value, inputs.key_cache, inputs.value_cache, inputs.slots
    )


def index_copy(inputs: Inputs) -> None:
    inputs.key_cache.flatten(0, 1).index_copy_(0, inputs.slots, inputs.key)
    inputs.value_cache.flatten(0, 1).index_copy_(0, inputs.slots, inputs.value)


def copy(inputs: Inputs) -> None:
    inputs.copy_to.copy_(inputs.copy_from)


def check(inputs: Inputs) -> None:
    """The tokens have to be where they belong."""
    append(inputs)
    page_size = inputs.key_cache.shape[1]
    pages, offsets = inputs.slots // page_size, inputs.slots % page_size
    for new, cache in ((inputs.key, inputs.key_cache), (inputs.value, inputs.value_cache)):
        if not torch.equal(cache[pages, offsets], new):
            raise RuntimeError("append_kv: the cache does not hold what was appended")


def host_us(inputs: Inputs) -> float:
    """Microseconds until a call returns; few enough calls that the GPU's queue never fills."""
    calls = 0
    spent = 0.0
    while calls < HOST_CALLS:
        if inputs.key.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            append(inputs)
        spent += time.perf_counter() - start
        calls += 100
    return spent * 1e6 / calls


def measure(case: Case, device: torch.device) -> list[dict[str, Any]]:
    """The implementations, in turns."""
    element_bytes = 2 * 2 * case.num_kv_heads * case.head_dim
    held = case.num_bytes + element_bytes * case.num_pages * case.page_size
    count = max(2, min(MAX_INPUTS, ROTATED_BYTES // held)) if device.type == "cuda" else 1
    inputs = [make_inputs(case, device, seed) for seed in range(count)]
    for each in inputs:
        check(each)
    functions: dict[str, Callable[[Inputs], None]] = {"append_kv": append, "copy": copy}
    if case.layout == "nhd":
        functions["index_copy"] = index_copy
    timer = GraphTimer if device.type == "cuda" else LoopTimer

    def calls_of(function: Callable[[Inputs], None]) -> list[Callable[[], None]]:
        return [lambda each=each: function(each) for each in inputs]

    timers = {
        name: timer(calls_of(function), case.num_bytes) for name, function in functions.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(RUNS):
        for name, timed in timers.items():
            samples[name].append(timed.run())
    if case.tokens <= DECODE_TOKENS:
        samples["host_call"] = [host_us(inputs[0]) for _ in range(RUNS)]
    return [
        {
            "case": case.name,
            "impl": name,
            "us": round(median(times), 2),
            "us_min": round(min(times), 2),
            "us_max": round(max(times), 2),
            "bytes": case.num_bytes,
            "note": "",
        }
        for name, times in samples.items()
    ]


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Times, speeds, and whether the goals are met."""
    by_case: dict[str, dict[str, float]] = {}
    for row in rows:
        by_case.setdefault(row["case"], {})[row["impl"]] = row["us"]
    impls = ("append_kv", "index_copy", "copy", "host_call")
    table = Table("case", *(f"{name} us" for name in impls), "GB/s", "of copy")
    for case, us in by_case.items():
        num_bytes = next(row["bytes"] for row in rows if row["case"] == case)
        times = (f"{us[name]:.2f}" if name in us else "-" for name in impls)
        speed = f"{num_bytes / us['append_kv'] / 1e3:.0f}"
        table.add_row(case, *times, speed, f"{us['copy'] / us['append_kv']:.0%}")
    console.print(table)
    case, limit = DECODE_GOAL
    if case in by_case:
        us = by_case[case]["append_kv"]
        console.print(f"{case}: {us:.2f} us, goal < {limit} {'met' if us < limit else 'missed'}")
    case, share = PREFILL_GOAL
    if case in by_case:
        reached = by_case[case]["copy"] / by_case[case]["append_kv"]
        verdict = "met" if reached >= share else "missed"
        console.print(f"{case}: {reached:.0%} of a copy, goal >= {share:.0%} {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description="append_kv on a GPU against a plain copy")
    parser.add_argument("--smoke", action="store_true", help="tiny cases, on the CPU")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--commit", help="of the sources, where they are no git checkout")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    arguments = parser.parse_args()
    if not arguments.smoke and not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU (--smoke tries the benchmark out on the CPU)")
    device = torch.device("cpu" if arguments.smoke else "cuda")
    console = Console(width=120, highlight=False)
    chosen = SMOKE_CASES if arguments.smoke else CASES
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for case in chosen:
            if arguments.cases in case.name:
                rows += measure(case, device)
    if not rows:
        raise SystemExit(f"no case has {arguments.cases!r} in its name")
    show(rows, console)
    if arguments.output or not arguments.smoke:
        results = describe(device, arguments.commit)
        copies = [row["bytes"] / row["us"] / 1e3 for row in rows if row["impl"] == "copy"]
        results.update(ceiling_gbps=round(max(copies), 1), rows=rows)
        console.print(f"written to {write_results('append', results, arguments.output)}")


if __name__ == "__main__":
    main()
