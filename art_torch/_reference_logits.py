"""Which tokens a query sees, and from products with keys to logits: for attention and for walks."""

from __future__ import annotations

import torch
from torch import Tensor


def visible_tokens(seq_len: int, seq_start: int, sliding_window: int | None) -> range:
    """Return the tokens that the query may attend to; the window counts the query's own token."""
    window_start = 0 if sliding_window is None else seq_len - sliding_window
    return range(max(seq_start, window_start), seq_len)


def logits_of(
    products: Tensor, tokens: Tensor, seq_len: int, softcap: float, slopes: Tensor | None
) -> Tensor:
    """Return the logits of scaled products with keys: capped, and then with ALiBi's distance.

    Args:
        products: `[G, n]`, of the query heads of a group and n keys.
        tokens: integers `[n]`, where the keys are.
        seq_len: tokens of the sequence; the query is the last.
        softcap: 0 for none.
        slopes: `[G]`, None without ALiBi.
    """
    logits = softcap * torch.tanh(products / softcap) if softcap else products
    if slopes is not None:
        logits = logits + slopes[:, None] * (tokens - (seq_len - 1))
    return logits
