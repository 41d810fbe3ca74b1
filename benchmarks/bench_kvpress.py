"""Memory of a compressed KV cache: presses of kvpress alone, and on an ARTCache.

    python benchmarks/bench_kvpress.py            # minutes; writes results/kvpress-<device>.json
    python benchmarks/bench_kvpress.py --quick    # a short prompt; only prints

SmolLM2-135M-Instruct in float32, a prompt from the Jargon File, presses that keep 20 %. Each row is
measured in a process of its own: the prompt is prefilled under the press, then tokens are generated
greedily. `dynamic` is the press alone with transformers' DynamicCache and sdpa, `art` a patched
model with an ARTCache, criterion None: both attend to the same tokens. KV is what the cache holds
after the prompt. How much larger than before the prompt the process then is, and at most becomes
while it generates, is counted after the memory of the prefill itself was handed back.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from bench_memory import MIB, kv_bytes_of, reset_peak, resident
from common import describe_machine, load_smollm2, progress_bar, run_child, write_results
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

RATIO = 0.8  # the part that presses evict
TEXT = Path(__file__).parent / "data" / "jargon_file.txt"
CASES = [
    ("none", "dynamic"),
    ("none", "art"),
    ("SnapKVPress", "dynamic"),
    ("SnapKVPress", "art"),
    ("AdaKVPress", "dynamic"),
    ("AdaKVPress", "art"),
]


def press_of(name: str) -> Any:
    import kvpress

    snapkv = kvpress.SnapKVPress(RATIO)
    return kvpress.AdaKVPress(snapkv) if name == "AdaKVPress" else snapkv


def generate(press: str, cache_name: str, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """Runs in the child process."""
    from transformers import DynamicCache

    import art_torch
    from art_torch.integrations.kvpress import compatible
    from art_torch.integrations.transformers import cache_argument

    model, tokenizer = load_smollm2()
    ids = tokenizer(TEXT.read_text(), return_tensors="pt").input_ids[:, :prompt_tokens]
    cache: Any
    with ExitStack() as stack:
        if cache_name == "art":
            stack.enter_context(art_torch.patch(model, None))
            cache = art_torch.ARTCache(model.config)
        else:
            stack.enter_context(compatible(model))
            cache = DynamicCache(config=model.config)
        if press != "none":
            stack.enter_context(press_of(press)(model))
        stack.enter_context(torch.inference_mode())
        model(ids[:, :256], logits_to_keep=1)  # the weights are mapped: touch all of them once
        before = settled()
        inputs = {cache_argument(model): cache, "logits_to_keep": 1}
        token = model(ids, **inputs).logits.argmax(-1)
        after = settled()
        kv_bytes = cache.bytes_in_use if cache_name == "art" else kv_bytes_of(cache)
        reset_peak()
        for position in range(prompt_tokens, prompt_tokens + new_tokens):
            place = torch.tensor([[position]])
            token = model(token, position_ids=place, **inputs).logits.argmax(-1)
        peak = resident("VmHWM")
    return {
        "kv_bytes": kv_bytes,
        "resident_bytes": after - before,
        "peak_decode_bytes": peak - before,
    }


def settled() -> int:
    """Resident bytes, when malloc has handed back what is free."""
    ctypes.CDLL(None).malloc_trim(0)
    return resident("VmRSS")


def in_child(press: str, cache_name: str, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    sizes = ("--prompt-tokens", str(prompt_tokens), "--new-tokens", str(new_tokens))
    return run_child(__file__, "--child", press, cache_name, *sizes)


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title=f"KV cache of {rows[0]['case']}, presses keep {1 - RATIO:.0%}", box=SIMPLE)
    for title in ("press", "cache"):
        table.add_column(title)
    titles = ("KV, MiB", "of the whole", "process grew by, MiB", "at most, while decoding")
    for title in titles:
        table.add_column(title, justify="right")
    whole = rows[0]["kv_bytes"]
    for row in rows:
        table.add_row(
            row["press"],
            row["impl"],
            f"{row['kv_bytes'] / MIB:,.1f}",
            f"{row['kv_bytes'] / whole:.1%}",
            f"{row['resident_bytes'] / MIB:,.0f}",
            f"{row['peak_decode_bytes'] / MIB:,.0f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of a compressed KV cache")
    parser.add_argument("--quick", action="store_true", help="short; writes no result file")
    parser.add_argument("--prompt-tokens", type=int, default=4096)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    prompt, new = arguments.prompt_tokens, arguments.new_tokens
    if arguments.child:
        print(json.dumps(generate(*arguments.child, prompt, new)))
        return
    if arguments.quick:
        prompt, new = 640, 4
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    results = describe_machine("transformers", "kvpress")
    rows = []
    with progress_bar("bench_kvpress", len(CASES)) as advance:
        for press, name in CASES:
            row = {"case": f"B1_S{prompt}_f32_t{results['threads']}", "impl": name, "press": press}
            rows.append(row | in_child(press, name, prompt, new))
            advance(f"{press}, {name}")
    results.update(model="SmolLM2-135M-Instruct, float32", rows=rows)
    show(rows, console)
    if arguments.output or not arguments.quick:
        console.print(f"written to {write_results('kvpress', results, arguments.output)}")


if __name__ == "__main__":
    main()
