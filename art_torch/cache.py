"""Paged KV cache, seen from a forward pass: where its tokens go, and the tensors operators read.

A :class:`PageTable` is shared by all layers that keep the same tokens, so that page ids are handed
out once per step and not once per layer. Which tokens there are is the matter of
:mod:`art_torch.token_counts`, which pages that of :mod:`art_torch.page_map`, and what is in them
that of :mod:`art_torch.page_storage`. Nothing here knows about models.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from art_torch.code_table import CodeTable
from art_torch.guided import require_guided_device
from art_torch.page_map import BoolArray, IntArray, PageMap
from art_torch.page_storage import CacheMemoryError, MemoryBudget, PageStorage
from art_torch.static_lengths import StaticLengths
from art_torch.token_counts import TokenCounts

__all__ = ["BoolArray", "CacheMemoryError", "MemoryBudget", "PageStorage", "PageTable", "Step"]


class Step(NamedTuple):
    """Where the new tokens of one forward pass go.

    Attributes:
        slots: int64 ``[batch * tokens]`` for :func:`art_torch.append_kv`; -1 where a token is not
            stored.
        start: Padded length before the pass.
        tokens: Tokens per row of the pass, pads included.
    """

    slots: Tensor
    start: int
    tokens: int


class PageTable:
    """Where the tokens of each sequence are; shared by all layers that keep the same tokens.

    Args:
        page_size: Tokens a page.
        window: Tokens a query sees, its own included; None for all. Pages that left the window
            are handed out again.
        budget: The memory limit.
        num_layers: Layers that share the table, for the accounting of memory.

    Attributes:
        counts: The tokens of each row; while preallocated, those of before.
        pages: The pages of each row.
        codes: The key codes, None while there are none; see :meth:`switch_on_codes`.
        block_table: int32 ``[batch, max_pages]``; a new tensor only when rows outgrow it.
        seq_lens: int32 ``[batch]``, stored tokens, which pads are not; updated in place.
        record_past: Keep everything until :meth:`crop`, so that several passes can be undone.
        step: The last forward pass.
        static: After :meth:`preallocate`, what counts instead; None otherwise.
    """

    def __init__(
        self, page_size: int, window: int | None, budget: MemoryBudget, num_layers: int
    ) -> None:
        self.page_size, self.window = page_size, window
        self.pages: PageMap[PageStorage] = PageMap(budget, num_layers)
        self.codes: CodeTable | None = None
        self.record_past = False
        self._start(0)

    def _start(self, batch: int) -> None:
        self.pages.reset(batch)
        if self.codes is not None:
            self.codes.reset(batch)
        self.counts = TokenCounts(batch, self.window)
        self.static: StaticLengths | None = None
        self._changed()
        self._publish()

    def _changed(self) -> None:
        """Forgets what was computed for the layers of one pass."""
        self.step: Step | None = None
        self._history: tuple[tuple[int, int], Tensor] | None = None

    @torch.inference_mode(False)  # made inside of it, they could not be written to outside
    def _publish(self) -> None:
        """Brings the tensors up to date. On the CPU they share memory with the arrays."""
        table = self.pages.table
        if self.codes is not None:
            self.codes.publish()
        if self.device.type == "cpu":
            self.block_table = torch.from_numpy(table)
            self.seq_lens = torch.from_numpy(self.counts.lens)
            return
        if tuple(self.block_table.shape) != table.shape or self.block_table.device != self.device:
            self.block_table = torch.from_numpy(table).to(self.device)
            self.seq_lens = torch.from_numpy(self.counts.lens).to(self.device)
        self.block_table.copy_(torch.from_numpy(table))
        if self.static is None:  # or only the tensor knows them
            self.seq_lens.copy_(torch.from_numpy(self.counts.lens))

    @property
    def device(self) -> torch.device:
        """Where the pages are, and the key codes; to be set before there are any."""
        return self.pages.device

    @device.setter
    def device(self, device: torch.device) -> None:
        self.pages.device = device
        if self.codes is not None:
            self.codes.groups.device = device

    @property
    def batch(self) -> int:
        """Rows, 0 while empty."""
        return len(self.counts.lens)

    @property
    def sequences(self) -> int:
        """Sequences, 0 while empty; a row each."""
        return self.batch

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the pages that hold tokens, and of their key codes."""
        codes = 0 if self.codes is None else self.codes.groups.bytes_in_use
        return self.pages.bytes_in_use + codes

    @property
    def static_len(self) -> int:
        """Length for which :meth:`preallocate` made room, 0 otherwise."""
        return self.counts.static_len

    @property
    def padded_len(self) -> int:
        """Tokens per row as the caller counts them; while preallocated, those of before."""
        return self.counts.padded_len

    @property
    def has_pads(self) -> bool:
        """Whether any row ever had a pad token."""
        return self.counts.real is not None

    def real_tokens(self, start: int, end: int) -> BoolArray | None:
        """Of padded positions: bool ``[batch, end - start]``, False for a pad; None if all real."""
        return None if self.counts.real is None else self.counts.real[:, start:end]

    # ---------------------------------------------------------------- one forward pass

    def begin_step(self, batch: int, tokens: int, real: BoolArray | None) -> Step:
        """Makes room for the tokens of a forward pass and counts them.

        Args:
            batch: Rows.
            tokens: New tokens a row, pads included.
            real: bool ``[batch, tokens]``, False for a pad; None if there is none.

        Returns:
            Where they go.

        Raises:
            CacheMemoryError: The limit does not allow it. Nothing has changed then.
            ValueError: ``batch`` is not that of the sequences in the cache.
        """
        if batch != self.batch and self.padded_len == 0:
            self._start(batch)
        elif batch != self.batch:
            raise ValueError(
                f"the cache holds {self.batch} sequences, got a batch of {batch}; reset() the "
                "cache, or select its rows first"
            )
        page, counts = self.page_size, self.counts
        before = counts.lens.astype(np.int64)
        after = before + (tokens if real is None else real.sum(1))
        keep_from = np.zeros_like(before)
        if not self.record_past:
            self._drop_invisible(before)
            keep_from = counts.first_needed(before, after)
        # A row that gets nothing writes nowhere: its range of entries is empty.
        write_from = np.where(after > before, before // page, self.pages.used)
        codes = 0 if self.codes is None else self.codes.bytes_to_grow(after)
        changed = self.pages.make_room(keep_from // page, -(-after // page), write_from, codes)
        if self.codes is not None:
            changed |= self.codes.grow(before, after)
        slots = torch.from_numpy(self._new_slots(tokens, real, keep_from)).to(self.device)
        self.step = Step(slots, counts.padded_len, tokens)
        counts.append(after, tokens, real)
        counts.forget_before(keep_from)
        if changed or self.device.type != "cpu":
            self._publish()
        return self.step

    def _drop_invisible(self, lens: IntArray) -> None:
        """Hands back pages that the next queries of rows of these lengths cannot see."""
        if self.window is None:
            return
        first = self.counts.invisible(lens)
        self.pages.drop_before(first // self.page_size)
        self.counts.forget_before(first)

    def _new_slots(self, tokens: int, real: BoolArray | None, keep_from: IntArray) -> IntArray:
        if tokens == 1 and real is None:
            entry, offset = np.divmod(self.counts.lens, self.page_size)
            page = self.pages.table[np.arange(self.batch), entry]
            return page.astype(np.int64) * self.page_size + offset
        return self.slots_of(*self.counts.new_indices(tokens, real, keep_from), -1).reshape(-1)

    def slots_of(self, index: IntArray, stored: BoolArray, otherwise: int = 0) -> IntArray:
        """Slots of tokens by index in their row, int64 ``[batch, tokens]``, where they are stored.

        Others, False in the bool ``stored``, get ``otherwise``, by default a slot in the null page.
        """
        entry, offset = np.divmod(np.where(stored, index, 0), self.page_size)
        page = np.take_along_axis(self.pages.table, entry, axis=1).astype(np.int64)
        return np.where(stored, page * self.page_size + offset, otherwise)

    def history_slots(self, start: int, end: int) -> Tensor:
        """Slots of padded positions ``start`` to ``end - 1``, int64 ``[batch, end - start]``.

        Pads, and tokens a window has left behind, point at the null page. The first layer of a pass
        asks before :meth:`begin_step`, which may drop tokens; the others get the same answer.
        """
        if self._history is not None and self._history[0] == (start, end):
            return self._history[1]
        slots = torch.from_numpy(self.slots_of(*self.counts.indices(start, end))).to(self.device)
        self._history = ((start, end), slots)
        return slots

    # ---------------------------------------------------------------- key codes

    def switch_on_codes(self) -> None:
        """Keeps key codes from now on; those of tokens that are there need :meth:`cover_codes`.

        Raises:
            ValueError: The table has a window. Its groups would lose tokens to it.
            NotImplementedError: There are no kernels for the device.
        """
        if self.window is not None:
            raise ValueError(
                f"key codes are for full attention, and this table has a window of {self.window}"
            )
        if self.codes is None:
            require_guided_device(self.device)
            self.codes = CodeTable(self.pages, self.page_size, self.batch)
            self.codes.publish()

    def cover_codes(self) -> None:
        """Gives code pages to all complete groups that have none.

        Raises:
            CacheMemoryError: The limit does not allow it. Nothing has changed then.
        """
        assert self.codes is not None
        lens = np.full(self.batch, self.static_len) if self.static_len else self.counts.lens
        if self.codes.grow(None, lens.astype(np.int64)):
            self.codes.publish()
        if self.static is not None and self.codes.coded_lens is None:
            self.codes.begin_static(self.seq_lens)

    def renew_codes(self) -> None:
        """Makes all key codes void, after keys were changed by others; accepts these keys.

        Raises:
            CacheMemoryError: Rows shared code pages, and the limit does not allow one for each.
        """
        assert self.codes is not None
        self.codes.renew(self.counts.known_lens.astype(np.int64))
        self.codes.publish()

    # ---------------------------------------------------------------- editing

    def crop(self, tokens: int) -> None:
        """Removes the last ``tokens`` padded positions of every row.

        Raises:
            ValueError: ``tokens`` is negative or more than there are.
            RuntimeError: A window has already dropped tokens that would be visible again.
        """
        self.counts.crop(tokens)
        lens = self.counts.lens.astype(np.int64)
        self.pages.truncate(-(-lens // self.page_size))
        if self.codes is not None:
            self.codes.truncate(lens)
        if self.record_past:
            self._drop_invisible(lens)
        self._changed()
        self._publish()

    def select_rows(self, rows: IntArray) -> None:
        """Row i becomes the old row ``rows[i]``; nothing is copied, pages are shared."""
        if self.batch == 0:
            return
        self.pages.select(rows)
        if self.codes is not None:
            self.codes.select(rows)
        self.counts.select(rows)
        self._changed()
        self._publish()

    def reset(self) -> None:
        """Empties the table; the memory is kept for the next sequences."""
        self._start(0)

    def give_up(self) -> None:
        """Returns what the table has claimed of the memory limit: it is used no more."""
        self.pages.give_up()
        if self.codes is not None:
            self.codes.groups.give_up()

    @torch.inference_mode(False)
    def __deepcopy__(self, memo: dict[int, Any]) -> PageTable:
        clone = object.__new__(type(self))
        vars(clone).update(vars(self))
        memo[id(self)] = clone
        for name in ("counts", "pages", "codes"):
            setattr(clone, name, copy.deepcopy(getattr(self, name), memo))
        clone.block_table, clone.seq_lens = self.block_table.clone(), self.seq_lens.clone()
        clone._changed()
        clone._publish()
        if self.static is not None:
            clone._make_static(self.static.length, int(self.static.padded_len))
        return clone

    def __reduce__(self) -> NoReturn:
        # Tensors that share memory with arrays would come back apart, and the whole reservation
        # would be written.
        raise TypeError(
            "an ARTCache cannot be pickled or saved: its tensors are views of reserved memory. "
            "copy.deepcopy(cache) copies it; to have it elsewhere, keep the token ids and run them "
            "through the model again"
        )

    # ---------------------------------------------------------------- lengths as tensors

    def bytes_to_preallocate(self, length: int) -> int:
        """Bytes of the memory limit that :meth:`preallocate` would claim.

        Raises:
            ValueError: The table is empty or already longer.
        """
        if self.batch == 0:
            raise ValueError("preallocate needs a filled cache: run the prompt through it first")
        lens = self.seq_lens.cpu().numpy().astype(np.int64)  # right while lengths are tensors too
        if length < lens.max():
            raise ValueError(
                f"preallocate needs at least the {lens.max()} tokens that are in the cache, got "
                f"{length}: pass a larger max_length"
            )
        page, end = self.page_size, np.full(self.batch, length)
        drop = None if self.record_past else self.counts.invisible(lens) // page
        needed = self.pages.bytes_to_grow(-(-end // page), lens // page, drop)
        if self.codes is not None:
            needed += self.codes.bytes_to_grow(end, renewed=self.codes.keys_were_written)
        return needed

    @torch.inference_mode(False)
    def preallocate(self, length: int) -> None:
        """Gives every row pages for ``length`` stored tokens; from now on lengths are tensors.

        Raises:
            CacheMemoryError: The limit does not allow it. Nothing has changed then.
            ValueError: The table is empty or already longer.
        """
        self.pages.budget.check(self.bytes_to_preallocate(length), self.device)
        if self.codes is not None and self.codes.keys_were_written:
            self.renew_codes()
        before = self.counts.lens.astype(np.int64)
        if not self.record_past:
            self._drop_invisible(before)
        page = self.page_size
        end = np.full(self.batch, -(-length // page))
        self.pages.make_room(np.zeros_like(before), end, before // page)
        if self.codes is not None:
            self.codes.grow(None, np.full_like(end, length))
        self._changed()
        self._publish()
        self._make_static(length, self.padded_len)

    def _make_static(self, length: int, padded_len: int) -> None:
        of_rows = self.counts.real, self.block_table, self.seq_lens
        self.static = StaticLengths(length, self.page_size, padded_len, *of_rows)
        self.counts.begin_static(length)
        if self.codes is not None:
            self.codes.begin_static(self.seq_lens)
        self.static.mark_addresses(self.pages.storages, self.codes)

    def leave_static(self) -> None:
        """Takes the lengths back from the tensors."""
        if self.static is None:
            return
        new = int(self.static.padded_len) - self.padded_len
        self.counts.end_static(self.seq_lens.cpu().numpy(), new)
        self.static = None
        if self.codes is not None:
            self.codes.truncate(self.counts.lens.astype(np.int64))
        self._changed()
