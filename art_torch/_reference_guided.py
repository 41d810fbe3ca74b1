"""The guided walk in plain PyTorch; re-exported by `art_torch.reference`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from art_torch._reference_checks import (
    check_codes,
    check_keys,
    check_options,
    check_page_ids,
    check_query,
    check_scale,
    check_tables,
)
from art_torch._reference_codes import (
    GROUP_TOKENS,
    UNIT_TOKENS,
    check_record,
    decode_keys,
    keys_of,
    of_head,
    record_bytes,
)
from art_torch._reference_logits import logits_of, visible_tokens
from art_torch._reference_rows import dequantize

SINK_UNITS = 4  # the first 64 tokens
STEPS = 64  # in which a logarithm to base 2 is counted
LEAST_STEPS, MOST_STEPS = -32767, 32767
BUCKET_STEPS = 8
NUM_BUCKETS = 256


class GuidedWalk(NamedTuple):
    """Result of `guided_walk`, on the CPU.

    Attributes:
        walk: `[B, Hkv, max_units]` int32, units in the order they should be read, then -1.
        walk_lens: `[B, Hkv]` int32, units with a visible token.
        num_pinned: `[B, Hkv]` int32, units at the start of the walk that must always be read.
        log_mass: `[B, Hkv, max_units]` float64, natural logarithm of the estimated share of the
            softmax mass of each unit, in walk order, then -inf.
        log_rest: `[B, Hq, max_units]` float64, natural log of the estimated sum of exp(logit) over
            the units after entry i of the walk; -inf after the last one. `[B, Hq, 0]` without
            `rest`.
    """

    walk: Tensor
    walk_lens: Tensor
    num_pinned: Tensor
    log_mass: Tensor
    log_rest: Tensor


@torch.no_grad()
def guided_walk(
    query: Tensor,
    key_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    key_codes: Tensor,
    code_table: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    attn_sinks: Tensor | None = None,
    sliding_window: int | None = None,
    alibi_slopes: Tensor | None = None,
    seq_starts: Tensor | None = None,
    rest: bool = False,
    key_scale: Tensor | None = None,
) -> GuidedWalk:
    """Order the units of 16 tokens by the softmax mass that key codes say they have.

    Logits are those of `decode_attention`, with keys decoded from their codes, or exact after the
    last complete group. A unit's share is the largest over the query heads of the KV head. The
    first four units with a visible token, the last complete group and what follows it come first
    (pinned); then descending shares.

    Args:
        query: `[B, Hq, D]`.
        key_cache: `[P, page_size, Hkv, D]`; only tokens after the last complete group are read.
        block_table: int32 `[B, max_pages]` or `[B, Hkv, max_pages]`, page ids.
        seq_lens: int32 `[B]` or `[B, Hkv]`, tokens in the cache.
        key_codes: uint8 `[num_code_pages, Hkv, record_bytes(D)]`, see `encode_keys`.
        code_table: int32 `[B, max_groups]` or `[B, Hkv, max_groups]`, the code page of each group;
            entries of groups without a visible token may hold anything.
        scale: as in `decode_attention`, and so are the others.
        softcap: c of `c * tanh(x / c)`.
        attn_sinks: `[Hq]`, part of the total.
        sliding_window: tokens visible.
        alibi_slopes: `[Hq]`.
        seq_starts: int32 `[B]`, first visible token.
        rest: estimate `log_rest` too.
        key_scale: float32 `[P, page_size, Hkv]`, of an int8 `key_cache` and only there.

    Returns:
        A `GuidedWalk`.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape or a value out of range.
    """
    check_keys(key_cache)
    check_query(query, key_cache)
    check_scale("key_scale", key_scale, "key_cache", key_cache)
    if key_scale is not None:
        key_cache = dequantize(key_cache, key_scale)
    check_tables(key_cache, query.shape[0], block_table, seq_lens, seq_starts)
    check_options(query, seq_lens, scale, softcap, attn_sinks, sliding_window, alibi_slopes)
    check_codes(key_codes, code_table, key_cache, block_table, record_bytes(query.shape[-1]), None)
    (batch, num_q_heads, head_dim), num_kv_heads = query.shape, key_cache.shape[2]
    page_size, max_pages = key_cache.shape[1], block_table.shape[-1]
    if page_size % UNIT_TOKENS and max_pages > 1:
        raise ValueError(f"page_size must be a multiple of {UNIT_TOKENS}, got {page_size}")
    group_size = num_q_heads // num_kv_heads
    shape = (batch, num_kv_heads, -(-page_size * max_pages // UNIT_TOKENS))
    result = GuidedWalk(
        torch.full(shape, -1, dtype=torch.int32),
        torch.zeros(shape[:2], dtype=torch.int32),
        torch.zeros(shape[:2], dtype=torch.int32),
        torch.full(shape, -math.inf, dtype=torch.float64),
        torch.full((batch, num_q_heads, shape[-1] if rest else 0), -math.inf, dtype=torch.float64),
    )
    for b in range(batch):
        start = 0 if seq_starts is None else int(seq_starts[b])
        for h in range(num_kv_heads):
            heads = slice(h * group_size, (h + 1) * group_size)
            seq_len = int(of_head(seq_lens, b, h, 1))
            visible = visible_tokens(seq_len, start, sliding_window)
            if not visible:
                continue
            keys = _estimated_keys(
                key_cache, of_head(block_table, b, h, 2), key_codes, of_head(code_table, b, h, 2),
                visible, h,
            )  # fmt: skip
            products = query[b, heads].double().cpu() @ keys.T
            products *= 1.0 / math.sqrt(head_dim) if scale is None else scale
            slopes = None if alibi_slopes is None else alibi_slopes[heads].double().cpu()
            logits = logits_of(products, torch.tensor(visible), seq_len, softcap, slopes)
            sinks = None if attn_sinks is None else attn_sinks[heads].double().cpu()
            lse = unit_lse(logits, visible)
            scores = shares(lse, sinks)
            order, num_pinned = order_units(scores, visible)
            result.walk[b, h, : len(order)] = torch.tensor(order)
            result.walk_lens[b, h], result.num_pinned[b, h] = len(order), num_pinned
            first = visible[0] // UNIT_TOKENS
            mass = scores[torch.tensor(order) - first].double() * (math.log(2) / STEPS)
            result.log_mass[b, h, : len(order)] = mass
            if rest:
                in_order = lse[:, torch.tensor(order) - first]
                result.log_rest[b, heads, : len(order)] = rest_after(in_order)
    return result


def unit_lse(logits: Tensor, visible: range) -> Tensor:
    """Return the log-sum-exp `[G, num_units]` of the logits `[G, n]` of the visible tokens."""
    before, after = visible.start % UNIT_TOKENS, -visible.stop % UNIT_TOKENS
    padded = torch.nn.functional.pad(logits, (before, after), value=-math.inf)
    return padded.view(len(logits), -1, UNIT_TOKENS).logsumexp(-1)


def quantise(lse: Tensor) -> Tensor:
    """Count a natural logarithm in steps of 1/64 to base 2, int64; not finite is the least."""
    steps = (lse * (STEPS / math.log(2))).round().clamp(LEAST_STEPS, MOST_STEPS)
    return steps.where(lse.isfinite(), LEAST_STEPS).to(torch.int64)


def shares(lse: Tensor, sinks: Tensor | None) -> Tensor:
    """Return the share of each unit `[num_units]`, in steps: the largest over the query heads.

    From the log-sum-exp `[G, num_units]` of units and the sink logits `[G]`. All that follows the
    quantisation is done in integers, so the result does not depend on the order of a sum.
    """
    steps = quantise(lse)
    terms = steps if sinks is None else torch.cat([steps, quantise(sinks)[:, None]], -1)
    largest = terms.amax(-1, keepdim=True)
    total = largest + steps_of_mass(mass_below(largest - terms).sum(-1, keepdim=True)).long()
    return (steps - total).amax(0)


def mass_below(steps: Tensor) -> Tensor:
    """Return the weights, int64, of units that many steps below the largest, which weighs 2^31."""
    fractions = (2.0**31 * 2.0 ** (-torch.arange(STEPS).double() / STEPS)).round().long()
    below = steps.clamp(max=32 * STEPS)
    return fractions[below % STEPS] >> below // STEPS


def steps_of_mass(mass: Tensor) -> Tensor:
    """Return the steps, float64 whole numbers, that a sum of weights is above the largest."""
    return ((mass.double() / 2.0**31).log2() * STEPS).round()


def rest_after(lse: Tensor) -> Tensor:
    """Return the natural logarithm `[G, n]` of what comes after each entry of a walk.

    From the log-sum-exp `[G, n]` of its units, in their order. The same integers as in `shares`,
    relative to the largest unit; one at the upper limit may be larger than it says, and so may all
    that is left.
    """
    steps = quantise(lse)
    largest = steps.amax(-1, keepdim=True)
    weights = mass_below(largest - steps)
    after = weights.sum(-1, keepdim=True) - weights.cumsum(-1)
    rest = (largest + steps_of_mass(after)) * (math.log(2) / STEPS)
    return rest.where((largest < MOST_STEPS) | (after == 0), math.inf)


def order_units(scores: Tensor, visible: range) -> tuple[list[int], int]:
    """Return the walk over the units with a visible token, and how many of them are pinned.

    `scores`, int64 `[num_units]`, are their shares in steps. Buckets of 1/8 to base 2 below the
    best unpinned unit, 256 of them, keep the order of the units in them.
    """
    first, end = visible[0] // UNIT_TOKENS, visible[-1] // UNIT_TOKENS + 1
    recent = (visible.stop // GROUP_TOKENS - 1) * (GROUP_TOKENS // UNIT_TOKENS)
    units = range(first, end)
    pinned = [u for u in units if u < first + SINK_UNITS or u >= recent]
    others = [u for u in units if u not in set(pinned)]
    best = max((int(scores[u - first]) for u in others), default=0)

    def bucket(unit: int) -> int:
        return min((best - int(scores[unit - first])) // BUCKET_STEPS, NUM_BUCKETS - 1)

    return pinned + sorted(others, key=bucket), len(pinned)


def _estimated_keys(
    key_cache: Tensor,
    page_ids: Tensor,
    key_codes: Tensor,
    records: Tensor,
    visible: range,
    h: int,
) -> Tensor:
    """Return the keys of the visible tokens, float64 `[n, D]`, from codes where there are some."""
    coded_end = visible.stop // GROUP_TOKENS * GROUP_TOKENS
    parts = []
    for group in range(visible.start // GROUP_TOKENS, coded_end // GROUP_TOKENS):
        check_record(records, group, key_codes)
        record = key_codes[int(records[group]), h].cpu()
        keys = decode_keys(record, key_cache.shape[-1])
        parts.append(keys[max(0, visible.start - group * GROUP_TOKENS) :])
    tail = range(max(visible.start, coded_end), visible.stop)
    if tail:
        check_page_ids(page_ids, tail, key_cache)
        parts.append(keys_of(key_cache, page_ids, torch.tensor(tail), h).double().cpu())
    return torch.cat(parts)
