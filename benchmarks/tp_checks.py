"""What must be the same on one GPU and on several: tokens, stop decisions, statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from tp_models import Ranks, split_model, whole_model
from transformers import LlamaConfig, LlamaForCausalLM

import art_torch
from art_torch import ARTCache, reference
from art_torch.integrations.transformers import cache_argument
from art_torch.stats import ReadStats

RULE = art_torch.Stability(d_scale=0.02, d_direction=1e-3, patience=3)  # reads a half or more
SIZES = {"num_pinned": 1, "block_size": 16, "unit_size": 8}  # many decisions in a short text
BATCH = 2

Check = dict[str, Any]
Call = tuple[dict[str, Any], Tensor]  # arguments, and stop_block [batch, num_kv_heads]


class Recorder:
    """Calls of the operator, in order."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def __call__(self, layer: int, arguments: dict[str, Any], result: Any) -> None:
        # Lengths and tables change in place; what lies in the pages stays where it is.
        kept = {name: arguments[name].clone() for name in ("seq_lens", "block_table")}
        self.calls.append((arguments | kept, result.stop_block.clone()))


def run_checks(name: str, config: LlamaConfig, ranks: Ranks, tokens: int) -> list[Check]:
    """All checks of one model in float32, with a prompt of so many tokens."""
    whole = whole_model(config, torch.float32, torch.device("cpu"))
    weights = whole.state_dict()
    split = split_model(config, torch.float32, ranks.device, ranks.size, weights)
    whole = whole.to(ranks.device)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(config.vocab_size, (BATCH, tokens), generator=generator).to(ranks.device)
    checks = [check_tokens(whole, split, ids, ranks), *check_stops(whole, split, ids, ranks)]
    return [{"model": name, **check} for check in checks]


def generate(model: LlamaForCausalLM, ids: Tensor, steps: int, cache: Any) -> Any:
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **{cache_argument(model): cache},
        max_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )


def check_tokens(
    whole: LlamaForCausalLM, split: LlamaForCausalLM, ids: Tensor, ranks: Ranks, steps: int = 12
) -> Check:
    """Thresholds off: the ranks together write what transformers writes on one device."""
    expected = generate(whole, ids, steps, None)
    with art_torch.patch(split, None):
        got = generate(split, ids, steps, ARTCache(split.config))
    same = bool(torch.equal(got.sequences, expected.sequences))
    logits, others = torch.stack(expected.logits), torch.stack(got.logits)
    best = logits.topk(2).values
    return {
        "check": "tokens, thresholds off",
        "passed": all(ranks.from_all(same)),
        "compared": BATCH * steps,
        "different": int((got.sequences != expected.sequences).sum()),
        "logits_differ_by": float((others - logits).abs().max()),
        "closest_second_token": float((best[..., 0] - best[..., 1]).min()),
    }


def check_stops(
    whole: LlamaForCausalLM, split: LlamaForCausalLM, ids: Tensor, ranks: Ranks, steps: int = 8
) -> list[Check]:
    """With a rule: each KV head stops where it stops on one device, and is counted once."""
    alone, own = Recorder(), Recorder()
    with art_torch.patch(whole, RULE, on_call=alone, **SIZES) as handle:
        generate(whole, ids, steps, ARTCache(whole.config))
    with art_torch.patch(split, RULE, on_call=own, **SIZES) as split_handle:
        generate(split, ids, steps, ARTCache(split.config))
    counts = ranks.from_all(compare_stops(alone.calls, own.calls, ranks.rank))
    gathered = split_handle.gather_stats()
    compared, stopped, inside, outside = (sum(column) for column in zip(*counts, strict=True))
    stops = {
        "check": "stop decisions per KV head",
        "passed": outside == 0 and stopped > 0,
        "compared": compared,
        "stopped": stopped,
        "different": inside + outside,
        "different_inside_margin": inside,
    }
    return [stops, check_stats(gathered, handle.stats, stops["different"])]


def compare_stops(alone: list[Call], own: list[Call], rank: int) -> tuple[int, int, int, int]:
    """Heads of this rank: compared, stopped, different inside the margin, and outside of it."""
    if len(alone) != len(own):
        raise RuntimeError(f"expected {len(alone)} calls of the operator, got {len(own)}")
    compared = stopped = inside = outside = 0
    for (arguments, expected), (_, got) in zip(alone, own, strict=True):
        heads = slice(rank * got.shape[1], (rank + 1) * got.shape[1])
        different = (expected[:, heads] != got).cpu()
        compared += different.numel()
        stopped += int((got >= 0).sum())
        if different.any():
            uncertain = margin(arguments)[:, heads]
            inside += int((different & uncertain).sum())
            outside += int((different & ~uncertain).sum())
    return compared, stopped, inside, outside


def margin(arguments: dict[str, Any]) -> Tensor:
    """bool ``[batch, num_kv_heads]``, where rounding may have decided when to stop."""
    on_host = {
        name: value.cpu() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    result = reference.decode_attention(**on_host)
    return reference.decision_margin(result, arguments["criterion"], arguments["query"].dtype)


def check_stats(gathered: ReadStats, alone: ReadStats, different: int) -> Check:
    """Statistics of all ranks; as many decisions may differ in them as in the comparison."""
    same = torch.equal(gathered.tokens_present(), alone.tokens_present())
    reads, expected = gathered.tokens_read(), alone.tokens_read()
    same = same and reads.shape == expected.shape
    heads = int((reads != expected).sum()) if same else reads.numel()
    return {
        "check": "statistics gathered across ranks",
        "passed": same and heads <= different,
        "compared": expected.numel(),
        "different": heads,
        "read": round(gathered.read_fraction(), 4),
        "read_by_one": round(alone.read_fraction(), 4),
    }
