"""Exact attention as the model itself would compute it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

__all__ = ["causal_mask", "eager_of", "exact_attention"]


def exact_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    own: dict[str, Any],
    eager_only: bool,
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention: sdpa, or eager where that is what the model needs.

    Args:
        module: The attention module.
        query: ``[batch, num_q_heads, queries, head_dim]``.
        key: ``[batch, num_kv_heads, keys, head_dim]``.
        value: ``[batch, num_kv_heads, keys, value_dim]``.
        mask: Bool, True for visible, or to be added to the logits.
        own: Keyword arguments of the model's attention.
        eager_only: Use eager attention although sdpa would do.

    Returns:
        ``[batch, queries, num_q_heads, value_dim]``, and the weights of eager attention.

    Raises:
        RuntimeError: Eager attention is needed and the model's file has none.
    """
    needs_eager = (
        own["softcap"] is not None
        or own["s_aux"] is not None
        or bool(own.get("output_attentions"))
        or eager_only
    )
    if not needs_eager:
        own = {name: own[name] for name in own if name not in ("softcap", "s_aux")}
        return sdpa_attention_forward(module, query, key, value, mask, **own)  # type: ignore[no-any-return]
    eager = eager_of(type(module))
    if eager is None:
        raise RuntimeError(
            f"{type(module).__name__} needs eager attention (softcap, sinks or attention weights) "
            "and its file defines no eager_attention_forward"
        )
    queries = query.shape[2]
    if mask is None and queries > 1 and getattr(module, "is_causal", True):
        # No mask means a first pass; a static cache then has unwritten keys behind the new ones.
        key, value = key[:, :, :queries], value[:, :, :queries]
        mask = causal_mask(queries, queries, None, query.device)
    if mask is not None and mask.dtype == torch.bool:
        hidden = torch.finfo(query.dtype).min
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        mask = torch.where(mask, zero, hidden)
    if own["scaling"] is None:
        own["scaling"] = query.shape[-1] ** -0.5
    own = {name: value for name, value in own.items() if value is not None}
    return eager(module, query, key, value, mask, **own)  # type: ignore[no-any-return]


def eager_of(module_class: type) -> Callable[..., Any] | None:
    """The eager attention of the file that defines a module class, or a base of it."""
    for cls in module_class.__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function  # type: ignore[no-any-return]
    return None


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Bool ``[1, 1, queries, keys]``, True for visible; the last query sees the last key."""
    key = torch.arange(keys, device=device)[None, :]
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    mask = key <= query
    if window is not None:
        mask &= key > query - window
    return mask[None, None]
