"""Key codes and the guided walk in plain PyTorch; re-exported by `art_torch.reference`.

`docs/key_codes.md` describes the format. A *group* is 64 consecutive tokens of one KV head, aligned
at token 0; once complete, its keys are also kept in two bits an element.
"""

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
    check_tables,
)

GROUP_TOKENS = 64
UNIT_TOKENS = 16
SINK_UNITS = 4  # the first 64 tokens
MAX_CODE = 3
LARGEST_HALF = 65504.0
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
    """

    walk: Tensor
    walk_lens: Tensor
    num_pinned: Tensor
    log_mass: Tensor


def record_bytes(head_dim: int) -> int:
    """Return the size of the record of one group and KV head."""
    return 20 * _padded(head_dim)


def _padded(head_dim: int) -> int:
    return -(-head_dim // 16) * 16


def code_places(head_dim: int) -> tuple[Tensor, Tensor]:
    """Return where a record holds the codes of token t and channel d: byte and lowest bit.

    Both are `[64, D]`, with D padded to a multiple of 16. A lane of a 16-token unit holds the codes
    that it needs as operand A of an `mma.m16n8k16`: tokens t and t + 8, and of every 16 channels
    two neighbours and the two that are 8 further.
    """
    steps = _padded(head_dim) // 16
    t, d = torch.arange(GROUP_TOKENS)[:, None], torch.arange(16 * steps)
    unit, row = t // UNIT_TOKENS, t % UNIT_TOKENS
    lane = row % 8 * 4 + d % 8 // 2
    byte = (unit * 32 + lane) * 2 * steps + d // 16 * 2 + row // 8
    bit = 2 * (d % 2) + 4 * (d % 16 // 8)
    return byte, bit.expand(byte.shape)


def grid_places(head_dim: int) -> Tensor:
    """Return the place of channel d among the scales, and likewise among the zeros, `[D]`."""
    steps = _padded(head_dim) // 16
    d = torch.arange(16 * steps)
    place, lane = d % 2 + d % 16 // 8 * 2, d % 8 // 2
    return (place * 4 + lane) * steps + d // 16


def code_grid(lowest: Tensor, highest: Tensor) -> tuple[Tensor, Tensor]:
    """Choose (zero, scale), float16, for channels with keys from `lowest` to `highest`, float32."""
    return lowest.half(), ((highest - lowest) / MAX_CODE).half()


def encode_group(keys: Tensor) -> Tensor:
    """Return the record, uint8 `[record_bytes]`, of the keys `[64, D]` of a group.

    Computed in float32, operation by operation: every implementation writes these very bytes.
    """
    head_dim = keys.shape[1]
    x = keys.float().nan_to_num(nan=0.0).clamp(-LARGEST_HALF, LARGEST_HALF) + 0.0  # no -0.0
    x = torch.nn.functional.pad(x, (0, _padded(head_dim) - head_dim))
    zero, scale = code_grid(x.amin(0), x.amax(0))
    codes = ((x - zero.float()) / scale.float()).round().clamp(0, MAX_CODE)
    codes = codes.where(scale != 0, 0.0).to(torch.int64)

    record = torch.zeros(record_bytes(head_dim), dtype=torch.int64)
    byte, bit = code_places(head_dim)
    record.index_add_(0, byte.flatten(), (codes << bit).flatten())
    halves = torch.zeros(2, len(zero), dtype=torch.float16)
    halves[:, grid_places(head_dim)] = torch.stack([scale, zero])
    record[-4 * len(zero) :] = halves.flatten().view(torch.uint8).long()
    return record.to(torch.uint8)


def decode_keys(record: Tensor, head_dim: int) -> Tensor:
    """Return the keys, float64 `[64, head_dim]`, that a record stands for."""
    byte, bit = code_places(head_dim)
    codes = record.long()[byte] >> bit & MAX_CODE
    halves = record[-4 * codes.shape[1] :].clone().view(torch.float16).view(2, -1).double()
    scale, zero = halves[:, grid_places(head_dim)]
    keys: Tensor = zero + scale * codes
    return keys[:, :head_dim]


@torch.no_grad()
def encode_keys(
    key_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    key_codes: Tensor,
    code_table: Tensor,
    *,
    coded_lens: Tensor | None = None,
) -> None:
    """Write the codes of all groups that have become complete, in place.

    Args:
        key_cache: `[P, page_size, Hkv, D]`.
        block_table: int32 `[B, max_pages]` or `[B, Hkv, max_pages]`, page ids.
        seq_lens: int32 `[B]` or `[B, Hkv]`, tokens in the cache.
        key_codes: uint8 `[num_code_pages, Hkv, record_bytes(D)]`, written.
        code_table: int32 `[B, max_groups]` or `[B, Hkv, max_groups]`, the code page of each group.
        coded_lens: int32 `[B]` or `[B, Hkv]`, tokens that were in the cache when this was called
            last, default 0: groups that were complete then are left as they are.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape or a value out of range.
    """
    check_keys(key_cache)
    batch = seq_lens.shape[0] if seq_lens.ndim else 0
    num_kv_heads, head_dim = key_cache.shape[2:]
    check_tables(key_cache, batch, block_table, seq_lens, None)
    check_codes(key_codes, code_table, key_cache, block_table, record_bytes(head_dim), coded_lens)
    for b in range(batch):
        for h in range(num_kv_heads):
            seq_len, page_ids = _of_head(seq_lens, b, h, 1), _of_head(block_table, b, h, 2)
            coded = 0 if coded_lens is None else int(_of_head(coded_lens, b, h, 1))
            records = _of_head(code_table, b, h, 2)
            for group in range(coded // GROUP_TOKENS, int(seq_len) // GROUP_TOKENS):
                tokens = torch.arange(group * GROUP_TOKENS, (group + 1) * GROUP_TOKENS)
                check_page_ids(page_ids, range(int(tokens[0]), int(tokens[-1]) + 1), key_cache)
                _check_record(records, group, key_codes)
                keys = _keys_of(key_cache, page_ids, tokens, h)
                key_codes[int(records[group]), h] = encode_group(keys.cpu()).to(key_codes.device)


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

    Returns:
        A `GuidedWalk`.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape or a value out of range.
    """
    check_keys(key_cache)
    check_query(query, key_cache)
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
    )
    for b in range(batch):
        start = 0 if seq_starts is None else int(seq_starts[b])
        for h in range(num_kv_heads):
            heads = slice(h * group_size, (h + 1) * group_size)
            seq_len = int(_of_head(seq_lens, b, h, 1))
            window_start = 0 if sliding_window is None else seq_len - sliding_window
            visible = range(max(start, window_start), seq_len)
            if not visible:
                continue
            keys = _estimated_keys(
                key_cache, _of_head(block_table, b, h, 2), key_codes, _of_head(code_table, b, h, 2),
                visible, h,
            )  # fmt: skip
            logits = query[b, heads].double().cpu() @ keys.T
            logits *= 1.0 / math.sqrt(head_dim) if scale is None else scale
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            if alibi_slopes is not None:
                distance = torch.tensor(visible) - (seq_len - 1)
                logits = logits + alibi_slopes[heads, None].double().cpu() * distance
            sinks = None if attn_sinks is None else attn_sinks[heads].double().cpu()
            scores = shares(unit_lse(logits, visible), sinks)
            order, num_pinned = order_units(scores, visible)
            result.walk[b, h, : len(order)] = torch.tensor(order)
            result.walk_lens[b, h], result.num_pinned[b, h] = len(order), num_pinned
            first = visible[0] // UNIT_TOKENS
            mass = scores[torch.tensor(order) - first].double() * (math.log(2) / STEPS)
            result.log_mass[b, h, : len(order)] = mass
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
    fractions = (2.0**31 * 2.0 ** (-torch.arange(STEPS).double() / STEPS)).round().long()
    below = (largest - terms).clamp(max=32 * STEPS)
    mass = (fractions[below % STEPS] >> below // STEPS).sum(-1, keepdim=True)
    total = largest + ((mass.double() / 2.0**31).log2() * STEPS).round().long()
    return (steps - total).amax(0)


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


def _of_head(tensor: Tensor, b: int, h: int, ndim_shared: int) -> Tensor:
    """Return what a tensor `[B, ...]`, or per head `[B, Hkv, ...]`, holds for one head."""
    return (tensor[b] if tensor.ndim == ndim_shared else tensor[b, h]).cpu()


def _keys_of(key_cache: Tensor, page_ids: Tensor, tokens: Tensor, h: int) -> Tensor:
    page_size = key_cache.shape[1]
    pages = page_ids[tokens // page_size].long().to(key_cache.device)
    return key_cache[pages, (tokens % page_size).to(key_cache.device), h]


def _check_record(records: Tensor, group: int, key_codes: Tensor) -> None:
    if not 0 <= records[group] < len(key_codes):
        raise ValueError(
            f"ids in code_table must be from 0 to {len(key_codes) - 1}, got {int(records[group])}"
        )


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
        _check_record(records, group, key_codes)
        record = key_codes[int(records[group]), h].cpu()
        keys = decode_keys(record, key_cache.shape[-1])
        parts.append(keys[max(0, visible.start - group * GROUP_TOKENS) :])
    tail = range(max(visible.start, coded_end), visible.stop)
    if tail:
        check_page_ids(page_ids, tail, key_cache)
        parts.append(_keys_of(key_cache, page_ids, torch.tensor(tail), h).double().cpu())
    return torch.cat(parts)
