"""What rounding keys and values to eight bits loses, by what shares a scale: SmolLM2-135M-Instruct.

    python benchmarks/bench_int8.py            # minutes; writes results/int8-<device>.json
    python benchmarks/bench_int8.py --quick    # a short context; only prints

The text is data/jargon_file.txt. Its parts are prefilled exactly. Then, for each kind of scale, the
prompt's keys and values are rounded, and the text's next tokens are fed one by one:

    bytes      of keys and values, relative to float16
    keys,      root mean square of what rounding changes, relative to that of keys or values
    values
    output     the same of the attention output of each query head and step, over the prompt
    KL         mean of KL(exact || rounded) over the predictions of the following token

The last row is ``ARTCache(kv_dtype=torch.int8)``, which also rounds the tokens that are fed.
"""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import describe_machine, load_smollm2, progress_bar, write_results
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache

import art_torch
from art_torch import ARTCache, reference

TEXT = Path(__file__).resolve().parent / "data" / "jargon_file.txt"
GROUP = 64
ART_CACHE = "ARTCache, int8"

Rounding = Callable[[Tensor], Tensor]  # of keys or values [num_kv_heads, tokens, head_dim]


def rounded(x: Tensor, over: tuple[int, ...]) -> Tensor:
    """One scale for all that these dimensions have; float32, as ``reference.quantize``."""
    scale = x.abs().amax(over, keepdim=True) / 127
    return (x / scale).round().clamp(-127, 127).where(scale > 0, 0.0) * scale


def per_token(x: Tensor) -> Tensor:
    codes, scale = reference.quantize(x)
    return reference.dequantize(codes, scale, torch.float32)


def per_token_float16(x: Tensor) -> Tensor:
    scale = (x.abs().amax(-1, keepdim=True) / 127).half().float()
    return (x / scale).round().clamp(-127, 127) * scale


def per_token_and_half(x: Tensor) -> Tensor:
    return rounded(x.unflatten(-1, (2, -1)), (3,)).flatten(-2)


def per_channel_of_a_group(x: Tensor) -> Tensor:
    whole = x.shape[1] // GROUP * GROUP  # tokens of the last group wait until it is complete
    groups = rounded(x[:, :whole].unflatten(1, (-1, GROUP)), (2,)).flatten(1, 2)
    return torch.cat([groups, x[:, whole:]], dim=1)


@dataclass(frozen=True)
class Scales:
    """What shares a scale."""

    name: str
    round: Rounding
    scale_bytes: float  # for each element


SCALES = [
    Scales("token and head", per_token, 4 / 64),
    Scales("token and head, float16", per_token_float16, 2 / 64),
    Scales("token, all heads", lambda x: rounded(x, (0, 2)), 4 / 192),
    Scales("token and 32 channels", per_token_and_half, 4 / 32),
    Scales("channel of 64 tokens", per_channel_of_a_group, 4 / GROUP),
    Scales("channel of the prompt", lambda x: rounded(x, (1,)), 0.0),
]  # fmt: skip


@dataclass
class Part:
    """A part of the text, run exactly."""

    cache: DynamicCache  # the prompt
    following: Tensor  # int64 [steps]
    logs: Tensor  # float64 [steps, vocabulary]
    queries: list[Tensor]  # by layer: [steps, num_kv_heads, heads of a group, head_dim]


def feed(model: Any, cache: Any, tokens: Tensor) -> Tensor:
    """Log-probabilities of the next token after each of ``tokens``."""
    logits = [model(token[None, None], past_key_values=cache).logits[0, -1] for token in tokens]
    return torch.stack(logits).double().log_softmax(-1)


def run_exactly(model: Any, prompt: Tensor, following: Tensor) -> Part:
    cache = DynamicCache(config=model.config)
    queries: dict[int, list[Tensor]] = {}

    def note(layer: int, arguments: dict[str, Any], _: Any) -> None:
        heads = arguments["key_cache"].shape[2]
        queries.setdefault(layer, []).append(arguments["query"][0].unflatten(0, (heads, -1)))

    with art_torch.patch(model, None, on_call=note):
        model(prompt[None], past_key_values=cache, logits_to_keep=1)
        logs = feed(model, copy.deepcopy(cache), following)
    return Part(cache, following, logs, [torch.stack(steps) for steps in queries.values()])


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    logits = torch.einsum("nhgd,hsd->nhgs", queries, keys) * queries.shape[-1] ** -0.5
    return torch.einsum("nhgs,hsd->nhgd", logits.softmax(-1), values)


