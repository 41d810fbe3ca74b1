"""The operators: decode attention over a paged KV cache, and writing to that cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from art_torch._decode_arguments import (
    checked_rules,
    criterion_arguments,
    guided_codes,
    rest_arguments,
    walk_arguments,
)
from art_torch._operators import (
    as_float32,
    call,
    check_one_device,
    check_tensors,
    register,
    window_argument,
)
from art_torch.criterion import Criterion
from art_torch.guided import guided_walk

_DECODE_TENSORS = ("query", "key_cache", "value_cache", "block_table", "seq_lens")
_APPEND_TENSORS = ("key", "value", "key_cache", "value_cache", "slot_mapping")


# Of the operator. Every argument that is passed costs 0.25 us, as much as a short row of keys.
_DEFAULTS = {
    "softcap": 0.0,
    "sliding_window": 0,
    "block_size": 64,
    "unit_size": 16,
    "batch_invariant": False,
    "criterion": 0,
    "walk_order": "sink_recent",
}


def _without_defaults(**arguments: Any) -> dict[str, Any]:
    """Leaves out what the operator assumes anyway."""
    return {
        name: value
        for name, value in arguments.items()
        if value is not None and (name not in _DEFAULTS or value != _DEFAULTS[name])
    }


class DecodeResult(NamedTuple):
    """What one call of :func:`decode_attention` returns.

    Attributes:
        out: ``[batch, num_q_heads, value_dim]``, dtype of the query.
        lse: ``[batch, num_q_heads]`` float32. Natural logarithm of the sum of exponentials over
            the tokens read, attention sinks excluded; ``-inf`` where nothing was read.
        tokens_read: ``[batch, num_kv_heads]`` int32. Visible tokens that were used.
        stop_block: ``[batch, num_kv_heads]`` int32. Index of the block after which the criterion
            stopped reading (also when it is the last one), -1 where it never did.
    """

    out: Tensor
    lse: Tensor
    tokens_read: Tensor
    stop_block: Tensor


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
    key_codes: Tensor | None = None,
    code_table: Tensor | None = None,
    log_rest: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    batch_invariant: bool = False,
    checked: bool | None = None,
    out: DecodeResult | None = None,
) -> DecodeResult:
    """Attention of one new token per sequence over its paged KV cache, read until it settles.

    The cache is walked in *units* of ``unit_size`` tokens. ``num_pinned`` units are always read;
    after them the output is compared before and after every *block* of ``block_size`` tokens, and
    ``criterion`` decides whether to go on. Without a criterion the result is exact attention over
    the walk. :mod:`art_torch.reference` is the same contract in plain float64 PyTorch.

    Args:
        query: ``[batch, num_q_heads, head_dim]``, float32, float16 or bfloat16; ``head_dim`` a
            multiple of 8 from 32 to 256, its dimension contiguous.
        key_cache: ``[num_pages, page_size, num_kv_heads, head_dim]``, dtype of the query or, on the
            CPU, int8; any strides with either the last or the token dimension contiguous;
            ``num_kv_heads`` divides ``num_q_heads``.
        value_cache: ``[num_pages, page_size, num_kv_heads, value_dim]``, dtype of ``key_cache``,
            last dimension contiguous; ``value_dim`` a multiple of 8 from 32 to 256.
        block_table: ``[batch, max_pages]`` or ``[batch, num_kv_heads, max_pages]`` int32 page ids.
            Entries of pages without a visible token are never read.
        seq_lens: ``[batch]`` or ``[batch, num_kv_heads]`` int32, tokens present.
        criterion: :class:`~art_torch.Stability`, :class:`~art_torch.ResidualMass` (with a guided or
            an explicit walk), both joined by ``|`` or ``&``, or None to read the whole walk.
        walk: ``"sink_recent"`` (the first 64 tokens, then from the newest backwards),
            ``"recent_first"``, ``"oldest_first"``, ``"guided"`` (the order that
            :func:`guided_walk` finds; needs ``key_codes`` and ``code_table``), or int32 unit
            numbers ``[batch, num_kv_heads, max_units]`` (token // ``unit_size``, each at most
            once); units left out are not attended.
        walk_lens: ``[batch, num_kv_heads]`` int32, entries used of an explicit ``walk``.
        num_pinned: Units at the start of the walk that form the starting output: an int or int32
            ``[batch, num_kv_heads]``. Default: first and last 64 tokens for ``"sink_recent"``,
            otherwise none (the first block is then the starting output). The guided walk brings
            its own.
        block_size: Tokens between two comparisons, a multiple of ``unit_size``.
        unit_size: Tokens per unit; divides ``page_size`` (with one page per sequence, any size).
        scale: Factor on the logits, default ``head_dim ** -0.5``.
        softcap: ``c * tanh(logit / c)`` when positive, 0 for none.
        attn_sinks: ``[num_q_heads]`` logits that join the softmax denominator without a value.
        sliding_window: Visible tokens, the query's own included; None for all.
        alibi_slopes: ``[num_q_heads]``; adds ``slope * (position - last position)``.
        seq_starts: ``[batch]`` int32, first visible token (left padding).
        key_codes: Codes of the keys, for the guided walk only, see :func:`encode_keys`.
        code_table: Where the codes of each 64 tokens are, see :func:`encode_keys`.
        log_rest: ``[batch, num_q_heads, max_units]``, for ``ResidualMass`` with an explicit
            ``walk``: natural logarithm of the sum of exponentials, as in ``lse``, over all that the
            walk has after its entry i; ``-inf`` for nothing. What counts after a block is the value
            at the entry of its last unit; entries without a visible token, which are dropped, and
            those from ``walk_lens`` on may hold anything. The guided walk brings its own; other
            criteria refuse it.
        key_scale: ``[num_pages, page_size, num_kv_heads]`` float32, any strides; of an int8
            ``key_cache`` and only there. A key is its codes times the scale of its token and head,
            as :func:`append_kv` writes them.
        value_scale: Likewise.
        batch_invariant: The bits of a sequence's result do not depend on the batch. On the CPU
            this is always so; on a GPU it costs a few percent.
        checked: Also checks what costs time. On the CPU that is units listed twice. On a GPU it is
            all that tensors hold, lengths, page ids, walks, pinned units and thresholds, which
            nobody looks at otherwise: the call then waits for the device. Default: whether the
            environment variable ``ART_CHECKED`` is 1.
        out: Preallocated contiguous results to write to.

    Returns:
        :class:`DecodeResult`; ``out`` itself when it was given.

    Raises:
        ValueError: A shape, size, index or number is out of range; what is in tensors on a GPU
            counts with ``checked`` only.
        TypeError: A dtype or an argument's type is wrong.
        RuntimeError: ``ART_CPU`` or ``ART_CUDA`` names no kernels that run here, or the GPU fails.

    Source: Attention Run-time Termination, arXiv 2606.00024, with walks of our own.
    """
    tensors = (query, key_cache, value_cache, block_table, seq_lens)
    check_tensors("decode_attention", _DECODE_TENSORS, tensors)
    rules = checked_rules(criterion)
    logits: dict[str, Any] = dict(
        scale=None if scale is None else float(scale),
        softcap=softcap,
        attn_sinks=as_float32(attn_sinks),
        alibi_slopes=as_float32(alibi_slopes),
        seq_starts=seq_starts,
    )
    scales = dict(key_scale=key_scale, value_scale=value_scale)
    is_guided = isinstance(walk, str) and walk == "guided"
    if is_guided:
        codes = guided_codes(key_codes, code_table, walk_lens, num_pinned, log_rest, unit_size)
        rest = rules.residual_mass is not None
        walk, walk_lens, num_pinned, _, log_rest = guided_walk(
            query, key_cache, block_table, seq_lens, *codes, **logits,
            sliding_window=sliding_window, checked=checked, rest=rest, key_scale=key_scale,
        )  # fmt: skip
        log_rest = log_rest if rest else None
    elif key_codes is not None or code_table is not None:
        got = repr(walk) if isinstance(walk, str) else type(walk).__name__
        raise ValueError(
            "decode_attention: key_codes and code_table must only be given with "
            f'walk="guided", got walk={got}'
        )
    arguments = _without_defaults(
        **logits,
        **scales,
        sliding_window=window_argument("decode_attention", sliding_window),
        walk_lens=walk_lens,
        block_size=block_size,
        unit_size=unit_size,
        batch_invariant=batch_invariant,
        checked=checked,
        **criterion_arguments(rules, key_cache),
        **rest_arguments(rules, walk, log_rest),
        **walk_arguments(walk, num_pinned, is_guided),
    )
    if out is None:
        return DecodeResult(*call(torch.ops.art.decode_attention.default, *tensors, **arguments))
    out = DecodeResult(*out)
    call(torch.ops.art.decode_attention.out, *tensors, **arguments, **out._asdict())
    return out


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
    """Writes new tokens into a paged KV cache, in place.

    Args:
        key: ``[tokens, num_kv_heads, head_dim]``.
        value: ``[tokens, num_kv_heads, value_dim]``.
        key_cache: ``[num_pages, page_size, num_kv_heads, head_dim]``, dtype of ``key``, or on the
            CPU int8: rows of float32, float16 or bfloat16 are then rounded to the nearest of 255
            multiples of a scale of their own, 1/127 of their largest magnitude. The bytes are those
            of :func:`art_torch.reference.quantize`.
        value_cache: ``[num_pages, page_size, num_kv_heads, value_dim]``, dtype of ``value``, or
            int8 likewise.
        slot_mapping: ``[tokens]`` or ``[tokens, num_kv_heads]`` int64: page * page_size + offset
            of each token, -1 to skip it. Two tokens with one slot are undefined.
        key_scale: ``[num_pages, page_size, num_kv_heads]`` float32, written; of an int8
            ``key_cache`` and only there.
        value_scale: Likewise.

    Raises:
        ValueError: A shape or a slot is out of range (slots on a GPU are looked at only where the
            environment variable ``ART_CHECKED`` is 1); an int8 cache lacks its scales, or another
            one has some.
        TypeError: A dtype is wrong.
    """
    tensors = (key, value, key_cache, value_cache, slot_mapping)
    check_tensors("append_kv", _APPEND_TENSORS, tensors)
    scales = dict(key_scale=key_scale, value_scale=value_scale)
    call(torch.ops.art.append_kv.default, *tensors, **scales)


def _decode_attention_fake(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = (query, key_cache, value_cache, block_table, seq_lens)
    check_one_device("decode_attention", _DECODE_TENSORS, tensors)
    batch, num_q_heads = query.shape[0], query.shape[1]
    per_head = (batch, key_cache.shape[2])
    return (
        query.new_empty((batch, num_q_heads, value_cache.shape[3])),
        query.new_empty((batch, num_q_heads), dtype=torch.float32),
        query.new_empty(per_head, dtype=torch.int32),
        query.new_empty(per_head, dtype=torch.int32),
    )


def _decode_attention_out_fake(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *_: Any,
    **__: Any,
) -> None:
    tensors = (query, key_cache, value_cache, block_table, seq_lens)
    check_one_device("decode_attention", _DECODE_TENSORS, tensors)


def _append_kv_fake(*tensors: Tensor, **_: Any) -> None:
    check_one_device("append_kv", _APPEND_TENSORS, tensors)


register(
    {
        torch.ops.art.decode_attention.default: _decode_attention_fake,
        torch.ops.art.decode_attention.out: _decode_attention_out_fake,
        torch.ops.art._decode_attention_split.default: _decode_attention_fake,
        torch.ops.art.append_kv.default: _append_kv_fake,
    }
)
