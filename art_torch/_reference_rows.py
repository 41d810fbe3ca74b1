"""Rows of a cache in plain PyTorch: how they are written, and int8 rows. See `art_torch.reference`.

A *row* is what one token of one KV head has in a cache of keys or of values. In an int8 cache it is
codes from -127 to 127 times a scale of its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from art_torch._reference_checks import check_append_kv

MAX_ROW_CODE = 127


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes, int8 `[..., D]`, and scales, float32 `[...]`, of rows `[..., D]`.

    Computed in float32, operation by operation: every implementation writes these very bytes. Ties
    round to even. A row with an infinity or a NaN has the scale NaN and no codes.
    """
    x = rows.float()
    scale = x.abs().amax(-1) / MAX_ROW_CODE
    scale = scale.where(scale.isfinite(), math.nan)
    codes = (x / scale[..., None]).round().clamp(-MAX_ROW_CODE, MAX_ROW_CODE)
    return codes.where(scale[..., None] > 0, 0.0).to(torch.int8), scale


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the rows `[..., D]` that int8 codes `[..., D]` and scales `[...]` stand for.

    Exact in float64, which is what attention means by them. Key codes are of rows in float32.
    """
    return codes.to(dtype) * scale.to(dtype)[..., None]


@torch.no_grad()
def append_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> None:
    """Write new tokens into the pages of a cache, in place.

    Args:
        key: `[T, Hkv, D]`.
        value: `[T, Hkv, Dv]`.
        key_cache: `[P, page_size, Hkv, D]`, the dtype of `key`, or int8: rows are then quantized.
        value_cache: `[P, page_size, Hkv, Dv]`, the dtype of `value`, or int8 as well.
        slot_mapping: int64 `[T]`, or `[T, Hkv]` per head: `page * page_size + offset`; -1 skips the
            token. A slot named twice is undefined.
        key_scale: float32 `[P, page_size, Hkv]`, of an int8 `key_cache` and only there.
        value_scale: likewise.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape or a slot is out of range; an int8 cache lacks
            its scales, or another one has some.
    """
    check_append_kv(key, value, key_cache, value_cache, slot_mapping, key_scale, value_scale)
    page_size, num_kv_heads = key_cache.shape[1:3]
    for h in range(num_kv_heads):
        slots = slot_mapping if slot_mapping.ndim == 1 else slot_mapping[:, h]
        kept = slots != -1
        page, offset = slots[kept] // page_size, slots[kept] % page_size
        for new, cache, scale in ((key, key_cache, key_scale), (value, value_cache, value_scale)):
            rows = new[kept, h]
            if scale is not None:
                rows, scale[:, :, h][page, offset] = quantize(rows)
            cache[:, :, h][page, offset] = rows
