"""Time of a decode step with an 8k context: exact by PyTorch, exact by ART, and ART that stops.

    python benchmarks/bench_steps.py            # minutes; writes results/steps-<device>.json
    python benchmarks/bench_steps.py --quick    # a short prompt; only prints

SmolLM2-135M-Instruct. The beginning of data/jargon_file.txt is prefilled once per case, and copied
for every implementation. Then they take turns with the same tokens, so that a change of the
machine's speed hits all of them. `sdpa` is the unpatched model with a DynamicCache, `sdpa_static`
with a StaticCache. The others are patched, with an ARTCache: `exact` reads all of it; `sink_recent`
and `guided` read in these orders until the rule of the preset "balanced" stops. The attention part
of a step is what its attention modules do besides their projections: rotating queries and keys,
writing into the cache and attention itself.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
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
from transformers import DynamicCache, StaticCache

import art_torch
from art_torch import PRESETS, ARTCache
from art_torch.integrations.transformers import cache_argument

sys.path.append(str(ROOT / "examples"))
from decoding import share_weights

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
TEXT = Path(__file__).resolve().parent / "data" / "jargon_file.txt"
RULES = {
    "exact": (None, "sink_recent"),
    "sink_recent": (PRESETS["balanced"], "sink_recent"),
    "guided": (PRESETS["balanced"], "guided"),
}


class AttentionPart:
    """Seconds that a model's attention modules take, those of their projections left out."""

    def __init__(self, model: Any) -> None:
        self.seconds = 0.0
        for name, module in model.named_modules():
            if name.endswith("self_attn"):
                self._time(module, 1.0)
                for projection in module.children():
                    self._time(projection, -1.0)

    def _time(self, module: Any, sign: float) -> None:
        def started(*_: Any) -> None:
            self.seconds -= sign * time.perf_counter()

        def ended(*_: Any) -> None:
            self.seconds += sign * time.perf_counter()

        module.register_forward_pre_hook(started)
        module.register_forward_hook(ended)


def measure(
    model: Any, prompt: Tensor, following: Tensor, advance: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Rows without a case; ``prompt`` and ``following`` are int64 ``[1, n]``."""
    models = {name: share_weights(model) for name in ("sdpa", "sdpa_static", *RULES)}
    handles = {name: art_torch.patch(models[name], *RULES[name]) for name in RULES}
    art = ARTCache(model.config)
    argument = cache_argument(model)
    models["exact"](prompt, logits_to_keep=1, **{argument: art})
    length = prompt.shape[1] + following.shape[1]
    caches: dict[str, Any] = {
        "sdpa": DynamicCache(config=model.config),
        "sdpa_static": StaticCache(model.config, max_cache_len=length),
    }
    for index, layer in enumerate(art.layers):
        for cache in caches.values():
            cache.update(*(tensor.clone() for tensor in layer.history()), index)
    caches |= {name: copy.deepcopy(art) for name in RULES}
    parts = {name: AttentionPart(models[name]) for name in caches}
    advance("prefill")
    names: list[str] = list(caches)
    times: dict[str, list[float]] = {name: [] for name in names}
    attention: dict[str, list[float]] = {name: [] for name in names}
    for step in range(following.shape[1]):
        token = following[:, step : step + 1]
        for name in turned(names, step):
            parts[name].seconds, start = 0.0, time.perf_counter()
            models[name](token, logits_to_keep=1, **{argument: caches[name]})
            times[name].append(1e6 * (time.perf_counter() - start))
            attention[name].append(1e6 * parts[name].seconds)
        advance("steps")
    rows = []
    # The first step builds what it needs, codes for example.
    timings = Timings({name: samples[1:] for name, samples in times.items()})
    for name in names:
        read = handles[name].stats.read_fraction() if name in handles else 1.0
        row = {**timings.row(name), "attention_us": round(median(attention[name][1:]), 1)}
        rows.append({"impl": name, **row, "read": round(read, 4)})
    for handle in handles.values():
        handle.unpatch()
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="A decode step", box=SIMPLE)
    for title in ("case", "implementation"):
        table.add_column(title)
    for title in ("KV read", "ms, median", "minimum", "attention"):
        table.add_column(title, justify="right")
    for row in rows:
        times = (f"{row[key] / 1e3:.1f}" for key in ("us", "us_min", "attention_us"))
        table.add_row(row["case"], row["impl"], f"{row['read']:.1%}", *times)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of a decode step with a long context")
    parser.add_argument("--quick", action="store_true", help="short; writes no result file")
    parser.add_argument("--prompt-tokens", type=int, default=8160)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    arguments = parser.parse_args()
    prompt, steps = arguments.prompt_tokens, arguments.steps
    if arguments.quick:
        prompt, steps = 512, 3
    logging.getLogger("art_torch").setLevel(logging.ERROR)  # what a walk loses is not measured here
    console = Console()
    results, rows = describe_machine("transformers"), []
    model, tokenizer = load_smollm2()
    tokens = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    tokens = tokens[:, : prompt + steps]
    settings = [(dtype, threads) for dtype in arguments.dtypes for threads in arguments.threads]
    total = len(settings) * (1 + steps)
    with torch.inference_mode(), progress_bar("bench_steps", total) as advance:
        for dtype, threads in settings:
            case = f"B1_S{tokens.shape[1]}_{dtype}_t{threads}"
            torch.set_num_threads(threads)
            model = model.to(DTYPES[dtype])
            measured = measure(model, tokens[:, :prompt], tokens[:, prompt:], advance)
            rows += [{"case": case, **row} for row in measured]
    results.update(model="SmolLM2-135M-Instruct", rows=rows)
    show(rows, console)
    if arguments.output or not arguments.quick:
        console.print(f"written to {write_results('steps', results, arguments.output)}")


if __name__ == "__main__":
    main()
