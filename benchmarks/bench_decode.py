"""Time of one decode step's attention on the CPU, against PyTorch's and others' on the same tokens.

    python benchmarks/bench_decode.py            # half an hour; writes results/decode-<device>.json
    python benchmarks/bench_decode.py --avx2     # the same held to AVX2; writes decode_avx2-...
    python benchmarks/bench_decode.py --quick    # seconds; only prints, and so does --warm

Implementations, which take turns with the last-level cache flushed before each call:

    art_dense    torch.ops.art.decode_attention without a criterion: exact
    art_never    the same with Stability on, and a patience that is never completed
    art_half     Stability with a patience that random tokens complete after half of them
    art_tenth    the same after a tenth
    art_tokens_last  art_dense over keys [pages, Hkv, D, page], as vLLM's CPU cache has them
    art_int8     art_dense over a cache of int8, beside float32; art_int8_never, art_int8_half
    sdpa_packed  scaled_dot_product_attention on a static contiguous cache, the query heads of a
                 group packed as queries of one head, [B, Hkv, G, D]: its fastest form on a CPU
    read         a plain read of the same bytes

and where they are installed (`make cpu-peers`; what is missing is said first):

    vllm         vLLM's operator for CPUs, on pages of the same size and order
    ggml_f16     llama.cpp's flash attention over a float16 cache, beside our float16 and bfloat16
    ggml_bf16    the same over bfloat16
    ort          ONNX Runtime's GroupQueryAttention, caches in place; float32 and float16
    ort_int8     the same with queries in float32 and a cache of int8, beside our float32

All use the same tokens, in memory with huge pages. art_torch reads them from shuffled pages. Every
output is compared with float64 before it is timed. With more than one thread ONNX Runtime's own
have to be woken by each call, which only short ones feel; all others share PyTorch's.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    FLUSH_BYTES,
    Bystanders,
    Timings,
    describe_machine,
    huge_pages,
    progress_bar,
    take_turns,
    write_results,
)
from cpu_peers import Peer, find_peers, versions_of
from decode_implementations import (
    PAGE_SIZE,
    Implementation,
    art,
    art_int8,
    art_tokens_last,
    check,
    plain_read,
    sdpa_packed,
)
from decode_inputs import DTYPES, Case, make_inputs
from decode_report import QUIET_CORES, show
from rich.console import Console
from torch.utils.benchmark import Timer

import art_torch

SHAPES = (
    (1, 8192, 9, 3, 64),
    (1, 32768, 32, 8, 128),
    (8, 4096, 32, 8, 128),
    (1, 8192, 32, 32, 128),
)
RAGGED_SHAPES = ((8, 8192, 9, 3, 64), (8, 8192, 32, 8, 128))
SHORT_SHAPES = tuple(
    (1, tokens, *heads) for heads in ((9, 3, 64), (32, 8, 128)) for tokens in (128, 1024)
)
QUICK_SHAPES = ((1, 2048, 9, 3, 64), (2, 1024, 8, 2, 128))
QUICK_RAGGED_SHAPES = ((3, 256, 8, 2, 64),)
CALL_SHAPE = (1, 16, 9, 3, 64)  # so short that the time is that of a call
LONGER_PAGES = (256, 1024)  # tell what contiguous runs gain; others' caches do not depend on them


def make_cases(quick: bool, threads: list[int]) -> list[Case]:
    if quick:
        kinds = [(shape, PAGE_SIZE, False) for shape in QUICK_SHAPES]
        kinds += [(shape, PAGE_SIZE, True) for shape in QUICK_RAGGED_SHAPES]
    else:
        kinds = [(shape, PAGE_SIZE, False) for shape in (*SHAPES, *SHORT_SHAPES)]
        kinds += [(shape, PAGE_SIZE, True) for shape in RAGGED_SHAPES]
        kinds += [(shape, page, False) for page in LONGER_PAGES for shape in SHAPES]
    return [
        Case(*shape, dtype, page, count, ragged)
        for shape, page, ragged in kinds
        for dtype in DTYPES
        for count in threads
        if page == PAGE_SIZE or dtype != "f16"
    ]


def make_implementations(case: Case, peers: dict[str, Peer]) -> dict[str, Implementation]:
    """Those that a case has, each checked to be right."""
    inputs = make_inputs(case)
    implementations = {**art(case, inputs), **art_int8(case, inputs)}
    implementations.update(art_tokens_last(case, inputs))
    implementations["sdpa_packed"] = sdpa_packed(case, inputs)
    if case.page_size == PAGE_SIZE:
        for peer in peers.values():
            implementations.update(peer(case, inputs))
    check(case, inputs, implementations)
    return {**implementations, "read": plain_read(inputs)}


def rounds_of(case: Case, least: int) -> int:
    """More rounds where a call is short, for its time is noisier."""
    return max(least, min(4 * least, 2**31 // case.kv_bytes))


def measure(
    case: Case,
    implementations: dict[str, Implementation],
    rounds: int,
    attempts: int,
    flush: torch.Tensor,
    advance: Callable[..., None],
) -> tuple[Timings, float]:
    """Times a case, again while other processes disturb it, and keeps the quietest attempt.

    Returns:
        The times, and how many cores others kept busy meanwhile.
    """
    calls = {name: each.call for name, each in implementations.items()}
    own_threads = {name for name, each in implementations.items() if each.own_threads}
    quietest: tuple[Timings, float] | None = None
    for attempt in range(attempts):
        label = case.name + (f", attempt {attempt + 1}" if attempt else "")
        # The bar counts rounds of first attempts.
        step = 0 if attempt else 1
        bystanders = Bystanders()
        timings = take_turns(calls, rounds, flush, partial(advance, label, step), own_threads)
        disturbance = bystanders.cores()
        if quietest is None or disturbance < quietest[1]:
            quietest = timings, disturbance
        if disturbance < QUIET_CORES:
            break
        time.sleep(min(60, 5 * attempt))
    assert quietest is not None
    return quietest


def time_of_call() -> dict[str, float]:
    """Microseconds of a call that has next to nothing to read, caches warm: the least of many."""
    inputs = make_inputs(Case(*CALL_SHAPE, "f32", PAGE_SIZE, 1))
    storage = inputs.storage
    cache = (storage.key_cache, storage.value_cache, inputs.block_table, inputs.seq_lens)
    calls = {
        "torch.ops.art": lambda: torch.ops.art.decode_attention(inputs.query, *cache),
        "art_torch": lambda: art_torch.decode_attention(inputs.query, *cache),
    }
    torch.set_num_threads(1)
    times = {}
    for name, call in calls.items():
        call()
        measured = Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=0.3)
        times[name] = round(1e6 * min(measured.times), 2)
    return times


def rows_of(
    case: Case, implementations: dict[str, Implementation], timings: Timings, disturbance: float
) -> list[dict[str, Any]]:
    return [
        {
            "case": case.name,
            "impl": name,
            **timings.row(name),
            "bytes": each.num_bytes,
            "note": each.note,
            "others_cores": round(disturbance, 3),
        }
        for name, each in implementations.items()
    ]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Decode attention on the CPU against others")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, writes no result file")
    parser.add_argument("--avx2", action="store_true", help="art_torch and PyTorch held to AVX2")
    parser.add_argument("--rounds", type=int, help="calls per implementation; default: 25 or more")
    parser.add_argument("--attempts", type=int, help="at a case that others disturb; default 3")
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 and 2")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--no-peers", action="store_true", help="only art_torch and PyTorch")
    parser.add_argument("--warm", action="store_true", help="leaves the caches as they are")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    return parser.parse_args()


def hold_to_avx2() -> None:
    """Starts again where the environment, which is read once, does not say so already."""
    wanted = {"ART_CPU": "avx2", "ATEN_CPU_CAPABILITY": "avx2"}
    if not wanted.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})


def main() -> None:
    arguments = parse_arguments()
    if arguments.avx2:
        hold_to_avx2()
    console = Console(width=None if Console().is_terminal else 240)
    threads = arguments.threads or ([1] if arguments.quick else [1, 2])
    cases = [case for case in make_cases(arguments.quick, threads) if arguments.cases in case.name]
    if not cases:
        raise SystemExit(f"no case has {arguments.cases!r} in its name")
    peers, reasons = ({}, {}) if arguments.no_peers else find_peers(arguments.avx2)
    for name, reason in reasons.items():
        console.print(f"{name} is left out: {reason}", highlight=False)
    rounds = {
        case: arguments.rounds or (3 if arguments.quick else rounds_of(case, 25)) for case in cases
    }
    attempts = arguments.attempts or (1 if arguments.quick else 3)
    results = describe_machine()
    results["versions"].update(versions_of(peers))
    flush = huge_pages(1 if arguments.warm else FLUSH_BYTES // 8, dtype=torch.int64).fill_(1)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode(), progress_bar("bench_decode", sum(rounds.values())) as advance:
        for case in cases:
            torch.set_num_threads(case.threads)
            implementations = make_implementations(case, peers)
            measured = measure(case, implementations, rounds[case], attempts, flush, advance)
            rows += rows_of(case, implementations, *measured)
    reads = [row["bytes"] / row["us_min"] / 1e3 for row in rows if row["impl"] == "read"]
    results.update(threads=threads, ceiling_gbps=round(max(reads), 1), rows=rows)
    with torch.inference_mode():
        results["call_us"] = time_of_call()
    show(rows, cases, results["simd"], console)
    calls = ", ".join(f"{name} {us:.1f} us" for name, us in results["call_us"].items())
    console.print(f"a call of {CALL_SHAPE[1]} tokens: {calls}", highlight=False)
    if arguments.output or not (arguments.quick or arguments.warm):
        name = "decode_avx2" if arguments.avx2 else "decode"
        console.print(f"written to {write_results(name, results, arguments.output)}")


if __name__ == "__main__":
    main()
