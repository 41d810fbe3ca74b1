"""Exact attention over an ``ARTCache``: earlier tokens are gathered from its pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from art_torch.evicted import EvictedTable, Prompt
from art_torch.integrations.transformers.exact import causal_mask, exact_attention
from art_torch.integrations.transformers.layer import ARTLayer
from art_torch.integrations.transformers.masks import info_of

if TYPE_CHECKING:
    from art_torch.integrations.transformers.attention import LayerSettings

__all__ = ["attend_to_prompt", "exact_paged", "why_not_this_mask"]


def attend_to_prompt(
    module: nn.Module,
    settings: LayerSettings,
    layer: ARTLayer,
    query: Tensor,
    new: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    own: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention over a prompt; presses then decide what is stored of it."""
    assert new is not None
    info = info_of(mask)
    key, value = new
    settings.stats.prepare_on_device(settings.layer, key.shape[1], key.device)
    layer.prompt = Prompt(key, value, None if info is None else info.real_tokens())
    return exact_attention(module, query, key, value, mask, own, settings.eager_only)


def why_not_this_mask(mask: Tensor, layer: ARTLayer) -> str | None:
    """Why a mask is more than causal with the padding of the cache; None if it is not."""
    info = info_of(mask)
    if info is None or not info.is_causal:
        return "the attention mask is not a causal mask with padding"
    if not info.agrees_with(layer.table.real_tokens(0, info.start)):
        return "the attention mask hides tokens that are in the cache"
    return None


def exact_paged(
    module: nn.Module,
    settings: LayerSettings,
    layer: ARTLayer,
    query: Tensor,
    new: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    own: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention over all that a cache holds, and new tokens, which it stores.

    Args:
        module: The attention module.
        settings: Of the layer.
        layer: Its cache.
        query: ``[batch, num_q_heads, queries, head_dim]``.
        new: Keys and values of the queries' tokens, ``[batch, num_kv_heads, queries, head_dim]``;
            None where another layer has stored them.
        mask: Of all tokens, evicted ones as well.
        own: Keyword arguments of the model's attention.

    Returns:
        As :func:`exact_attention`.

    Raises:
        RuntimeError: A press has compressed the cache, and the mask is more than causal with
            padding: its columns are tokens of which some are gone.
    """
    if layer.is_evicted:
        assert new is not None  # presses refuse layers that share keys
        key, value, mask = _after_eviction(layer, query, new, mask)
    else:
        key, value, mask = _all_tokens(settings, layer, query, new, mask)
    return exact_attention(module, query, key, value, mask, own, settings.eager_only)


def _all_tokens(
    settings: LayerSettings,
    layer: ARTLayer,
    query: Tensor,
    new: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    info, table = info_of(mask), layer.table
    if new is None:  # another layer has stored these keys and lends them
        assert layer.lent is not None
        key, value = layer.lent
        needs_hiding = table.has_pads
    else:
        key, value = new
        settings.stats.prepare_on_device(settings.layer, key.shape[1], key.device)
        past = layer.history()
        layer.append(key, value, None if info is None else info.real_tokens())
        if past is not None:
            key = torch.cat([past[0], key], dim=2)
            value = torch.cat([past[1], value], dim=2)
        needs_hiding = table.has_pads and past is not None
        if layer.lends:
            layer.lent = key, value
    if needs_hiding:
        mask = _hide_pads(mask, layer, key.shape[2], query.shape[2])
    return key, value, mask


def _hide_pads(mask: Tensor | None, layer: ARTLayer, keys: int, queries: int) -> Tensor:
    """Pads of earlier passes were not stored: hide them, whatever the mask says of them."""
    device, end = layer.table.device, layer.padded_len
    real = layer.table.real_tokens(end - keys, end)
    assert real is not None
    if mask is None:
        mask = causal_mask(queries, keys, layer.table.window, device)
    stored = torch.from_numpy(real.copy()).to(device)
    # A pad as query sees itself, or its softmax would have nothing to sum.
    position = torch.arange(keys, device=device)
    itself = position[None, :] == position[keys - queries :, None]
    stored = stored[:, None, None, :] | itself
    if mask.dtype == torch.bool:
        return mask & stored
    return mask.masked_fill(~stored, torch.finfo(mask.dtype).min)


def _after_eviction(
    layer: ARTLayer, query: Tensor, new: tuple[Tensor, Tensor], mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What a press has left of the prompt, and later tokens; heads may have different ones."""
    why_not = None if mask is None else why_not_this_mask(mask, layer)
    if why_not is not None:
        raise RuntimeError(
            f"a press has compressed this cache, and {why_not}: pass the padding mask of the "
            "prompt, followed by ones"
        )
    info, queries = info_of(mask), query.shape[2]
    assert isinstance(layer.table, EvictedTable)
    assert layer.storage is not None
    past_key, past_value, stored = layer.table.gather(layer.storage)
    layer.append(*new, None if info is None else info.real_tokens())
    own_part = causal_mask(queries, queries, None, query.device)
    if mask is not None:
        # A pad as query sees itself, or its softmax would have nothing to sum.
        itself = torch.eye(queries, dtype=torch.bool, device=query.device)
        own_part = mask[..., -queries:] | itself
    group = query.shape[1] // stored.shape[1]
    stored = stored.repeat_interleave(group, dim=1)[:, :, None].expand(-1, -1, queries, -1)
    mask = torch.cat([stored, own_part.expand(*stored.shape[:3], -1)], dim=3)
    key = torch.cat([past_key, new[0]], dim=2)
    value = torch.cat([past_value, new[1]], dim=2)
    return key, value, mask
