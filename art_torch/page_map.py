"""Which page holds which part of which sequence: allocation, sharing and copy on write."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from art_torch.page_storage import NULL_PAGE, GrowingPool, MemoryBudget

__all__ = ["BoolArray", "IntArray", "PageMap"]

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
Storage = TypeVar("Storage", bound=GrowingPool)


class _PageIds:
    """Hands out page ids and counts how many rows hold each."""

    def __init__(self) -> None:
        self.references: npt.NDArray[np.int32] = np.zeros(64, np.int32)
        self.free: list[int] = []
        self.end = NULL_PAGE + 1  # ids from here on were never used

    def end_after(self, count: int) -> int:
        """What ``end`` will be once ``count`` more ids are handed out."""
        return self.end + max(0, count - len(self.free))

    def allocate(self, count: int) -> IntArray:
        """``count`` ids with one reference each."""
        reused = [self.free.pop() for _ in range(min(count, len(self.free)))]
        fresh = count - len(reused)
        ids = np.array([*reused, *range(self.end, self.end + fresh)], np.int64)
        self.end += fresh
        if self.end > len(self.references):
            grown = np.zeros(max(self.end, 2 * len(self.references)), np.int32)
            grown[: len(self.references)] = self.references
            self.references = grown
        self.references[ids] = 1
        return ids

    def retain(self, ids: IntArray) -> None:
        np.add.at(self.references, ids[ids != NULL_PAGE], 1)

    def release(self, ids: IntArray) -> None:
        ids = ids[ids != NULL_PAGE]
        np.subtract.at(self.references, ids, 1)
        dropped = np.unique(ids)
        # Lowest id on top of the stack: reuse goes upwards, as allocation of new pages does.
        self.free.extend(dropped[self.references[dropped] == 0].tolist()[::-1])


class PageMap(Generic[Storage]):
    """Rows of page ids, common to all layers that keep the same tokens.

    Rows may hold the same page; :meth:`make_room` copies a page before one of its holders writes to
    it.

    Args:
        budget: The memory limit.
        num_layers: Layers that share the map, for the accounting of memory.
        device: Where the pages will be; None for the CPU. It may change while there are none.

    Attributes:
        table: int32 ``[rows, width]``; entries without a page are ``NULL_PAGE``. Replaced by a
            wider one when a row outgrows it, else changed in place.
        used: int64 ``[rows]``, end of the entries in use.
        first: int64 ``[rows]``, entries before it gave their pages back.
        storages: The layers' pages.
        device: Where these are.
    """

    def __init__(
        self, budget: MemoryBudget, num_layers: int, device: torch.device | None = None
    ) -> None:
        self.budget, self.num_layers = budget, num_layers
        self.storages: list[Storage] = []
        self.device = torch.device("cpu") if device is None else device
        self._claimed_pages = self._claimed_bytes = 0
        self.reset(0)

    def reset(self, rows: int) -> None:
        """Starts again with empty rows."""
        self._ids = _PageIds()
        self.table: npt.NDArray[np.int32] = np.zeros((rows, 1), np.int32)
        self.used: IntArray = np.zeros(rows, np.int64)
        self.first: IntArray = np.zeros(rows, np.int64)

    @property
    def pages_in_use(self) -> int:
        """Pages held by at least one row."""
        return self._ids.end - 1 - len(self._ids.free)

    @property
    def bytes_in_use(self) -> int:
        """Bytes of :attr:`pages_in_use`, all storages together."""
        return self.pages_in_use * sum(storage.page_bytes for storage in self.storages)

    def add_storage(self, make: Callable[[int], Storage], page_bytes: int) -> Storage:
        """Adds the storage of a layer.

        Args:
            make: Builds it, given the number of pages the memory limit allows.
            page_bytes: Bytes of one of its pages.
        """
        limit = self.budget.limit(self.device)
        storage = make(limit // (page_bytes * self.num_layers) + 1)
        storage.ensure(self._ids.end)
        self.storages.append(storage)
        return storage

    def bytes_to_grow(
        self,
        end: IntArray,
        write_from: IntArray | None = None,
        drop_before: IntArray | None = None,
    ) -> int:
        """Bytes that :meth:`make_room` would claim.

        Args:
            end: int64 ``[rows]``, end of the entries that need a page.
            write_from: int64 ``[rows]``, first entry that will be written to; None for no copies.
            drop_before: int64 ``[rows]``, of :meth:`drop_before` if that is called first.
        """
        count = int(np.maximum(0, end - self.used).sum())
        if write_from is not None:
            count += len(self._shared(write_from, np.minimum(end, self.used)))
        if drop_before is not None:
            count = max(0, count - self._freed_by(drop_before))
        return self._missing(count) * self._bytes_of_a_page()

    def bytes_to_refill(self, end: IntArray) -> int:
        """Bytes that :meth:`make_room` would claim once all pages are handed back.

        Args:
            end: int64 ``[rows]``, end of the entries that need a page.
        """
        return self._missing(int(end.sum()) - self.pages_in_use) * self._bytes_of_a_page()

    def _freed_by(self, first: IntArray) -> int:
        """Pages that :meth:`drop_before` would hand back."""
        ranges = zip(self.table, self.first.tolist(), first.tolist(), strict=True)
        ids = np.concatenate([row[begin:end] for row, begin, end in ranges])
        held = np.bincount(ids, minlength=len(self._ids.references))
        held[NULL_PAGE] = 0
        return int(((held > 0) & (held == self._ids.references)).sum())

    def make_room(
        self, start: IntArray, end: IntArray, write_from: IntArray, then: int = 0
    ) -> bool:
        """Gives every row pages up to an entry, and pages of its own where it will write.

        Args:
            start: int64 ``[rows]``, first entry that needs a page.
            end: int64 ``[rows]``, end of the entries that need one.
            write_from: int64 ``[rows]``, first entry that will be written to.
            then: Bytes of the same budget that will be claimed next, and must fit as well.

        Returns:
            Whether the table changed.

        Raises:
            CacheMemoryError: The limit does not allow it. Nothing has changed then.
        """
        start = np.maximum(self.used, start)
        grow = np.maximum(0, end - start)
        shared = self._shared(write_from, np.minimum(end, self.used))
        if not grow.any() and not shared:
            return False
        self._claim(int(grow.sum()) + len(shared), then)
        if int(end.max()) > self.table.shape[1]:
            # Doubling: a new tensor must not come every few tokens.
            self.widen(max(int(end.max()), 2 * self.table.shape[1]))
        count = int(grow.sum()) + len(shared)
        for storage in self.storages:  # before anything changes, for a device may have no more
            storage.ensure(self._ids.end_after(count))
        ids = self._ids.allocate(count)
        position = len(shared)
        if shared:
            self._unshare(shared, ids[:position])
        for row in np.flatnonzero(grow).tolist():
            self.table[row, start[row] : end[row]] = ids[position : position + grow[row]]
            position += grow[row]
        self.used = np.maximum(self.used, end)
        return True

    def widen(self, entries: int) -> bool:
        """Gives the table at least so many columns; returns whether it had fewer."""
        rows, now = self.table.shape
        if entries <= now:
            return False
        wide = np.zeros((rows, entries), np.int32)
        wide[:, :now] = self.table
        self.table = wide
        return True

    def _shared(self, begin: IntArray, end: IntArray) -> list[tuple[int, int]]:
        """(row, entry) of the pages from ``begin`` to ``end`` that must be copied first."""
        rows = np.flatnonzero(begin < end)
        if len(rows) == 0:
            return []
        if (end - begin <= 1).all():  # a decode step: look at the last pages only
            held = self._ids.references[self.table[rows, begin[rows]]]
            if (held <= 1).all():
                return []
        left = self._ids.references.copy()
        shared = []
        for row in rows.tolist():
            for entry in range(int(begin[row]), int(end[row])):
                page = self.table[row, entry]
                if left[page] > 1:  # the last holder keeps the page
                    left[page] -= 1
                    shared.append((row, entry))
        return shared

    def _unshare(self, shared: list[tuple[int, int]], new: IntArray) -> None:
        rows, entries = (np.array(part) for part in zip(*shared, strict=True))
        old = self.table[rows, entries].astype(np.int64)
        source, target = (torch.from_numpy(ids).to(self.device) for ids in (old, new))
        for storage in self.storages:
            storage.copy_pages(source, target)
        self.table[rows, entries] = new
        self._ids.release(old)

    def _claim(self, count: int, then: int) -> None:
        extra = self._missing(count)
        if extra > 0 or then > 0:
            num_bytes = extra * self._bytes_of_a_page()
            self.budget.claim(num_bytes, self.device, then)
            self._claimed_pages += extra
            self._claimed_bytes += num_bytes

    def give_up(self) -> None:
        """Returns what was claimed of the memory limit."""
        self.budget.release(self._claimed_bytes)
        self._claimed_pages = self._claimed_bytes = 0

    def drop_storages(self) -> None:
        """Forgets the pages of all layers, which add them anew; only while no row has any."""
        self.give_up()
        self.storages.clear()

    def _missing(self, count: int) -> int:
        """Pages to claim before ``count`` can be handed out."""
        return max(0, self._ids.end_after(count) - self._claimed_pages)

    def _bytes_of_a_page(self) -> int:
        # Layers show their sizes one by one in the first pass; the rest count as the average.
        known = sum(storage.page_bytes for storage in self.storages)
        return known * self.num_layers // max(1, len(self.storages))

    def drop_before(self, first: IntArray) -> None:
        """Hands back the pages of the entries before ``first``, int64 ``[rows]``."""
        for row in np.flatnonzero(first > self.first).tolist():
            self._drop(row, int(self.first[row]), int(first[row]))
        self.first = np.maximum(self.first, first)

    def truncate(self, end: IntArray) -> None:
        """Hands back the pages of the entries from ``end`` on, int64 ``[rows]``."""
        for row in np.flatnonzero(end < self.used).tolist():
            self._drop(row, int(end[row]), int(self.used[row]))
        self.used = np.minimum(self.used, end)

    def _drop(self, row: int, begin: int, end: int) -> None:
        entries = self.table[row, begin:end]
        self._ids.release(entries.astype(np.int64))
        entries[:] = NULL_PAGE

    def select(self, rows: IntArray) -> None:
        """Row i becomes the old row ``rows[i]``; pages are shared, not copied."""
        table = self.table[rows]
        self._ids.retain(table.astype(np.int64).reshape(-1))
        self._ids.release(self.table.astype(np.int64).reshape(-1))
        self.used, self.first = self.used[rows], self.first[rows]
        if table.shape == self.table.shape:
            self.table[:] = table
        else:
            self.table = table

    def __deepcopy__(self, memo: dict[int, Any]) -> PageMap[Storage]:
        clone = copy.copy(self)
        memo[id(self)] = clone
        for name in ("budget", "storages", "_ids", "table", "used", "first"):
            setattr(clone, name, copy.deepcopy(getattr(self, name), memo))
        return clone
