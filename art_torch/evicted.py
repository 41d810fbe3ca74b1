"""What a press has left of a prompt, in pages: heads may keep different tokens.

A row of the table is one KV head of one sequence, and a page holds tokens of one head. So pages are
allocated for what each head keeps, and operators read them with a page table per head over a pool
whose stride between heads is 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from art_torch.cache import BoolArray, MemoryBudget, PageTable, Step
from art_torch.page_map import IntArray
from art_torch.page_storage import PageStorage

__all__ = ["EvictedTable", "Prompt"]

# Which dimension of a pool counts its heads.
_HEADS_OF_POOLS = {
    "key_cache": 2,
    "value_cache": 2,
    "key_scale": 2,
    "value_scale": 2,
    "key_codes": 1,
}


class Prompt(NamedTuple):
    """A prompt that waits for what presses leave of it.

    Attributes:
        keys: ``[batch, num_kv_heads, tokens, head_dim]``.
        values: ``[batch, num_kv_heads, tokens, value_dim]``.
        real: bool ``[batch, tokens]``, False for a pad; None if there is none.
    """

    keys: Tensor
    values: Tensor
    real: BoolArray | None


class EvictedTable(PageTable):
    """Where the tokens of one layer are, head by head.

    Lengths that the caller counts (``padded_len``) include the tokens that were evicted; lengths
    that are stored (``seq_lens``) do not. Tokens after the prompt are kept by all heads.

    Args:
        page_size: Tokens a page.
        budget: The memory limit.
        num_kv_heads: Rows of one sequence; row ``b * num_kv_heads + h`` is head h of sequence b.

    Attributes:
        num_kv_heads: As above.
        prompt_tokens: Tokens of the prompt as the caller counts them.
    """

    def __init__(self, page_size: int, budget: MemoryBudget, num_kv_heads: int) -> None:
        self.num_kv_heads, self.prompt_tokens = num_kv_heads, 0
        self._prompt_real: BoolArray | None = None
        super().__init__(page_size, None, budget, num_layers=1)

    def begin_prompt(self, kept: BoolArray, tokens: int, real: BoolArray | None) -> Step:
        """Makes room for what is left of a prompt.

        Args:
            kept: bool ``[batch * num_kv_heads, candidates]``, the tokens to store.
            tokens: Length of the prompt as the caller counts it, pads and evicted tokens included.
            real: bool ``[batch, tokens]``, False for a pad; None if there is none.

        Returns:
            Where they go.

        Raises:
            CacheMemoryError: The limit does not allow it. Nothing has changed then.
        """
        rows, candidates = kept.shape
        step = self.begin_step(rows, candidates, kept)
        self.counts.replace_pads(tokens)
        self._prompt_real, self.prompt_tokens = real, tokens
        return step

    @property
    def sequences(self) -> int:
        """Sequences, each with a row per head."""
        return self.batch // self.num_kv_heads

    @property
    def has_pads(self) -> bool:
        """Whether any sequence ever had a pad token."""
        return self._prompt_real is not None or super().has_pads

    def real_tokens(self, start: int, end: int) -> BoolArray | None:
        """Of padded positions: bool ``[batch, end - start]``, False for a pad; None if all real."""
        if not self.has_pads:
            return None
        real = np.ones((self.sequences, self.padded_len), np.bool_)
        if self.counts.real is not None:
            real[:] = self.counts.real[:: self.num_kv_heads]
        if self._prompt_real is not None:
            real[:, : self.prompt_tokens] = self._prompt_real
        return real[:, start:end]

    def as_rows(
        self, key: Tensor, value: Tensor, real: BoolArray | None
    ) -> tuple[Tensor, Tensor, BoolArray | None]:
        """New tokens of sequences as those of rows: a batch of rows with one head each.

        Args:
            key: ``[batch, num_kv_heads, tokens, head_dim]``.
            value: ``[batch, num_kv_heads, tokens, value_dim]``.
            real: bool ``[batch, tokens]``, False for a pad; None if there is none.
        """
        key, value = (new.flatten(0, 1).unsqueeze(1) for new in (key, value))
        return key, value, None if real is None else real.repeat(self.num_kv_heads, axis=0)

    def per_head(self, pages: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of one head and many rows as operators take them, with all heads; views.

        Args:
            pages: Pools ``[pages, ..., 1 head, ...]`` and tables ``[rows, ...]``, by the names that
                :func:`art_torch.decode_attention` gives them.
        """
        heads = self.num_kv_heads
        views = {}
        for name, tensor in pages.items():
            if name in _HEADS_OF_POOLS:
                sizes = [-1] * tensor.dim()
                sizes[_HEADS_OF_POOLS[name]] = heads
                views[name] = tensor.expand(sizes)
            else:
                views[name] = tensor.unflatten(0, (-1, heads))
        return views

    def gather(self, storage: PageStorage) -> tuple[Tensor, Tensor, Tensor]:
        """All that is stored, dense.

        Returns:
            Keys ``[batch, num_kv_heads, longest, head_dim]``, values, and bool
            ``[batch, num_kv_heads, longest]``, False where a head has no token.
        """
        index = np.tile(np.arange(self.counts.longest), (self.batch, 1))
        stored = index < self.counts.lens[:, None]
        slots = torch.from_numpy(self.slots_of(index, stored)).to(storage.device)
        heads = (-1, self.num_kv_heads)
        keys, values = (part[:, 0].unflatten(0, heads) for part in storage.gather(slots))
        return keys, values, torch.from_numpy(stored).to(storage.device).unflatten(0, heads)

    def present_per_head(self, rows: BoolArray | None = None) -> IntArray:
        """Stored tokens, int64 ``[num_kv_heads]``, summed over the sequences (or some of them)."""
        lens = self.counts.lens.reshape(-1, self.num_kv_heads)
        total: IntArray = (lens if rows is None else lens[rows]).sum(0, dtype=np.int64)
        return total

    def crop(self, tokens: int) -> None:
        """Removes the last ``tokens`` padded positions of every sequence.

        Raises:
            ValueError: ``tokens`` is negative or more than there are.
            RuntimeError: Tokens of the prompt would be removed.
        """
        if self.padded_len - self.prompt_tokens < tokens <= self.padded_len:
            raise RuntimeError(
                f"cannot crop {tokens} tokens: only {self.padded_len - self.prompt_tokens} came "
                "after the prompt, which a press has compressed: reset() the cache instead, and do "
                "not combine presses with speculative decoding, whose first guesses are taken for "
                "the prompt"
            )
        super().crop(tokens)

    def select_rows(self, rows: IntArray) -> None:
        """Sequence i becomes the old sequence ``rows[i]``; pages are shared."""
        if self._prompt_real is not None:
            self._prompt_real = self._prompt_real[rows]
        heads = self.num_kv_heads
        super().select_rows((rows[:, None] * heads + np.arange(heads)).reshape(-1))

    def bytes_to_preallocate(self, length: int) -> int:
        """Refused: every head would get pages for all that it may hold.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "preallocate() does not work on a cache that a press has compressed: decode by "
            "generate(), without it"
        )
