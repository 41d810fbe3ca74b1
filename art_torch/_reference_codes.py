"""Key codes in plain PyTorch, as `docs/key_codes.md` describes them.

A *group* is 64 consecutive tokens of one KV head, aligned at token 0; once complete, its keys are
also kept in two bits an element. Re-exported by `art_torch.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from art_torch._reference_checks import (
    check_codes,
    check_keys,
    check_page_ids,
    check_scale,
    check_tables,
)
from art_torch._reference_rows import dequantize

GROUP_TOKENS = 64
UNIT_TOKENS = 16
MAX_CODE = 3
LARGEST_HALF = 65504.0


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
    spread = highest - lowest
    return (lowest + spread * 0.0625).half(), (spread * 0.875 / MAX_CODE).half()


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
    key_scale: Tensor | None = None,
) -> None:
    """Write the codes of all groups that have become complete, in place.

    Args:
        key_cache: `[P, page_size, Hkv, D]`; of int8, the codes are of its keys in float32.
        block_table: int32 `[B, max_pages]` or `[B, Hkv, max_pages]`, page ids.
        seq_lens: int32 `[B]` or `[B, Hkv]`, tokens in the cache.
        key_codes: uint8 `[num_code_pages, Hkv, record_bytes(D)]`, written.
        code_table: int32 `[B, max_groups]` or `[B, Hkv, max_groups]`, the code page of each group.
        coded_lens: int32 `[B]` or `[B, Hkv]`, tokens that were in the cache when this was called
            last, default 0: groups that were complete then are left as they are.
        key_scale: float32 `[P, page_size, Hkv]`, of an int8 `key_cache` and only there.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape or a value out of range.
    """
    check_keys(key_cache)
    check_scale("key_scale", key_scale, "key_cache", key_cache)
    if key_scale is not None:
        key_cache = dequantize(key_cache, key_scale, torch.float32)
    batch = seq_lens.shape[0] if seq_lens.ndim else 0
    num_kv_heads, head_dim = key_cache.shape[2:]
    check_tables(key_cache, batch, block_table, seq_lens, None)
    check_codes(key_codes, code_table, key_cache, block_table, record_bytes(head_dim), coded_lens)
    for b in range(batch):
        for h in range(num_kv_heads):
            seq_len, page_ids = of_head(seq_lens, b, h, 1), of_head(block_table, b, h, 2)
            coded = 0 if coded_lens is None else int(of_head(coded_lens, b, h, 1))
            records = of_head(code_table, b, h, 2)
            for group in range(coded // GROUP_TOKENS, int(seq_len) // GROUP_TOKENS):
                tokens = torch.arange(group * GROUP_TOKENS, (group + 1) * GROUP_TOKENS)
                check_page_ids(page_ids, range(int(tokens[0]), int(tokens[-1]) + 1), key_cache)
                check_record(records, group, key_codes)
                keys = keys_of(key_cache, page_ids, tokens, h)
                key_codes[int(records[group]), h] = encode_group(keys.cpu()).to(key_codes.device)


def of_head(tensor: Tensor, b: int, h: int, ndim_shared: int) -> Tensor:
    """Return what a tensor `[B, ...]`, or per head `[B, Hkv, ...]`, holds for one head."""
    return (tensor[b] if tensor.ndim == ndim_shared else tensor[b, h]).cpu()


def keys_of(key_cache: Tensor, page_ids: Tensor, tokens: Tensor, h: int) -> Tensor:
    """Return the keys `[n, D]` of some tokens of one head."""
    page_size = key_cache.shape[1]
    pages = page_ids[tokens // page_size].long().to(key_cache.device)
    return key_cache[pages, (tokens % page_size).to(key_cache.device), h]


def check_record(records: Tensor, group: int, key_codes: Tensor) -> None:
    """Check the entry of a group in a code table `[max_groups]`."""
    if not 0 <= records[group] < len(key_codes):
        raise ValueError(
            f"ids in code_table must be from 0 to {len(key_codes) - 1}, got {int(records[group])}"
        )
