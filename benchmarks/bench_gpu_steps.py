"""Time of a decode step of a whole model on a GPU, with contexts of 8k tokens.

    python benchmarks/bench_gpu_steps.py            # a minute
    python benchmarks/bench_gpu_steps.py --smoke    # tiny, also on a CPU; only prints

Writes ``results/gpu_steps-<device>.json``.

SmolLM2-135M-Instruct in bfloat16. Every sequence of the batch is another part of
data/jargon_file.txt; after the prompt the text's own tokens follow, so that all decode the same.

    sdpa_dynamic    the unpatched model with a DynamicCache, as generate() uses it
    sdpa_static     the same with a StaticCache, whose step is recorded as a CUDA graph
    exact           patched with criterion None and an ARTCache, step by step
    exact_graphed   the same by art_torch.GraphedDecoder
    quality, balanced, fast    guided walks by GraphedDecoder, with the rule of that preset
"""

from __future__ import annotations

import argparse
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
    describe_machine,
    load_smollm2,
    progress_bar,
    recorded,
    slug,
    write_results,
)
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, StaticCache

import art_torch
from art_torch import PRESETS, ARTCache, GraphedDecoder
from art_torch.integrations.transformers import cache_argument

TEXT = Path(__file__).resolve().parent / "data" / "jargon_file.txt"
WARM_UP, RUNS = 6, 5
Step = Callable[[Tensor], Any]


class Lane:
    """One implementation: a model that has read the prompts, and its next step.

    Attributes:
        step: Takes the next tokens, int64 ``[batch]``.
        handle: Of the patch, None for an unpatched model.
    """

    def __init__(self, name: str, model: Any, prompts: Tensor, max_length: int) -> None:
        sys.path.append(str(ROOT / "examples"))
        from decoding import share_weights

        self.model = share_weights(model)
        self.handle = None
        if not name.startswith("sdpa"):
            rule = None if name.startswith("exact") else name
            walk = "guided" if name in PRESETS else "sink_recent"
            self.handle = art_torch.patch(self.model, rule, walk)
        if name in PRESETS or name == "exact_graphed":
            decoder = GraphedDecoder(self.model, max_length)
            decoder.prefill(prompts)
            self.step: Step = decoder.step
            return
        caches = {
            "sdpa_dynamic": lambda: DynamicCache(config=model.config),
            "sdpa_static": lambda: StaticCache(model.config, max_cache_len=max_length),
            "exact": lambda: ARTCache(model.config),
        }
        cache = caches[name]()
        self.forward(prompts, cache)
        if name == "sdpa_static" and prompts.is_cuda:
            self.step = self.recorded(cache, prompts)
        else:
            self.step = lambda tokens: self.forward(tokens[:, None], cache)

    def forward(self, ids: Tensor, cache: Any, **inputs: Any) -> Tensor:
        inputs[cache_argument(self.model)] = cache
        logits: Tensor = self.model(ids, logits_to_keep=1, **inputs).logits
        return logits

    def recorded(self, cache: Any, prompts: Tensor) -> Step:
        """A step as one CUDA graph: what is fair to compare GraphedDecoder with."""
        token = prompts[:, -1:].clone()
        position = torch.full_like(token, prompts.shape[1])
        graph = recorded(lambda: self.forward(token, cache, position_ids=position))

        def step(tokens: Tensor) -> None:
            token.copy_(tokens[:, None])
            graph.replay()
            position.add_(1)

        return step

    def read_fraction(self) -> float:
        return 1.0 if self.handle is None else self.handle.stats.read_fraction()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(name: str, model: Any, tokens: Tensor, prompt: int) -> dict[str, Any]:
    """A row without a case; ``tokens``: int64 ``[batch, prompt + steps]``."""
    lane = Lane(name, model, tokens[:, :prompt], tokens.shape[1] + WARM_UP)
    following = tokens[:, prompt:].unbind(1)
    for token in following[:WARM_UP]:
        lane.step(token)
    each = (len(following) - WARM_UP) // RUNS
    times = []
    for run in range(RUNS):
        begin = WARM_UP + run * each
        synchronize(tokens.device)
        start = time.perf_counter()
        for token in following[begin : begin + each]:
            lane.step(token)
        synchronize(tokens.device)
        times.append(1e6 * (time.perf_counter() - start) / each)
    row = {"us": median(times), "us_min": min(times), "us_max": max(times)}
    rounded = {key: round(value, 1) for key, value in row.items()}
    fallbacks = 0 if lane.handle is None else lane.handle.stats.exact_fallbacks
    return {
        "impl": name,
        **rounded,
        "read": round(lane.read_fraction(), 4),
        "guided": name in PRESETS and fallbacks == 0,
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="A decode step of the whole model", box=SIMPLE)
    for title in ("case", "implementation"):
        table.add_column(title)
    for title in ("KV read", "ms", "tokens/s"):
        table.add_column(title, justify="right")
    for row in rows:
        batch = int(row["case"].split("_")[0][1:])
        times = (f"{row['us'] / 1e3:.2f}", f"{1e6 * batch / row['us']:,.0f}")
        table.add_row(row["case"], row["impl"], f"{row['read']:.1%}", *times)
    console.print(table)


def main() -> None:
    names = ["sdpa_dynamic", "sdpa_static", "exact", "exact_graphed", *PRESETS]
    parser = argparse.ArgumentParser(description="Time of a decode step of a model on a GPU")
    parser.add_argument("--smoke", action="store_true", help="short; writes no result file")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--prompt-tokens", type=int, default=8128)
    parser.add_argument("--steps", type=int, default=WARM_UP + 10 * RUNS)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--commit", help="of the sources, where they are no git checkout")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    arguments = parser.parse_args()
    batches, prompt, steps = arguments.batches, arguments.prompt_tokens, arguments.steps
    if arguments.smoke:
        batches, prompt, steps = [2], 1024, WARM_UP + RUNS
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.smoke:
        parser.error("there is no GPU: this is for NVIDIA GPUs, bench_steps.py for CPUs")
    logging.getLogger("art_torch").setLevel(logging.ERROR)  # what a walk loses is not measured here
    console = Console()
    results, rows = describe_machine("transformers"), []
    results["commit"] = arguments.commit or results["commit"]
    if device.type == "cuda":
        for name in ("simd", "cores", "threads", "load_before"):  # of the CPU
            del results[name]
        results["device"] = torch.cuda.get_device_name(device)
        results["versions"]["cuda"] = torch.version.cuda
    model, tokenizer = load_smollm2()
    model = model.to(device, torch.bfloat16)
    text = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0].to(device)
    with torch.inference_mode(), progress_bar("bench_gpu_steps", len(batches) * len(names)) as bar:
        for batch in batches:
            length = prompt + steps
            starts = torch.arange(batch, device=device) * ((len(text) - length) // batch)
            tokens = text[starts[:, None] + torch.arange(length, device=device)]
            for name in arguments.only:
                row = measure(name, model, tokens, prompt)
                rows.append({"case": f"B{batch}_S{length}_bf16", **row})
                bar(name)
    results.update(model="SmolLM2-135M-Instruct", rows=rows)
    show(rows, console)
    if arguments.output or not arguments.smoke:
        output = arguments.output
        if output is not None and output.suffix != ".json":
            output = output / f"gpu_steps-{slug(results['device'])}.json"
        console.print(f"written to {write_results('gpu_steps', results, output)}")


if __name__ == "__main__":
    main()
