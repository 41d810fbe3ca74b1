"""The guided walk: two-bit codes of the keys say where the softmax mass is.

Every 64 tokens of a KV head, once complete, are also kept in two bits per key element, about 8 % of
a 16-bit KV cache. At each step the logits are estimated from these codes, and the cache is then
read from the heaviest unit of 16 tokens down. ``docs/key_codes.md`` describes the format.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from art_torch._operators import (
    as_float32,
    call,
    check_one_device,
    check_tensors,
    register,
    window_argument,
)

# Of the bytes that encode_keys writes (docs/key_codes.md). Records do not carry it: whoever stores
# them keeps it beside them, and encodes the keys again where it is another one.
KEY_CODES_VERSION = 1

GROUP_TOKENS = 64
UNIT_TOKENS = 16
_ENCODE_TENSORS = ("key_cache", "block_table", "seq_lens", "key_codes", "code_table")

# Arguments of `guided_walk` that `decode_attention` has as well: tensors, and what makes logits.
GUIDED_TENSORS = ("query", *_ENCODE_TENSORS)
LOGIT_ARGUMENTS = (
    "scale", "softcap", "attn_sinks", "sliding_window", "alibi_slopes", "seq_starts", "key_scale",
)  # fmt: skip


class GuidedWalk(NamedTuple):
    """What one call of :func:`guided_walk` returns.

    All but ``log_mass`` are arguments of :func:`decode_attention`; ``log_rest`` is for
    :class:`ResidualMass`.

    Attributes:
        walk: ``[batch, num_kv_heads, max_units]`` int32, units of 16 tokens in the order to read
            them, then -1. ``max_units`` is ``max_pages * page_size / 16``, rounded up.
        walk_lens: ``[batch, num_kv_heads]`` int32, units in the walk: all with a visible token.
        num_pinned: ``[batch, num_kv_heads]`` int32, units at its start that are always read: the
            first four, the last 64 tokens that have codes and the tokens after them.
        log_mass: ``[batch, num_kv_heads, max_units]`` float32, natural logarithm of the estimated
            share of the softmax mass, in walk order, then ``-inf``. The largest over the query
            heads that share the KV head; a multiple of ``ln(2) / 64``.
        log_rest: ``[batch, num_q_heads, max_units]`` float32, natural logarithm of the estimated
            sum of exponentials, as in ``lse`` of :func:`decode_attention`, over all units that come
            after entry i of the walk, for each query head; ``-inf`` after the last one. A multiple
            of ``ln(2) / 64``. ``[batch, num_q_heads, 0]`` unless it was asked for.
    """

    walk: Tensor
    walk_lens: Tensor
    num_pinned: Tensor
    log_mass: Tensor
    log_rest: Tensor


def require_guided_device(device: torch.device) -> None:
    """Refuses devices that have no kernels for key codes.

    Raises:
        NotImplementedError: It is neither the CPU nor an NVIDIA GPU.
    """
    if device.type not in ("cpu", "cuda"):
        raise NotImplementedError(
            f"the guided walk runs on CPUs and NVIDIA GPUs, got {device}: use another walk there"
        )


def key_code_bytes(head_dim: int) -> int:
    """Returns the size of a record: the codes of 64 tokens of one KV head.

    A pool of records is ``torch.zeros(num_code_pages, num_kv_heads, key_code_bytes(head_dim),
    dtype=torch.uint8)``.

    Raises:
        ValueError: ``head_dim`` is no multiple of 8 from 32 to 256.
    """
    if head_dim % 8 or not 32 <= head_dim <= 256:
        raise ValueError(
            f"key_code_bytes: head_dim must be a multiple of 8 from 32 to 256, got {head_dim}"
        )
    return 20 * (-(-head_dim // 16) * 16)


def encode_keys(
    key_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    key_codes: Tensor,
    code_table: Tensor,
    *,
    coded_lens: Tensor | None = None,
    checked: bool | None = None,
    key_scale: Tensor | None = None,
) -> None:
    """Writes the codes of all groups of 64 tokens that have become complete, in place.

    Call it after tokens were appended, with ``coded_lens`` the lengths before; or once for a cache
    that is there already. Codes of tokens that were removed are overwritten when their group is
    complete again. The bytes are the same on every device.

    Args:
        key_cache: ``[num_pages, page_size, num_kv_heads, head_dim]``, as in
            :func:`decode_attention`.
        block_table: ``[batch, max_pages]`` or ``[batch, num_kv_heads, max_pages]`` int32 page ids.
            Only pages of the groups that are encoded are looked up.
        seq_lens: ``[batch]`` or ``[batch, num_kv_heads]`` int32, tokens present.
        key_codes: ``[num_code_pages, num_kv_heads, key_code_bytes(head_dim)]`` uint8, written.
            Records are contiguous and start at multiples of 16 bytes.
        code_table: ``[batch, max_groups]`` or ``[batch, num_kv_heads, max_groups]`` int32: the code
            page of each group, in the order of tokens; at least ``max_pages * page_size // 64`` a
            row. Sequences may share a code page when they share all 64 tokens.
        coded_lens: ``[batch]`` or ``[batch, num_kv_heads]`` int32, default 0: groups complete in
            this many tokens are left as they are.
        checked: Also checks what costs time on a GPU: the indices. On the CPU they always are.
        key_scale: ``[num_pages, page_size, num_kv_heads]`` float32, of an int8 ``key_cache`` and
            only there. Encoded is the product of scale and code, in float32.

    Raises:
        ValueError: A shape, size or index is out of range.
        TypeError: A dtype is wrong.
    """
    tensors = (key_cache, block_table, seq_lens, key_codes, code_table)
    check_tensors("encode_keys", _ENCODE_TENSORS, tensors)
    options = dict(coded_lens=coded_lens, checked=checked, key_scale=key_scale)
    call(torch.ops.art.encode_keys.default, *tensors, **options)


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
    checked: bool | None = None,
    rest: bool = False,
    key_scale: Tensor | None = None,
) -> GuidedWalk:
    """Orders a cache by the softmax mass that the codes of its keys say it has.

    Logits are estimated from the codes, and exact for the tokens after the last complete group.
    Pinned units come first, in ascending order; the others follow by descending share, to 1/8 of a
    power of two. ``decode_attention(..., walk="guided")`` calls this.

    Args:
        query: ``[batch, num_q_heads, head_dim]``, as in :func:`decode_attention`.
        key_cache: ``[num_pages, page_size, num_kv_heads, head_dim]``; ``page_size`` a multiple of
            16 unless there is one page per sequence. Only tokens after the last complete group are
            read.
        block_table: ``[batch, max_pages]`` or ``[batch, num_kv_heads, max_pages]`` int32 page ids.
        seq_lens: ``[batch]`` or ``[batch, num_kv_heads]`` int32, tokens present.
        key_codes: The codes of all complete groups with a visible token, see :func:`encode_keys`.
        code_table: Where they are, see :func:`encode_keys`; entries of other groups are never read.
        scale: Factor on the logits, default ``head_dim ** -0.5``.
        softcap: ``c * tanh(logit / c)`` when positive, 0 for none.
        attn_sinks: ``[num_q_heads]`` logits that join the total.
        sliding_window: Visible tokens, the query's own included; None for all.
        alibi_slopes: ``[num_q_heads]``; adds ``slope * (position - last position)``.
        seq_starts: ``[batch]`` int32, first visible token (left padding).
        checked: Also checks what costs time on a GPU: the indices. On the CPU they always are.
        rest: Also estimates what is left after each entry of the walk: ``log_rest``.
        key_scale: ``[num_pages, page_size, num_kv_heads]`` float32, of an int8 ``key_cache`` and
            only there.

    Returns:
        :class:`GuidedWalk`.

    Raises:
        ValueError: A shape, size, index or number is out of range.
        TypeError: A dtype is wrong.
    """
    tensors = (query, key_cache, block_table, seq_lens, key_codes, code_table)
    check_tensors("guided_walk", GUIDED_TENSORS, tensors)
    results = call(
        torch.ops.art.guided_walk.default,
        *tensors,
        scale=None if scale is None else float(scale),
        softcap=softcap,
        attn_sinks=as_float32(attn_sinks),
        sliding_window=window_argument("guided_walk", sliding_window),
        alibi_slopes=as_float32(alibi_slopes),
        seq_starts=seq_starts,
        checked=checked,
        rest=rest,
        key_scale=key_scale,
    )
    return GuidedWalk(*results)


def _encode_keys_fake(*tensors: Tensor, **_: Any) -> None:
    check_one_device("encode_keys", _ENCODE_TENSORS, tensors)


def _guided_walk_fake(
    query: Tensor,
    key_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    key_codes: Tensor,
    code_table: Tensor,
    *,
    rest: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = (query, key_cache, block_table, seq_lens, key_codes, code_table)
    check_one_device("guided_walk", GUIDED_TENSORS, tensors)
    per_head = (query.shape[0], key_cache.shape[2])
    capacity = block_table.shape[-1] * key_cache.shape[1]
    max_units = (capacity + UNIT_TOKENS - 1) // UNIT_TOKENS
    per_unit = (*per_head, max_units)
    return (
        query.new_empty(per_unit, dtype=torch.int32),
        query.new_empty(per_head, dtype=torch.int32),
        query.new_empty(per_head, dtype=torch.int32),
        query.new_empty(per_unit, dtype=torch.float32),
        query.new_empty((*query.shape[:2], max_units if rest else 0), dtype=torch.float32),
    )


register(
    {
        torch.ops.art.encode_keys.default: _encode_keys_fake,
        torch.ops.art.guided_walk.default: _guided_walk_fake,
        torch.ops.art._guided_walk_split.default: _guided_walk_fake,
    }
)
