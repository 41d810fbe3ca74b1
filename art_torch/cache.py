"""Paged KV cache, seen from the tokens: lengths, pads, windows, and where a new token goes.

A :class:`PageTable` is shared by all layers that keep the same tokens, so that page ids are handed
out once per step and not once per layer. Which pages there are is the matter of
:mod:`art_torch.page_map`, what is in them that of :mod:`art_torch.page_storage`. Nothing here knows
about models; ``art_torch.integrations`` does.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from art_torch.code_table import CodeTable
from art_torch.guided import require_guided_device
from art_torch.page_map import BoolArray, IntArray, PageMap
from art_torch.page_storage import CacheMemoryError, MemoryBudget, PageStorage
from art_torch.static_lengths import StaticLengths

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

    Pad tokens are not stored. Two lengths are therefore kept: ``seq_lens`` counts stored tokens,
    ``padded_len`` counts tokens as the caller does, pads included.

    Args:
        page_size: Tokens a page.
        window: Tokens a query sees, its own included; None for all. Pages that left the window
            are handed out again.
        budget: The memory limit.
        num_layers: Layers that share the table, for the accounting of memory.

    Attributes:
        pages: The pages of each row.
        codes: The key codes, None while there are none; see :meth:`switch_on_codes`.
        block_table: int32 ``[batch, max_pages]``; a new tensor only when rows outgrow it.
        seq_lens: int32 ``[batch]``, updated in place.
        padded_len: Tokens per row as the caller counts them.
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
        self._accept_keys()
        self.padded_len = 0
        self.static: StaticLengths | None = None
        self._real: BoolArray | None = None  # [batch, padded_len], only if a pad was ever seen
        self._kept_from: IntArray = np.zeros(batch, np.int64)  # first stored token
        self._lens: npt.NDArray[np.int32] = np.zeros(batch, np.int32)
        self._changed()
        self._publish()

    def _changed(self) -> None:
        """Forgets what was computed for the layers of one pass."""
        self.step: Step | None = None
        self._history: tuple[tuple[int, int], Tensor] | None = None
        self._visible: int | None = None
        self._longest: int | None = None

    @torch.inference_mode(False)  # made inside of it, they could not be written to outside
    def _publish(self) -> None:
        """Brings the tensors up to date. On the CPU they share memory with the arrays."""
        table = self.pages.table
        if self.codes is not None:
            self.codes.publish(table.shape[1] * self.page_size)
        if self.device.type == "cpu":
            self.block_table = torch.from_numpy(table)
            self.seq_lens = torch.from_numpy(self._lens)
            return
        if tuple(self.block_table.shape) != table.shape or self.block_table.device != self.device:
            self.block_table = torch.from_numpy(table).to(self.device)
            self.seq_lens = torch.from_numpy(self._lens).to(self.device)
        self.block_table.copy_(torch.from_numpy(table))
        if self.static is None:  # or only the tensor knows them
            self.seq_lens.copy_(torch.from_numpy(self._lens))

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
        return len(self._lens)

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
    def _host_lens(self) -> npt.NDArray[np.int32]:
        """Stored tokens of the rows, for who must not ask while only a tensor knows them."""
        if self.static is not None:
            raise RuntimeError(
                f"the lengths of a cache that is preallocated for {self.static.length} tokens are "
                "tensors: read seq_lens, or call leave_static() first"
            )
        return self._lens

    @property
    def static_len(self) -> int:
        """Length for which :meth:`preallocate` made room, 0 otherwise."""
        return 0 if self.static is None else self.static.length

    @property
    def has_pads(self) -> bool:
        """Whether any row ever had a pad token."""
        return self._real is not None

    def real_tokens(self, start: int, end: int) -> BoolArray | None:
        """Of padded positions: bool ``[batch, end - start]``, False for a pad; None if all real."""
        return None if self._real is None else self._real[:, start:end]

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
        page = self.page_size
        before = self._lens.astype(np.int64)
        after = before + (tokens if real is None else real.sum(1))
        if not self.record_past:
            self._drop_invisible(before)
        keep_from = self._first_needed(before, after)
        # A row that gets nothing writes nowhere: its range of entries is empty.
        write_from = np.where(after > before, before // page, self.pages.used)
        codes = 0 if self.codes is None else self.codes.bytes_to_grow(after)
        changed = self.pages.make_room(keep_from // page, -(-after // page), write_from, codes)
        if self.codes is not None:
            changed |= self.codes.grow(before, after)
        slots = self._slots(before, tokens, real, keep_from)
        self._append_real(tokens, real)
        self._lens[:] = after
        self._kept_from = np.maximum(self._kept_from, np.minimum(keep_from, after))
        self.step = Step(torch.from_numpy(slots).to(self.device), self.padded_len, tokens)
        self.padded_len += tokens
        self._visible = self._longest = None
        if changed or self.device.type != "cpu":
            self._publish()
        return self.step

    def _invisible(self, lens: IntArray) -> IntArray:
        """Tokens that the next queries of rows of these lengths cannot see, int64 ``[rows]``."""
        return np.maximum(0, lens + 1 - self.window) if self.window else np.zeros_like(lens)

    def _drop_invisible(self, lens: IntArray) -> None:
        """Hands back pages that the next queries of rows of these lengths cannot see."""
        if self.window is None:
            return
        first = self._invisible(lens)
        self.pages.drop_before(first // self.page_size)
        self._kept_from = np.maximum(self._kept_from, first)

    def _first_needed(self, before: IntArray, after: IntArray) -> IntArray:
        """First token worth storing: a prefill longer than the window leaves only its end.

        That is what its own last query sees, for layers that share these keys may ask with it.
        """
        if self.window is None or self.record_past:
            return np.zeros_like(before)
        is_long = after - before >= self.window
        return np.where(is_long, np.maximum(0, after - self.window), 0)

    def _slots(
        self, before: IntArray, tokens: int, real: BoolArray | None, keep_from: IntArray
    ) -> IntArray:
        if tokens == 1 and real is None:
            entry, offset = np.divmod(before, self.page_size)
            page = self.pages.table[np.arange(self.batch), entry]
            return page.astype(np.int64) * self.page_size + offset
        rank = np.arange(tokens)[None, :] if real is None else real.cumsum(1) - 1
        index = before[:, None] + rank
        stored = index >= keep_from[:, None]
        if real is not None:
            stored &= real
        return self._slots_of(index, stored, -1).reshape(-1)

    def _slots_of(self, index: IntArray, stored: BoolArray, otherwise: int) -> IntArray:
        """Slots of stored tokens, by index in their row."""
        entry, offset = np.divmod(np.where(stored, index, 0), self.page_size)
        page = np.take_along_axis(self.pages.table, entry, axis=1).astype(np.int64)
        return np.where(stored, page * self.page_size + offset, otherwise)

    def _append_real(self, tokens: int, real: BoolArray | None) -> None:
        if self._real is None:
            if real is None or real.all():
                return
            self._real = np.ones((self.batch, self.padded_len), np.bool_)
        new = np.ones((self.batch, tokens), np.bool_) if real is None else real
        self._real = np.concatenate([self._real, new], axis=1)

    def history_slots(self, start: int, end: int) -> Tensor:
        """Slots of padded positions ``start`` to ``end - 1``, int64 ``[batch, end - start]``.

        Pads, and tokens a window has left behind, point at the null page. The first layer of a pass
        asks before :meth:`begin_step`, which may drop tokens; the others get the same answer.
        """
        if self._history is not None and self._history[0] == (start, end):
            return self._history[1]
        if self._real is None:
            index = np.tile(np.arange(start, end), (self.batch, 1))
            stored = index >= self._kept_from[:, None]
        else:
            index = self._real.cumsum(1)[:, start:end] - 1
            stored = self._real[:, start:end] & (index >= self._kept_from[:, None])
        slots = torch.from_numpy(self._slots_of(index, stored, 0)).to(self.device)
        self._history = ((start, end), slots)
        return slots

    def visible_total(self, rows: BoolArray | None = None) -> int:
        """Tokens the queries of the last pass may see, summed over the rows (or some of them).

        Not while the cache is preallocated.
        """
        if rows is None and self._visible is not None:
            return self._visible  # the layers of a pass ask one after another
        lens = self._host_lens
        lens = lens if self.window is None else np.minimum(lens, self.window)
        if rows is not None:
            return int(lens[rows].sum())
        self._visible = int(lens.sum())
        return self._visible

    @property
    def longest(self) -> int:
        """Stored tokens of the longest row; not while the cache is preallocated."""
        if self._longest is None:
            self._longest = int(self._host_lens.max(initial=0))
        return self._longest

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
            self.codes = CodeTable(
                self.pages.budget, self.pages.num_layers, self.device, self.batch
            )
            self._publish()

    def cover_codes(self) -> None:
        """Gives code pages to all complete groups that have none.

        Raises:
            CacheMemoryError: The limit does not allow it. Nothing has changed then.
        """
        assert self.codes is not None
        lens = np.full(self.batch, self.static_len) if self.static_len else self._lens
        if self.codes.grow(None, lens.astype(np.int64)):
            self._publish()

    @property
    def keys_were_written(self) -> bool:
        """Whether PyTorch has counted writes to keys since the codes were made."""
        return any(storage.foreign_writes for storage in self.pages.storages)

    def renew_codes(self) -> None:
        """Makes all key codes void, after keys were changed by others; accepts these keys.

        Raises:
            CacheMemoryError: Rows shared code pages, and the limit does not allow one for each.
        """
        assert self.codes is not None
        self.codes.renew(self._host_lens.astype(np.int64))
        self._accept_keys()
        self._publish()

    def _accept_keys(self) -> None:
        for storage in self.pages.storages:
            storage.foreign_writes = 0

    # ---------------------------------------------------------------- editing

    def crop(self, tokens: int) -> None:
        """Removes the last ``tokens`` padded positions of every row.

        Raises:
            ValueError: ``tokens`` is negative or more than there are.
            RuntimeError: A window has already dropped tokens that would be visible again.
        """
        if not 0 <= tokens <= self.padded_len:
            raise ValueError(f"can crop 0 to {self.padded_len} tokens, got {tokens}")
        end = self.padded_len - tokens
        removed = tokens if self._real is None else self._real[:, end:].sum(1)
        lens = self._lens.astype(np.int64) - removed
        if self.window is not None and tokens > 0:
            needed = np.maximum(0, lens + 1 - self.window)
            if (self._kept_from > needed).any():
                raise RuntimeError(
                    f"cannot crop {tokens} tokens: the sliding window of {self.window} has dropped "
                    "tokens that would be visible again; call activate_past_recording() first"
                )
        if self._real is not None:
            self._real = self._real[:, :end]
        self._lens[:] = lens
        self.pages.truncate(-(-lens // self.page_size))
        if self.codes is not None:
            self.codes.truncate(lens)
        self.padded_len = end
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
        self._lens, self._kept_from = self._lens[rows], self._kept_from[rows]
        self._real = None if self._real is None else self._real[rows]
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
        for name in ("pages", "codes", "_lens", "_kept_from", "_real"):
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
        drop = None if self.record_past else self._invisible(lens) // page
        needed = self.pages.bytes_to_grow(-(-end // page), lens // page, drop)
        if self.codes is not None:
            needed += self.codes.bytes_to_grow(end, renewed=self.keys_were_written)
        return needed

    @torch.inference_mode(False)
    def preallocate(self, length: int) -> None:
        """Gives every row pages for ``length`` stored tokens; from now on lengths are tensors.

        Raises:
            CacheMemoryError: The limit does not allow it. Nothing has changed then.
            ValueError: The table is empty or already longer.
        """
        self.pages.budget.check(self.bytes_to_preallocate(length), self.device)
        if self.codes is not None and self.keys_were_written:
            self.renew_codes()
        before = self._lens.astype(np.int64)
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
        tensors = self.block_table, self.seq_lens
        self.static = StaticLengths(length, self.page_size, padded_len, self._real, *tensors)
        if self.codes is not None:
            self.codes.coded_lens = self.seq_lens.clone()
        self.static.mark_addresses(self.pages.storages, self.codes)

    def leave_static(self) -> None:
        """Takes the lengths back from the tensors."""
        if self.static is None:
            return
        new = int(self.static.padded_len) - self.padded_len
        self._append_real(new, None)
        self._lens[:] = self.seq_lens.cpu().numpy()
        self.padded_len += new
        self.static = None
        if self.codes is not None:
            self.codes.truncate(self._lens.astype(np.int64))
        self._changed()
