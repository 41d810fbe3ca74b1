"""Memory and time of generation with an 8k context: DynamicCache against ARTCache.

    python benchmarks/bench_memory.py            # minutes; writes results/memory-<device>.json
    python benchmarks/bench_memory.py --quick    # a short prompt; only prints

SmolLM2-135M-Instruct in float32. Each cache is measured in a process of its own: a prompt is
prefilled, then tokens are generated greedily. Peak memory is the largest resident size; that of the
process has the prefill in it, that of decoding is counted from the end of the prefill. Both caches
attend exactly: `dynamic` with the unpatched model (sdpa), `art` with a patched one, criterion None.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import describe_machine, load_smollm2, progress_bar, run_child, write_results
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

CACHES = ("dynamic", "art")
MIB = 1 << 20


def resident(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (the largest since the last reset), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def generate(cache_name: str, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """Runs in the child process."""
    from transformers import DynamicCache

    import art_torch
    from art_torch.integrations.transformers import cache_argument

    model, _ = load_smollm2()
    cache: Any
    if cache_name == "art":
        art_torch.patch(model, None)
        cache = art_torch.ARTCache(model.config)
    else:
        cache = DynamicCache(config=model.config)
    inputs = {cache_argument(model): cache, "logits_to_keep": 1}
    # Memory does not depend on what the tokens say.
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, model.config.vocab_size, (1, prompt_tokens), generator=generator)
    for parameter in model.parameters():  # the weights are mapped: touch all of them once
        parameter.sum()
    before = resident("VmRSS")
    seconds = []
    with torch.inference_mode():
        logits = model(tokens, **inputs).logits
        after_prefill = resident("VmRSS")
        reset_peak()
        for _ in range(new_tokens):
            start = time.perf_counter()
            token = logits[:, -1].argmax(-1, keepdim=True)
            logits = model(token, **inputs).logits
            seconds.append(time.perf_counter() - start)
    peak_decode = resident("VmHWM")
    # clear_refs resets what /proc reports, not what getrusage does.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    kv_bytes = cache.bytes_in_use if cache_name == "art" else kv_bytes_of(cache)
    return {
        "peak_bytes": peak,
        "peak_decode_bytes": peak_decode,
        "model_bytes": before,
        "after_prefill_bytes": after_prefill,
        "kv_bytes": kv_bytes,
        "us": round(1e6 * median(seconds), 1),
        "us_min": round(1e6 * min(seconds), 1),
        "us_max": round(1e6 * max(seconds), 1),
    }


def kv_bytes_of(cache: Any) -> int:
    tensors = (tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def in_child(cache_name: str, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    sizes = ("--prompt-tokens", str(prompt_tokens), "--new-tokens", str(new_tokens))
    return run_child(__file__, "--child", cache_name, *sizes)


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="Generation with a long context, MiB", box=SIMPLE)
    for title in ("case", "cache"):
        table.add_column(title)
    columns = {
        "KV": "kv_bytes",
        "peak": "peak_bytes",
        "model alone": "model_bytes",
        "after prefill": "after_prefill_bytes",
        "peak of decoding": "peak_decode_bytes",
    }
    for title in (*columns, "ms a token (minimum)"):
        table.add_column(title, justify="right")
    for row in rows:
        sizes = (f"{row[key] / MIB:,.0f}" for key in columns.values())
        times = f"{row['us'] / 1e3:.1f} ({row['us_min'] / 1e3:.1f})"
        table.add_row(row["case"], row["impl"], *sizes, times)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of generation, by cache")
    parser.add_argument("--quick", action="store_true", help="short; writes no result file")
    parser.add_argument("--prompt-tokens", type=int, default=8160)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    parser.add_argument("--child", choices=CACHES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    prompt, new = arguments.prompt_tokens, arguments.new_tokens
    if arguments.child:
        print(json.dumps(generate(arguments.child, prompt, new)))
        return
    if arguments.quick:
        prompt, new = 256, 4
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    results = describe_machine("transformers")
    rows = []
    with progress_bar("bench_memory", len(CACHES)) as advance:
        for name in CACHES:
            case = f"B1_S{prompt + new}_f32_t{results['threads']}"
            rows.append({"case": case, "impl": name, **in_child(name, prompt, new)})
            advance(name)
    results.update(model="SmolLM2-135M-Instruct, float32", rows=rows)
    show(rows, console)
    if arguments.output or not arguments.quick:
        console.print(f"written to {write_results('memory', results, arguments.output)}")


if __name__ == "__main__":
    main()
