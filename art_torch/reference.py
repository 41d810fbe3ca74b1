"""The contract of ART decode attention in plain float64 PyTorch.

This module is the specification: every kernel is tested against it and the documentation quotes it.
It is written to be read, one (sequence, KV head) at a time, and calls no compiled code. Paper:
Attention Run-time Termination, arXiv 2606.00024; the stopping rules are `output_change` and
`StoppingRules`, and what becomes of their verdicts is `StopCounter`.

Terms, used everywhere in this package:

* *B*, *Hq*, *Hkv*, *G*, *D*, *Dv*, *P*: sequences, query heads, KV heads, query heads of a KV head,
  elements of a key, elements of a value, pages of the cache.
* *unit*: `unit_size` consecutive tokens of one head, aligned at token 0; the smallest thing a walk
  can name.
* *walk*: the order in which the units of a head are read.
* *pinned*: the units at the start of the walk that are read before any decision is made.
* *block*: `block_size / unit_size` consecutive units of the walk; one decision is made after each
  block.
* *group*: the query heads that share a KV head. They read together and stop together.
* *stable*: a block that changed the outputs of the group little (`Stability`).
* *covered*: a block after which little of the softmax mass is left to read (`ResidualMass`).

How a walk is cut into blocks never depends on the criterion. So `criterion=None` gives exactly the
result of a criterion that never fires, and the output of a stopped head is that of exact attention
over the blocks up to its `stop_block`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from art_torch._reference_checks import (
    check_options,
    check_page_ids,
    check_rest,
    check_scale,
    check_tensors,
    check_walk,
    check_walk_name,
)
from art_torch._reference_codes import decode_keys, encode_keys
from art_torch._reference_guided import GuidedWalk, guided_walk
from art_torch._reference_logits import logits_of, visible_tokens
from art_torch._reference_rows import append_kv, dequantize, quantize
from art_torch._reference_stops import (
    MARGIN,
    PROBABILITY_ROUNDING,
    BlockChange,
    BlockRest,
    StopCounter,
    StoppingRules,
    decision_margin,
    output_change,
    stopping_rules,
)
from art_torch.criterion import Criterion, rules_of

__all__ = [
    "MARGIN",
    "PROBABILITY_ROUNDING",
    "BlockChange",
    "BlockRest",
    "GuidedWalk",
    "ReferenceResult",
    "append_kv",
    "decision_margin",
    "decode_attention",
    "decode_keys",
    "dequantize",
    "encode_keys",
    "guided_walk",
    "output_change",
    "quantize",
]

SINK_TOKENS = 64  # tokens that `sink_recent` reads first, and pins at either end


class ReferenceResult(NamedTuple):
    """Result of `decode_attention`, on the CPU.

    Attributes:
        out: `[B, Hq, Dv]` float64. Zeros for a head with nothing to read.
        lse: `[B, Hq]` float64, natural log-sum-exp of the logits read, sinks excluded. -inf with
            nothing to read.
        tokens_read: `[B, Hkv]` int32, visible tokens of all blocks up to the stop.
        stop_block: `[B, Hkv]` int32, index j of the block after which the criterion stopped (also
            when it is the last one); -1 where it never did.
        trace: `trace[b][h]` lists what the blocks j = 1, 2, ... that were read changed.
        rests: `rests[b][h]` lists what the blocks j = 0, 1, ... that were read left, with
            `log_rest`; else it is empty.
    """

    out: Tensor
    lse: Tensor
    tokens_read: Tensor
    stop_block: Tensor
    trace: list[list[list[BlockChange]]]
    rests: list[list[list[BlockRest]]]


@torch.no_grad()
def decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    criterion: Criterion | None = None,
    walk: str | Tensor = "sink_recent",
    walk_lens: Tensor | None = None,
    num_pinned: int | Tensor | None = None,
    block_size: int = 64,
    unit_size: int = 16,
    scale: float | None = None,
    softcap: float = 0.0,
    attn_sinks: Tensor | None = None,
    sliding_window: int | None = None,
    alibi_slopes: Tensor | None = None,
    seq_starts: Tensor | None = None,
    log_rest: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> ReferenceResult:
    """Attend with one query token per sequence, block by block, until the output stops changing.

    Runs on the CPU; what is read of arguments on another device is copied.

    Args:
        query: `[B, Hq, D]`, any floating dtype; everything is computed in float64.
        key_cache: `[P, page_size, Hkv, D]`, the dtype of `query` or int8, any strides; Hq is a
            multiple of Hkv.
        value_cache: `[P, page_size, Hkv, Dv]`, the dtype of `key_cache`, any strides.
        block_table: int32 `[B, max_pages]`, or `[B, Hkv, max_pages]` per head: page ids. Entries of
            pages without a visible token may hold anything.
        seq_lens: int32 `[B]`, or `[B, Hkv]` per head: tokens in the cache, the query's own token
            included.
        criterion: when to stop. `None` reads the whole walk: exact attention.
        walk: `"oldest_first"`, `"recent_first"`, `"sink_recent"`, or int32 `[B, Hkv, max_units]` of
            unit indices; those of a guided walk come from `guided_walk`.
        walk_lens: int32 `[B, Hkv]`, entries of an explicit `walk` that count; the others may hold
            anything.
        num_pinned: units at the start of the walk that are always read, an int or int32 `[B, Hkv]`.
            Default: the first 64 and the last 64 tokens for `"sink_recent"`, else none.
        block_size: tokens a block, a multiple of `unit_size`.
        unit_size: tokens a unit. Divides `page_size`, but is free when `max_pages` is 1.
        scale: factor on the dot products, default `1 / sqrt(D)`.
        softcap: c > 0 replaces a logit x by `c * tanh(x / c)`; 0 is off.
        attn_sinks: `[Hq]`, one logit per query head that takes part in the softmax denominator and
            has no value.
        sliding_window: how many of the last tokens are visible, the query's own included.
        alibi_slopes: `[Hq]`, adds `slope * (j - (seq_len - 1))` to the logit of token j.
        seq_starts: int32 `[B]`, first visible token of each sequence, default 0.
        log_rest: `[B, Hq, max_units]`, for `ResidualMass`, which needs an explicit `walk` and this:
            the natural log of the sum of exp(logit) over all units of the walk after its entry i,
            true or estimated. After a block, the entry of its last unit counts. So entries of units
            without a visible token, which are dropped, may hold anything, and so may those from
            `walk_lens` on.
        key_scale: float32 `[P, page_size, Hkv]`, of an int8 `key_cache` and only there: a key is
            its codes times the scale of its token and head, see `quantize`.
        value_scale: likewise.

    Returns:
        A `ReferenceResult`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or a value out of range, also inside the index
            tensors; a walk names a unit twice; ALiBi or a window is combined with per-head
            `seq_lens`; `ResidualMass` lacks its `log_rest`, or `log_rest` a `ResidualMass`.
    """
    check_tensors(query, key_cache, value_cache, block_table, seq_lens, seq_starts)
    check_scale("key_scale", key_scale, "key_cache", key_cache)
    check_scale("value_scale", value_scale, "value_cache", value_cache)
    if key_scale is not None and value_scale is not None:
        key_cache, value_cache = (
            dequantize(key_cache, key_scale),
            dequantize(value_cache, value_scale),
        )
    check_options(query, seq_lens, scale, softcap, attn_sinks, sliding_window, alibi_slopes)
    check_walk(block_table, value_cache, walk, walk_lens, num_pinned, block_size, unit_size)
    batch, num_q_heads, head_dim = query.shape
    num_kv_heads, value_dim = value_cache.shape[2:]
    group = num_q_heads // num_kv_heads
    rules = stopping_rules(criterion, num_kv_heads)
    check_rest(query, walk, log_rest, rules_of(criterion).residual_mass is not None)

    out = torch.zeros(batch, num_q_heads, value_dim, dtype=torch.float64)
    lse = torch.full((batch, num_q_heads), -math.inf, dtype=torch.float64)
    tokens_read = torch.zeros(batch, num_kv_heads, dtype=torch.int32)
    stop_block = torch.full((batch, num_kv_heads), -1, dtype=torch.int32)
    trace: list[list[list[BlockChange]]] = [[] for _ in range(batch)]
    rests: list[list[list[BlockRest]]] = [[] for _ in range(batch)]
    for b in range(batch):
        for h in range(num_kv_heads):
            heads = slice(h * group, (h + 1) * group)
            seq_len = int(seq_lens[b] if seq_lens.ndim == 1 else seq_lens[b, h])
            head = _Head(
                query=_exact(query[b, heads]),
                keys=key_cache[:, :, h],
                values=value_cache[:, :, h],
                page_ids=(block_table[b] if block_table.ndim == 2 else block_table[b, h])
                .long()
                .cpu(),
                seq_len=seq_len,
                scale=1.0 / math.sqrt(head_dim) if scale is None else scale,
                softcap=softcap,
                sinks=None if attn_sinks is None else _exact(attn_sinks[heads]),
                slopes=None if alibi_slopes is None else _exact(alibi_slopes[heads]),
            )
            visible = visible_tokens(
                seq_len, 0 if seq_starts is None else int(seq_starts[b]), sliding_window
            )
            check_page_ids(head.page_ids, visible, key_cache)
            if isinstance(walk, str):
                order = walk_order(walk, visible, unit_size)
            else:
                assert walk_lens is not None  # checked above
                order = walk[b, h, : walk_lens[b, h]].tolist()
            pinned = default_pinned(walk, unit_size) if num_pinned is None else num_pinned
            pinned = int(pinned[b, h]) if isinstance(pinned, Tensor) else pinned
            cut = (order, pinned, visible, block_size, unit_size)
            left = None
            if log_rest is not None:
                last = [block[-1] for block in cut_entries(*cut)]
                left = _exact(log_rest[b, heads][:, last])
            state = _attend(head, cut_blocks(*cut), left, rules[h])
            out[b, heads], lse[b, heads], tokens_read[b, h], stop_block[b, h] = state[:4]
            trace[b].append(state[4])
            rests[b].append(state[5])
    return ReferenceResult(out, lse, tokens_read, stop_block, trace, rests)


def walk_order(name: str, visible: range, unit_size: int) -> list[int]:
    """Return the units of a built-in walk: all those with a visible token, each once."""
    check_walk_name(name)
    if not visible:
        return []
    units = list(range(visible[0] // unit_size, visible[-1] // unit_size + 1))
    if name == "oldest_first":
        return units
    if name == "recent_first":
        return units[::-1]
    sink = math.ceil(SINK_TOKENS / unit_size)
    return units[:sink] + units[sink:][::-1]


def default_pinned(walk: str | Tensor, unit_size: int) -> int:
    """Return the default of `num_pinned`: `sink_recent` pins the first and the last 64 tokens."""
    is_sink_recent = isinstance(walk, str) and walk == "sink_recent"
    return 2 * math.ceil(SINK_TOKENS / unit_size) if is_sink_recent else 0


def cut_entries(
    order: list[int], num_pinned: int, visible: range, block_size: int, unit_size: int
) -> list[list[int]]:
    """Cut a walk into blocks and return the entries of each: positions in `order`.

    Pinned positions are counted in the walk as given; only then units without a visible token are
    dropped. The pinned units that remain are block 0. Without any, the first ordinary block is
    block 0. The last block may be short.
    """
    kept = [i for i, unit in enumerate(order) if unit_tokens(unit, visible, unit_size)]
    pinned = [i for i in kept if i < num_pinned]
    others = kept[len(pinned) :]
    size = block_size // unit_size
    blocks = [others[i : i + size] for i in range(0, len(others), size)]
    return [pinned, *blocks] if pinned else blocks


def cut_blocks(
    order: list[int], num_pinned: int, visible: range, block_size: int, unit_size: int
) -> list[Tensor]:
    """Cut a walk into blocks and return the visible tokens of each, in walk order."""
    blocks = cut_entries(order, num_pinned, visible, block_size, unit_size)
    return [
        torch.tensor([t for i in block for t in unit_tokens(order[i], visible, unit_size)])
        for block in blocks
    ]


def unit_tokens(unit: int, visible: range, unit_size: int) -> range:
    """Return the visible tokens of a unit."""
    start, end = unit * unit_size, (unit + 1) * unit_size
    return range(max(start, visible.start), min(end, visible.stop))


def _exact(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", torch.float64)


@dataclass(frozen=True)
class _Head:
    """The cache of one KV head of one sequence, as seen by the G query heads of its group."""

    query: Tensor  # [G, D]
    keys: Tensor  # [P, page_size, D]
    values: Tensor  # [P, page_size, Dv]
    page_ids: Tensor  # [max_pages]
    seq_len: int
    scale: float
    softcap: float
    sinks: Tensor | None  # [G]
    slopes: Tensor | None  # [G]

    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits `[G, n]` and values `[n, Dv]` of n tokens, given by index."""
        page_size = self.keys.shape[1]
        page, slot = self.page_ids[tokens // page_size], tokens % page_size
        products = self.scale * self.query @ _exact(self.keys[page, slot]).T
        logits = logits_of(products, tokens, self.seq_len, self.softcap, self.slopes)
        return logits, _exact(self.values[page, slot])


def _attend(
    head: _Head, blocks: list[Tensor], log_rest: Tensor | None, rules: StoppingRules
) -> tuple[Tensor, Tensor, int, int, list[BlockChange], list[BlockRest]]:
    """Read the blocks in order until the rules stop.

    `log_rest`, `[G, num_blocks]`, is what is left after each block. Returns out, lse, tokens_read,
    stop_block, the changes and the rests.
    """
    group, value_dim = head.query.shape[0], head.values.shape[-1]
    nothing = torch.full((group,), -math.inf, dtype=torch.float64)
    lse = nothing
    denominator = nothing if head.sinks is None else head.sinks  # log; sinks count from the start
    output = torch.zeros(group, value_dim, dtype=torch.float64)
    mean_norm = torch.zeros(group, dtype=torch.float64)  # like output, but of |v|
    max_logit = torch.zeros(group, dtype=torch.float64)
    tokens_read, counter = 0, StopCounter(rules)
    trace: list[BlockChange] = []
    rests: list[BlockRest] = []
    for j, tokens in enumerate(blocks):
        logits, values = head.read(tokens)
        block_lse = logits.logsumexp(-1)
        probs = (logits - block_lse[:, None]).exp()
        block_mean, block_norm = probs @ values, probs @ values.norm(dim=-1)
        lse = torch.logaddexp(lse, block_lse)
        denominator = torch.logaddexp(denominator, block_lse)
        weight = (block_lse - denominator).exp()
        previous, previous_norm = output, mean_norm
        output = previous + weight[:, None] * (block_mean - previous)
        mean_norm = previous_norm + weight * (block_norm - previous_norm)
        max_logit = torch.maximum(max_logit, logits.abs().amax(-1))
        tokens_read += len(tokens)

        stable = covered = False
        if j > 0:
            d_scale, d_direction = output_change(previous, output)
            spread = torch.maximum(previous_norm, block_norm) / previous.norm(dim=-1)
            spread = spread.where(previous_norm != 0, 0.0)
            trace.append(BlockChange(d_scale, d_direction, weight, spread, max_logit))
            stable = rules.thresholds is not None and rules.is_stable(trace[-1])
        if log_rest is not None:
            rests.append(BlockRest(log_rest[:, j], denominator, max_logit))
            covered = rules.is_covered(rests[-1])
        if counter.stops(stable, covered):
            return output, lse, tokens_read, j, trace, rests
    return output, lse, tokens_read, -1, trace, rests
