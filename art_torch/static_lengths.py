"""Lengths of a paged KV cache as tensors, for steps that are compiled or recorded.

A :class:`art_torch.cache.PageTable` counts on the host. Once its rows have pages for all tokens
they may get, a step needs no page of its own, and counting can be left to tensor arithmetic.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from art_torch.code_table import CodeTable
from art_torch.page_map import BoolArray
from art_torch.page_storage import PageStorage


class StaticLengths:
    """Counts the tokens of rows that have pages for ``length`` tokens each.

    Args:
        length: Stored tokens a row has pages for.
        page_size: Tokens a page.
        padded_len: Tokens per row as the caller counts them, pads included.
        real: Of these: bool ``[batch, padded_len]``, False for a pad; None if all are real.
        block_table: int32 ``[batch, max_pages]``.
        seq_lens: int32 ``[batch]``, stored tokens; counted up in place.

    Attributes:
        length: As given.
        padded_len: int64 ``[]``. Its attribute ``_art_lengths`` is a weak reference to this, for
            whoever gets to see nothing but the tensor.
        slots: int64 ``[batch]``, where the tokens go that :meth:`advance` has counted.
    """

    @torch.inference_mode(False)  # made inside of it, they could not be written to outside
    def __init__(
        self,
        length: int,
        page_size: int,
        padded_len: int,
        real: BoolArray | None,
        block_table: Tensor,
        seq_lens: Tensor,
    ) -> None:
        self.length, self._page_size, self._real = length, page_size, real
        self._block_table, self._seq_lens = block_table, seq_lens
        device = seq_lens.device
        self.padded_len = torch.tensor(padded_len, dtype=torch.int64, device=device)
        self.padded_len._art_lengths = weakref.ref(self)  # type: ignore[attr-defined]
        self.slots = torch.zeros(len(seq_lens), dtype=torch.int64, device=device)
        self._mask_checked = False

    def mark_addresses(self, storages: Iterable[PageStorage], codes: CodeTable | None) -> None:
        """Tells compilers which tensors keep their place, for graphs that write to them.

        Args:
            storages: The pages.
            codes: The key codes, None if there are none.
        """
        if self._seq_lens.device.type == "cpu":
            return
        tensors = [self._block_table, self._seq_lens, self.padded_len, self.slots]
        for storage in storages:
            tensors += [storage.key_cache, storage.value_cache, *storage.scales.values()]
        if codes is not None:
            assert codes.coded_lens is not None
            tensors += [codes.code_table, codes.coded_lens]
            tensors += [storage.key_codes for storage in codes.groups.storages]
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor, guard=False)

    def check_mask(self, mask: Tensor) -> None:
        """Checks the mask of a step.

        On a GPU that waits for it, so there only the first mask is looked at: ``generate`` appends
        to it. Its length is checked always.

        Args:
            mask: bool ``[batch, tokens]``, False for a pad, the new token included.

        Raises:
            ValueError: It hides other tokens than the pads, which were not stored, does not cover
                the new token, or shows more than there is room for.
        """
        tokens, real = mask.shape[1], self._real
        known = 0 if real is None else real.shape[1]
        pads = 0 if real is None else int((~real).sum(1).min())
        if tokens - pads > self.length:
            raise ValueError(
                f"this ARTCache has room for {self.length} tokens a row, and a row would have "
                f"{tokens - pads}: pass a larger max_length"
            )
        if self._mask_checked and mask.device.type != "cpu":
            return
        self._mask_checked = True
        if tokens <= (start := int(self.padded_len)):
            raise ValueError(
                f"attention_mask must cover the {start} tokens of the cache and the new one, got "
                f"{tokens} columns"
            )
        seen = mask.cpu().numpy()
        agrees = real is None or np.array_equal(seen[:, :known], real)
        if not agrees or not seen[:, known:].all():
            raise ValueError(
                "a step on a preallocated ARTCache sees all tokens that are stored, and this "
                "attention mask hides some of them: crop() or reset() the cache instead"
            )

    def advance(self, codes: CodeTable | None) -> None:
        """Counts one token per row, with tensor arithmetic only; sets ``slots``.

        Args:
            codes: The key codes, None if there are none. They get to know the lengths before.
        """
        position = self._seq_lens.to(torch.int64)
        # Entries behind those pages may be any.
        torch._assert_async(
            (position < self.length).all(),
            f"a row of this ARTCache has no room left: it was preallocated for {self.length}; "
            "pass a larger max_length",
        )
        entry = torch.div(position, self._page_size, rounding_mode="floor")
        page = self._block_table.gather(1, entry[:, None])[:, 0].to(torch.int64)
        # In place: a recorded graph writes to the tensors that it was recorded with.
        self.slots.copy_(page * self._page_size + position % self._page_size)
        if codes is not None:
            assert codes.coded_lens is not None
            codes.coded_lens.copy_(self._seq_lens)
        self._seq_lens.add_(1)
        self.padded_len.add_(1)
