"""The attention mask of a patched model, and what a decode step needs to know of it.

The mask itself is what sdpa takes. On the way through the model it carries a :class:`MaskInfo`: the
padding and the window it was made of, so that a decode step need not guess them from the mask. A
mask without one (given by the user), or of another kind, leads to exact attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    sdpa_mask,
    sliding_window_overlay,
)

from art_torch.cache import BoolArray
from art_torch.page_map import IntArray

__all__ = ["NO_KEYS", "MaskInfo", "art_mask", "info_of"]

# Length and offset of keys that need no mask. Every other cache has at least the new one.
NO_KEYS = 0, 0

_AND = and_masks(causal_mask_function).__code__
_WINDOW = sliding_window_overlay(1).__code__


class MaskInfo:
    """Padding and window of a mask; shared by all layers of a forward pass.

    Args:
        is_causal: Whether the mask is causal, with a window perhaps, and hides nothing but pads.
        padding: bool ``[batch, >= start + tokens]``, False for a pad; None if there is none.
        start: Padded position of the first query.
        tokens: Queries a row.
        key_start: Padded position of the first key of the mask.
        window: Tokens a query sees, its own included; None for all.
    """

    def __init__(
        self,
        is_causal: bool,
        padding: BoolArray | None,
        start: int,
        tokens: int,
        key_start: int,
        window: int | None,
    ) -> None:
        self.is_causal = is_causal
        self.padding, self.start, self.tokens = padding, start, tokens
        self.key_start, self.window = key_start, window
        self._dense: list[tuple[Tensor, Tensor, int] | None] = []  # computed once

    def real_tokens(self) -> BoolArray | None:
        """Of the new tokens: bool ``[batch, tokens]``, False for a pad; None if there is none."""
        if self.padding is None:
            return None
        end = self.start + self.tokens
        if self.padding.shape[1] < end:
            raise ValueError(
                f"attention_mask must cover the {self.start} tokens of the cache and the "
                f"{self.tokens} new ones, got {self.padding.shape[1]} columns"
            )
        real = self.padding[:, self.start : end]
        return None if real.all() else real

    def agrees_with(self, stored: BoolArray | None) -> bool:
        """Whether the mask shows exactly the tokens a cache has stored.

        Args:
            stored: bool ``[batch, start]`` of the cache; None for all.
        """
        if self.padding is None:
            return True  # pads that were never stored stay invisible
        seen = self.padding[:, : self.start]
        return bool(seen.all()) if stored is None else np.array_equal(seen, stored)

    def window_starts(self) -> IntArray | None:
        """Where pads lie inside the text: first stored token inside the window, ``[batch]``.

        A window counts positions, pads included, but pads are not stored. None where that makes no
        difference: no window, or pads at the left only.
        """
        if self.window is None or self.padding is None:
            return None
        seen = self.padding[:, : self.start + 1]
        if _left_padded(seen):
            return None
        outside = max(0, self.start + 1 - self.window)
        starts: IntArray = seen[:, :outside].sum(1)
        return starts

    def dense_range(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor, int] | None:
        """Of dense keys, what the query of a decode step sees.

        Returns:
            int32 ``[batch]`` first visible key, int32 ``[batch]`` end, and the number of visible
            keys of all rows; None if they are not one run per row.
        """
        if not self.is_causal:
            return None
        if not self._dense:
            self._dense.append(self._dense_range(batch, device))
        return self._dense[0]

    def _dense_range(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor, int] | None:
        end = self.start + 1
        first = np.full(batch, self.key_start)
        if self.window is not None:
            first = np.maximum(first, end - self.window)
        if self.padding is not None:
            seen = self.padding[:, :end]
            if seen.shape[1] < end or not _left_padded(seen):
                return None
            first = np.maximum(first, end - seen.sum(1))
        starts = torch.from_numpy((first - self.key_start).astype(np.int32)).to(device)
        ends = torch.full((batch,), end - self.key_start, dtype=torch.int32, device=device)
        return starts, ends, int((end - first).sum())


def info_of(mask: Tensor | None) -> MaskInfo | None:
    """What ``mask`` carries; None for a mask that :func:`art_mask` did not make."""
    return getattr(mask, "_art_info", None)


def art_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """Makes the mask of a patched model; registered as "art" with ``AttentionMaskInterface``.

    Args:
        batch_size: Rows.
        q_length: Queries a row.
        kv_length: Keys the mask covers.
        q_offset: Padded position of the first query.
        kv_offset: Padded position of the first key.
        mask_function: What may be seen, pads aside.
        attention_mask: bool ``[batch, tokens]``, False for a pad.
        use_vmap: Whether ``mask_function`` is a user's.
        allow_is_causal_skip: Whether None may stand for a causal mask.
        **kwargs: For sdpa's mask.

    Returns:
        bool ``[batch, 1, q_length, kv_length]``, True for visible; None where everything is.
    """
    if kv_length == NO_KEYS[0]:  # a preallocated ARTCache: it knows its lengths, pads and window
        if use_vmap:
            raise RuntimeError(
                "a preallocated ARTCache takes causal attention, with a window or not"
            )
        reference = getattr(q_offset, "_art_lengths", None)
        lengths = None if reference is None else reference()
        if attention_mask is not None and lengths is not None:
            lengths.check_mask(attention_mask)
        return None
    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        use_vmap=use_vmap,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )
    if mask is None or torch.compiler.is_compiling():
        return mask
    is_causal, window = (False, None) if use_vmap else _causal_window(mask_function)
    padding = None if attention_mask is None else attention_mask.cpu().numpy()
    start = int(q_offset)  # a tensor after generate() has cropped a cache by one
    if padding is not None and padding.shape[1] >= start + q_length and padding.all():
        padding = None  # there is a mask for another reason: a window, a static cache
    # generate() calls contiguous() on it, and a copy would not carry the information.
    mask = mask.contiguous()
    info = MaskInfo(is_causal, padding, start, q_length, int(kv_offset), window)
    mask._art_info = info  # type: ignore[attr-defined]
    return mask


def _causal_window(mask_function: Callable[..., Any]) -> tuple[bool, int | None]:
    """Whether this is a plain causal mask, and its window."""
    if mask_function is causal_mask_function:
        return True, None
    if getattr(mask_function, "__code__", None) is not _AND:
        return False, None
    parts = _cell(mask_function, "mask_functions")
    windows = [_cell(part, "sliding_window") for part in parts if part.__code__ is _WINDOW]
    is_plain = causal_mask_function in parts and len(parts) == 2 and len(windows) == 1
    return is_plain, windows[0] if is_plain else None


def _cell(function: Any, name: str) -> Any:
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def _left_padded(seen: BoolArray) -> bool:
    """Whether every row is pads first, then tokens only."""
    return bool((seen[:, 1:] >= seen[:, :-1]).all())
