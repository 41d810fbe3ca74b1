"""Exact attention over an ``ARTCache`` that a press compresses, or has compressed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from art_torch.integrations.transformers.exact import causal_mask, exact_attention
from art_torch.integrations.transformers.layer import ARTLayer, Prompt
from art_torch.integrations.transformers.masks import info_of

if TYPE_CHECKING:
    from art_torch.integrations.transformers.attention import LayerSettings

__all__ = ["attend_to_prompt", "exact_evicted"]


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


def exact_evicted(
    module: nn.Module,
    settings: LayerSettings,
    layer: ARTLayer,
    query: Tensor,
    new: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    own: dict[str, Any],
    why_not: str | None,
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention over what a press has left of the prompt, and later tokens.

    Args:
        module: The attention module.
        settings: Of the layer.
        layer: Its cache.
        query: ``[batch, num_q_heads, queries, head_dim]``.
        new: Keys and values of the queries' tokens, ``[batch, num_kv_heads, queries, head_dim]``.
        mask: Of all tokens, evicted ones as well.
        own: Keyword arguments of the model's attention.
        why_not: Why the mask is more than causal with padding; None if it is not.

    Returns:
        As :func:`exact_attention`.

    Raises:
        RuntimeError: The mask is more than that: its columns are tokens of which some are gone.
    """
    if why_not is not None:
        raise RuntimeError(
            f"a press has compressed this cache, and {why_not}: pass the padding mask of the "
            "prompt, followed by ones"
        )
    assert new is not None  # presses refuse layers that share keys
    info, queries = info_of(mask), query.shape[2]
    past_key, past_value, stored = layer.stored()
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
    return exact_attention(module, query, key, value, mask, own, settings.eager_only)
