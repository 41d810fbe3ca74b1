"""Argument checks of `art_torch.reference`: the contract without memory layout and autograd."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from art_torch.criterion import Stability

WALKS = ("oldest_first", "recent_first", "sink_recent")


def thresholds_of(criterion: Stability | None, num_kv_heads: int) -> Tensor | None:
    """Return (d_scale, d_direction, patience) of every KV head as float64 `[Hkv, 3]`.

    None stands for `criterion=None`.
    """
    if criterion is None:
        return None
    if isinstance(criterion.patience, bool) or not isinstance(criterion.patience, int):
        raise TypeError(f"patience must be an int, got {criterion.patience!r}")
    _require(criterion.patience >= 1, f"patience must be at least 1, got {criterion.patience}")
    columns = []
    for name in ("d_scale", "d_direction"):
        limit = torch.as_tensor(getattr(criterion, name), dtype=torch.float64)
        _require(
            limit.shape in ((), (num_kv_heads,)),
            f"{name} must be a float or a tensor [{num_kv_heads}], got {list(limit.shape)}",
        )
        _require(bool((limit >= 0).all()), f"{name} must be at least 0, got {limit.tolist()}")
        columns.append(limit.expand(num_kv_heads))
    columns.append(torch.full((num_kv_heads,), float(criterion.patience), dtype=torch.float64))
    return torch.stack(columns, dim=-1)


def check_tensors(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    seq_starts: Tensor | None,
) -> None:
    """Check dtypes, shapes and lengths."""
    _require(query.ndim == 3, f"query must be [B, Hq, D], got {list(query.shape)}")
    _check_cache("key_cache", key_cache)
    _check_cache("value_cache", value_cache)
    check_query(query, key_cache)
    _require_dtype("value_cache", value_cache, key_cache.dtype)
    _require_shape("value_cache", value_cache, [*key_cache.shape[:3], value_cache.shape[-1]])
    check_tables(key_cache, query.shape[0], block_table, seq_lens, seq_starts)


def check_keys(key_cache: Tensor) -> None:
    """Check a cache of keys alone."""
    _check_cache("key_cache", key_cache)
    if not key_cache.dtype.is_floating_point and key_cache.dtype != torch.int8:
        raise TypeError(f"key_cache must have a floating dtype or int8, got {key_cache.dtype}")


def _check_cache(name: str, cache: Tensor) -> None:
    _require(cache.ndim == 4, f"{name} must be [P, page_size, Hkv, D], got {list(cache.shape)}")
    dim = cache.shape[-1]
    _require(
        dim % 8 == 0 and 32 <= dim <= 256,
        f"the last dimension of {name} must be a multiple of 8 from 32 to 256, got {dim}",
    )
    _require(cache.shape[1] > 0, "page_size must be at least 1, got 0")


def check_scale(name: str, scale: Tensor | None, cache_name: str, cache: Tensor) -> None:
    """Check the scales of an int8 cache, which others must not have."""
    is_int8 = cache.dtype == torch.int8
    _require(scale is None or is_int8, f"{name} is for an int8 {cache_name}, got {cache.dtype}")
    _require(scale is not None or not is_int8, f"an int8 {cache_name} needs its {name}, got None")
    if scale is not None:
        _require_dtype(name, scale, torch.float32)
        _require_shape(name, scale, list(cache.shape[:3]))


def check_query(query: Tensor, key_cache: Tensor) -> None:
    """Check a query against its keys."""
    _require(query.ndim == 3, f"query must be [B, Hq, D], got {list(query.shape)}")
    if not query.dtype.is_floating_point:
        raise TypeError(f"query must have a floating dtype, got {query.dtype}")
    if key_cache.dtype != torch.int8:
        _require_dtype("key_cache", key_cache, query.dtype)
    num_q_heads, num_kv_heads = query.shape[1], key_cache.shape[2]
    _require_shape("key_cache", key_cache, [*key_cache.shape[:3], query.shape[2]])
    _require(
        num_kv_heads > 0 and num_q_heads % num_kv_heads == 0,
        f"Hq must be a multiple of Hkv, got {num_q_heads} and {num_kv_heads}",
    )


def check_tables(
    key_cache: Tensor,
    batch: int,
    block_table: Tensor,
    seq_lens: Tensor,
    seq_starts: Tensor | None,
) -> None:
    """Check block tables and lengths."""
    page_size, num_kv_heads = key_cache.shape[1:3]
    max_pages = block_table.shape[-1] if block_table.ndim else 0
    _require_int32("block_table", block_table, [batch, max_pages], [batch, num_kv_heads, max_pages])
    _require_int32("seq_lens", seq_lens, [batch], [batch, num_kv_heads])
    _require_range("seq_lens", seq_lens, 0, max_pages * page_size)
    starts = torch.zeros(batch, dtype=torch.int32) if seq_starts is None else seq_starts
    _require_int32("seq_starts", starts, [batch])
    _require_range("seq_starts", starts, 0, 2**31 - 1)


def check_codes(
    key_codes: Tensor,
    code_table: Tensor,
    key_cache: Tensor,
    block_table: Tensor,
    record_bytes: int,
    coded_lens: Tensor | None,
) -> None:
    """Check a pool of key codes and its table."""
    batch, max_pages = block_table.shape[0], block_table.shape[-1]
    page_size, num_kv_heads = key_cache.shape[1:3]
    num_code_pages = key_codes.shape[0] if key_codes.ndim else 0
    _require_dtype("key_codes", key_codes, torch.uint8)
    _require_shape("key_codes", key_codes, [num_code_pages, num_kv_heads, record_bytes])
    width = code_table.shape[-1] if code_table.ndim else 0
    _require_int32("code_table", code_table, [batch, width], [batch, num_kv_heads, width])
    needed = max_pages * page_size // 64
    _require(width >= needed, f"code_table must have at least {needed} entries a row, got {width}")
    if coded_lens is not None:
        _require_int32("coded_lens", coded_lens, [batch], [batch, num_kv_heads])
        _require_range("coded_lens", coded_lens, 0, 2**31 - 1)


def check_page_ids(page_ids: Tensor, visible: range, key_cache: Tensor) -> None:
    """Check the entries of a block table `[max_pages]` whose pages hold a visible token."""
    num_pages, page_size = key_cache.shape[:2]
    if visible:
        used = page_ids[visible[0] // page_size : visible[-1] // page_size + 1]
        _require_range("page ids in block_table", used, 0, num_pages - 1)


def check_options(
    query: Tensor,
    seq_lens: Tensor,
    scale: float | None,
    softcap: float,
    attn_sinks: Tensor | None,
    sliding_window: int | None,
    alibi_slopes: Tensor | None,
) -> None:
    """Check everything that shapes the logits."""
    _require(scale is None or math.isfinite(scale), f"scale must be finite, got {scale}")
    _require(
        math.isfinite(softcap) and softcap >= 0, f"softcap must be finite and >= 0, got {softcap}"
    )
    _require(
        sliding_window is None or sliding_window >= 1,
        f"sliding_window must be None or at least 1, got {sliding_window}",
    )
    for name, per_head in (("attn_sinks", attn_sinks), ("alibi_slopes", alibi_slopes)):
        if per_head is not None:
            _require_shape(name, per_head, [query.shape[1]])
            if not per_head.dtype.is_floating_point:
                raise TypeError(f"{name} must have a floating dtype, got {per_head.dtype}")
    _require(
        seq_lens.ndim == 1 or (alibi_slopes is None and sliding_window is None),
        "alibi_slopes and sliding_window need seq_lens [B]: with per-head seq_lens [B, Hkv] "
        "the index of a token is not its position",
    )


def check_walk_name(name: str) -> None:
    """Check the name of a built-in walk."""
    _require(
        name in WALKS,
        f"walk must be {', '.join(map(repr, WALKS))}, or int32 unit numbers [B, Hkv, max_units], "
        "which reference.guided_walk finds for a guided walk (key codes are made by "
        f"reference.encode_keys), got {name!r}",
    )


def check_walk(
    block_table: Tensor,
    value_cache: Tensor,
    walk: str | Tensor,
    walk_lens: Tensor | None,
    num_pinned: int | Tensor | None,
    block_size: int,
    unit_size: int,
) -> None:
    """Check units, blocks, pinned units and an explicit walk."""
    batch, max_pages = block_table.shape[0], block_table.shape[-1]
    page_size, num_kv_heads = value_cache.shape[1:3]
    _require(unit_size >= 1, f"unit_size must be at least 1, got {unit_size}")
    _require(
        page_size % unit_size == 0 or max_pages <= 1,
        f"unit_size must divide page_size {page_size} unless max_pages is 1, got {unit_size}",
    )
    _require(
        block_size >= unit_size and block_size % unit_size == 0,
        f"block_size must be a multiple of unit_size {unit_size}, got {block_size}",
    )
    if isinstance(num_pinned, Tensor):
        _require_int32("num_pinned", num_pinned, [batch, num_kv_heads])
        _require_range("num_pinned", num_pinned, 0, 2**31 - 1)
    else:
        _require(
            num_pinned is None or num_pinned >= 0,
            f"num_pinned must be at least 0, got {num_pinned}",
        )
    if isinstance(walk, str):
        check_walk_name(walk)
        _require(walk_lens is None, f"walk_lens needs an explicit walk, got walk={walk!r}")
        return
    _require(walk_lens is not None, "an explicit walk needs walk_lens, got None")
    assert walk_lens is not None
    max_units = walk.shape[-1] if walk.ndim else 0
    _require_int32("walk", walk, [batch, num_kv_heads, max_units])
    _require_int32("walk_lens", walk_lens, [batch, num_kv_heads])
    _require_range("walk_lens", walk_lens, 0, max_units)
    for b in range(batch):
        for h in range(num_kv_heads):
            listed = walk[b, h, : walk_lens[b, h]]
            _require_range("walk", listed, 0, math.ceil(max_pages * page_size / unit_size) - 1)
            _require(
                len(set(listed.tolist())) == len(listed),
                f"walk must name a unit once, got {listed.tolist()} for sequence {b}, KV head {h}",
            )


def check_rest(query: Tensor, walk: str | Tensor, log_rest: Tensor | None, is_needed: bool) -> None:
    """Check what is said to be left after each entry of a walk."""
    if not is_needed:
        _require(log_rest is None, "log_rest needs a criterion that uses it: ResidualMass")
        return
    if isinstance(walk, str):
        raise ValueError(f"ResidualMass needs an explicit walk and its log_rest, got walk={walk!r}")
    if log_rest is None:
        raise ValueError("ResidualMass with an explicit walk needs log_rest, got None")
    _require_shape("log_rest", log_rest, [*query.shape[:2], walk.shape[-1]])
    if not log_rest.dtype.is_floating_point:
        raise TypeError(f"log_rest must have a floating dtype, got {log_rest.dtype}")


def check_append_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> None:
    """Check the arguments of `append_kv`."""
    _require(
        slot_mapping.ndim in (1, 2),
        f"slot_mapping must be [T] or [T, Hkv], got {list(slot_mapping.shape)}",
    )
    for name, new, cache, scale in (
        ("key", key, key_cache, key_scale),
        ("value", value, value_cache, value_scale),
    ):
        _require(
            cache.ndim == 4, f"{name}_cache must be [P, page_size, Hkv, D], got {list(cache.shape)}"
        )
        check_scale(f"{name}_scale", scale, f"{name}_cache", cache)
        if scale is None:
            _require_dtype(name, new, cache.dtype)
        elif not new.dtype.is_floating_point:
            raise TypeError(f"{name} must have a floating dtype, got {new.dtype}")
        _require_shape(name, new, [slot_mapping.shape[0], *cache.shape[2:]])
    _require_shape("value_cache", value_cache, [*key_cache.shape[:3], value_cache.shape[-1]])
    _require_dtype("slot_mapping", slot_mapping, torch.int64)
    num_pages, page_size, num_kv_heads, _ = key_cache.shape
    _require_shape("slot_mapping", slot_mapping, [key.shape[0]], [key.shape[0], num_kv_heads])
    _require_range("slot_mapping", slot_mapping, -1, num_pages * page_size - 1)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")


def _require_shape(name: str, tensor: Tensor, *allowed: list[int]) -> None:
    _require(
        list(tensor.shape) in allowed,
        f"{name} must be {' or '.join(map(str, allowed))}, got {list(tensor.shape)}",
    )


def _require_int32(name: str, tensor: Tensor, *allowed: list[int]) -> None:
    _require_dtype(name, tensor, torch.int32)
    _require_shape(name, tensor, *allowed)


def _require_range(name: str, tensor: Tensor, lowest: int, highest: int) -> None:
    for bad in tensor[(tensor < lowest) | (tensor > highest)].tolist()[:1]:
        raise ValueError(f"{name} must be from {lowest} to {highest}, got {bad}")