class Squares:
    """Sums of squares of a difference and of what it is a difference to."""

    def __init__(self) -> None:
        self.away = self.all = 0.0

    def add(self, exact: Tensor, other: Tensor) -> None:
        self.away += float((other.double() - exact.double()).square().sum())
        self.all += float(exact.double().square().sum())

    @property
    def relative(self) -> float:
        return float(f"{(self.away / self.all) ** 0.5:.3g}")


def divergence(exact: Tensor, logs: Tensor) -> Tensor:
    return (exact.exp() * (exact - logs)).sum(-1)


def measure(model: Any, scales: Scales, parts: list[Part]) -> dict[str, Any]:
    errors = {name: Squares() for name in ("keys", "values", "output")}
    divergences = []
    for part in parts:
        cache = copy.deepcopy(part.cache)
        for layer, queries in zip(cache.layers, part.queries, strict=True):
            keys, values = layer.keys[0], layer.values[0]
            new = scales.round(keys), scales.round(values)
            errors["keys"].add(keys, new[0])
            errors["values"].add(values, new[1])
            errors["output"].add(attend(queries, keys, values), attend(queries, *new))
            layer.keys, layer.values = (rows[None] for rows in new)
        with art_torch.patch(model, None):
            divergences.append(divergence(part.logs, feed(model, cache, part.following)))
    return {
        "impl": scales.name,
        "bytes": round((1 + scales.scale_bytes) / 2, 4),
        **{name: error.relative for name, error in errors.items()},
        "kl": float(f"{float(torch.cat(divergences).mean()):.3g}"),
    }


def measure_cache(model: Any, prompts: list[Tensor], parts: list[Part]) -> dict[str, Any]:
    divergences = []
    for prompt, part in zip(prompts, parts, strict=True):
        cache = ARTCache(model.config, kv_dtype=torch.int8)
        with art_torch.patch(model, None):
            model(prompt[None], past_key_values=cache, logits_to_keep=1)
            divergences.append(divergence(part.logs, feed(model, cache, part.following)))
    return {"impl": ART_CACHE, "kl": float(f"{float(torch.cat(divergences).mean()):.3g}")}


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="What eight bits lose, by what shares a scale", box=SIMPLE)
    table.add_column("scale of")
    names = ("bytes", "keys", "values", "output", "kl")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row["impl"], *(str(row.get(name, "")) for name in names))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="What rounding keys and values to int8 loses")
    parser.add_argument("--quick", action="store_true", help="short; writes no result file")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--documents", type=int, default=3)
    parser.add_argument("--forced-tokens", type=int, default=32, help="per document")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    arguments = parser.parse_args()
    context, count, steps = arguments.context, arguments.documents, arguments.forced_tokens
    if arguments.quick:
        context, count, steps = 256, 1, 4
    logging.getLogger("art_torch").setLevel(logging.ERROR)
    model, tokenizer = load_smollm2()
    text = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    starts = [(len(text) - context - steps) * i // max(1, count - 1) for i in range(count)]
    prompts = [text[start : start + context] for start in starts]
    following = [text[start + context : start + context + steps] for start in starts]
    results = describe_machine("transformers")
    total = count + len(SCALES) + 1
    with torch.inference_mode(), progress_bar("bench_int8", total) as advance:
        parts = []
        for prompt, after in zip(prompts, following, strict=True):
            parts.append(run_exactly(model, prompt, after))
            advance("prefill")
        rows = []
        for scales in SCALES:
            rows.append({"case": f"S{context}", **measure(model, scales, parts)})
            advance(scales.name)
        rows.append({"case": f"S{context}", **measure_cache(model, prompts, parts)})
        advance(ART_CACHE)
    results.update(
        model="SmolLM2-135M-Instruct, float32", documents=count, forced_tokens=steps, rows=rows
    )
    show(rows, Console())
    if arguments.output or not arguments.quick:
        print(f"written to {write_results('int8', results, arguments.output)}")


if __name__ == "__main__":
    main()
