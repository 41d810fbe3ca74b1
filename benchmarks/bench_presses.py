"""ART on a cache that kvpress has compressed: full, StreamingLLM, SnapKV, PyramidKV at 80 and 20 %.

    python benchmarks/bench_presses.py            # minutes; writes results/presses-<device>.json
    python benchmarks/bench_presses.py --quick    # a short prompt; only prints

These are the combinations of the paper's experiments (arXiv 2606.00024), on SmolLM2-135M-Instruct
in float32. The beginning of data/jargon_file.txt is prefilled under the press; then the text's own
next tokens are decoded by all implementations in turns. `press` is the press alone, with
transformers' DynamicCache and sdpa; `exact` a patched model with an ARTCache and no criterion;
`sink_recent` and `guided` read in these orders until the rule of the preset "balanced" stops.

    read        share of what the press has left that decode steps read
    KL, press   mean of KL(press || implementation) over the predictions of these tokens
    KL, full    the same from exact attention to the whole prompt: what press and ART lose together
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from bench_memory import MIB, kv_bytes_of
from bench_steps import RULES, TEXT
from common import (
    ROOT,
    Timings,
    describe_machine,
    load_smollm2,
    progress_bar,
    turned,
    write_results,
)
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache

import art_torch
from art_torch import ARTCache
from art_torch.integrations.kvpress import compatible
from art_torch.integrations.transformers import cache_argument

sys.path.append(str(ROOT / "examples"))
from decoding import kl_divergence, share_weights

PRESSES = ("StreamingLLM", "SnapKV", "PyramidKV")
CASES = [("none", 1.0), *((name, keeps) for name in PRESSES for keeps in (0.8, 0.2))]


def press_on(model: Any, name: str, keeps: float) -> Any:
    """The context in which a prompt is compressed."""
    import kvpress

    if name == "none":
        return nullcontext()
    return getattr(kvpress, f"{name}Press")(compression_ratio=1 - keeps)(model)


def prefilled(models: dict[str, Any], name: str, keeps: float, prompt: Tensor) -> dict[str, Any]:
    """The cache of each implementation after a prompt, int64 ``[1, n]``."""
    argument = cache_argument(models["press"])
    plain, art = DynamicCache(config=models["press"].config), ARTCache(models["exact"].config)
    with compatible(models["press"]), press_on(models["press"], name, keeps):
        models["press"](prompt, logits_to_keep=1, **{argument: plain})
    with press_on(models["exact"], name, keeps):
        models["exact"](prompt, logits_to_keep=1, **{argument: art})
    return {"press": plain, **{impl: copy.deepcopy(art) for impl in RULES}}


def measure(
    models: dict[str, Any],
    caches: dict[str, Any],
    following: Tensor,
    start: int,
    advance: Callable[[str], None],
) -> tuple[dict[str, list[float]], dict[str, list[Tensor]]]:
    """Microseconds and logits of each step over ``following``, int64 ``[1, n]``."""
    names, argument = list(caches), cache_argument(models["press"])
    times: dict[str, list[float]] = {name: [] for name in names}
    logits: dict[str, list[Tensor]] = {name: [] for name in names}
    for step in range(following.shape[1]):
        token, place = following[:, step : step + 1], torch.tensor([[start + step]])
        for name in turned(names, step):
            begin = time.perf_counter()
            output = models[name](token, position_ids=place, **{argument: caches[name]})
            times[name].append(1e6 * (time.perf_counter() - begin))
            logits[name].append(output.logits[0, -1].float())
        advance("steps")
    return times, logits


def rows_of(
    model: Any,
    name: str,
    keeps: float,
    prompt: Tensor,
    following: Tensor,
    full: list[Tensor],
    advance: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Rows of one press. ``full`` is empty at first, and then logits with the whole prompt."""
    models = {impl: share_weights(model) for impl in ("press", *RULES)}
    handles = {impl: art_torch.patch(models[impl], *RULES[impl]) for impl in RULES}
    caches = prefilled(models, name, keeps, prompt)
    advance(f"{name}, {keeps:.0%}")
    times, logits = measure(models, caches, following, prompt.shape[1], advance)
    full += [] if full else logits["press"]
    rows = []
    # The first step builds what it needs, codes for example.
    timings = Timings({impl: samples[1:] for impl, samples in times.items()})
    for impl, cache in caches.items():
        read = handles[impl].stats.read_fraction() if impl in handles else 1.0
        rows.append(
            {
                "press": name,
                "keeps": keeps,
                "impl": impl,
                "kv_bytes": kv_bytes_of(cache) if impl == "press" else cache.bytes_in_use,
                "read": round(read, 4),
                **timings.row(impl),
                "kl_press": divergence(logits["press"], logits[impl]),
                "kl_full": divergence(full, logits[impl]),
            }
        )
    for handle in handles.values():
        handle.unpatch()
    return rows


def divergence(wanted: list[Tensor], got: list[Tensor]) -> float:
    return float(f"{kl_divergence(wanted, got).mean().item():.4g}")


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title=rows[0]["case"], box=SIMPLE)
    for title in ("press", "attention"):
        table.add_column(title)
    for title in ("KV, MiB", "read", "ms a token", "KL, press", "KL, full"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            f"{row['press']}, {row['keeps']:.0%}",
            row["impl"],
            f"{row['kv_bytes'] / MIB:,.1f}",
            f"{row['read']:.1%}",
            f"{row['us'] / 1e3:.1f}",
            *(f"{row[key]:.2g}" for key in ("kl_press", "kl_full")),
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="ART on compressed KV caches")
    parser.add_argument("--quick", action="store_true", help="short; writes no result file")
    parser.add_argument("--prompt-tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    arguments = parser.parse_args()
    prompt, steps = arguments.prompt_tokens, arguments.steps
    if arguments.quick:
        prompt, steps = 384, 2
    logging.getLogger("art_torch").setLevel(logging.ERROR)  # what a walk loses is measured here
    results, rows = describe_machine("transformers", "kvpress"), []
    model, tokenizer = load_smollm2()
    tokens = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    tokens = tokens[:, : prompt + steps]
    case = f"B1_S{prompt}_f32_t{results['threads']}"
    full: list[Tensor] = []
    total = len(CASES) * (1 + steps)
    with torch.inference_mode(), progress_bar("bench_presses", total) as advance:
        for name, keeps in CASES:
            inputs = (tokens[:, :prompt], tokens[:, prompt:])
            measured = rows_of(model, name, keeps, *inputs, full, advance)
            rows += [{"case": case, **row} for row in measured]
    results.update(model="SmolLM2-135M-Instruct, float32", rows=rows)
    console = Console(width=None if Console().is_terminal else 120)
    show(rows, console)
    if arguments.output or not arguments.quick:
        console.print(f"written to {write_results('presses', results, arguments.output)}")


if __name__ == "__main__":
    main()
