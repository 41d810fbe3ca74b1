"""Key codes as part of a paged KV cache: a record for each KV head and complete group of 64 tokens.

A group is a page of a :class:`~art_torch.page_map.PageMap` of its own, whatever the page size of
the cache. Only complete groups have one, and their tokens never change, so rows share them without
copies: cropping a row lets go of its groups, and when they are complete again they get new pages.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from art_torch.guided import GROUP_TOKENS, encode_keys, key_code_bytes, require_guided_device
from art_torch.page_map import IntArray, PageMap
from art_torch.page_storage import GrowingPool, PageStorage, reserve, view

__all__ = ["CodeStorage", "CodeTable"]


class CodeStorage(GrowingPool):
    """Key codes of one layer.

    Args:
        num_kv_heads: KV heads.
        head_dim: Elements of a key.
        device: Where the codes live.
        max_pages: Pages the memory limit allows.

    Attributes:
        key_codes: uint8 ``[used_pages, num_kv_heads, key_code_bytes(head_dim)]``.
        is_void: Whether all of them are still to be written: there are none yet, or they are those
            of other keys.
    """

    def __init__(
        self, num_kv_heads: int, head_dim: int, device: torch.device, max_pages: int
    ) -> None:
        require_guided_device(device)
        self.device, self.is_void = device, True
        self.record_shape = num_kv_heads, key_code_bytes(head_dim)
        self.page_bytes = num_kv_heads * key_code_bytes(head_dim)
        self._allocate(max(max_pages, 2) if device.type == "cpu" else 2)
        self._use(1)

    @torch.inference_mode(False)
    def _allocate(self, num_pages: int) -> None:
        shape = (num_pages, *self.record_shape)
        if self.device.type == "cpu":
            region, start = reserve(num_pages * self.page_bytes)
            pool = view(region, start, torch.uint8, shape, self.page_bytes)
        else:
            pool = torch.empty(shape, dtype=torch.uint8, device=self.device)
        self._pools, self._capacity = (pool,), num_pages

    def _use(self, num_pages: int) -> None:
        self.used_pages = num_pages
        self.key_codes = self._pools[0][:num_pages]

    def encode(
        self, keys: PageStorage, block_table: Tensor, seq_lens: Tensor, codes: CodeTable
    ) -> None:
        """Writes the codes of groups that the last pass completed, or of all if they are void.

        Args:
            keys: The keys of the layer.
            block_table: int32 ``[rows, max_pages]``, where they are.
            seq_lens: int32 ``[rows]``, how many there are.
            codes: Where their codes go.
        """
        if codes.coded_lens is None and not self.is_void:
            return
        encode_keys(
            keys.key_cache,
            block_table,
            seq_lens,
            self.key_codes,
            codes.code_table,
            coded_lens=None if self.is_void else codes.coded_lens,
            key_scale=keys.scales.get("key_scale"),
        )
        self.is_void = False


class CodeTable:
    """Where the codes of each 64 tokens are; beside a :class:`~art_torch.cache.PageTable`.

    Args:
        keys: The pages of the keys; codes share their memory limit and device.
        page_size: Tokens of one.
        rows: Sequences.

    Attributes:
        groups: The code pages of each row, an entry for each complete group.
        code_table: int32 ``[rows, max_groups]``, for the operators.
        coded_lens: int32 ``[rows]``, tokens before the last pass, if it completed a group (on a
            preallocated cache always); None if there is nothing new to encode.
    """

    def __init__(self, keys: PageMap[PageStorage], page_size: int, rows: int) -> None:
        self.keys, self.page_size = keys, page_size
        self.groups: PageMap[CodeStorage] = PageMap(keys.budget, keys.num_layers, keys.device)
        self.reset(rows)

    def reset(self, rows: int) -> None:
        """Starts again with empty rows."""
        self.groups.reset(rows)
        self.coded_lens: Tensor | None = None
        self.code_table = torch.from_numpy(self.groups.table)
        self._accept_keys()

    @property
    def keys_were_written(self) -> bool:
        """Whether PyTorch has counted writes to keys since the codes were made."""
        return any(storage.foreign_writes for storage in self.keys.storages)

    def _accept_keys(self) -> None:
        for storage in self.keys.storages:
            storage.foreign_writes = 0

    def add_storage(self, keys: PageStorage) -> CodeStorage:
        """Adds the codes of a layer with these keys; the groups need a page each then."""
        heads, dim, device = keys.num_kv_heads, keys.head_dim, keys.device
        return self.groups.add_storage(
            lambda max_pages: CodeStorage(heads, dim, device, max_pages),
            heads * key_code_bytes(dim),
        )

    def bytes_to_grow(self, lens: IntArray, renewed: bool = False) -> int:
        """Bytes that :meth:`grow` would claim, for rows of these lengths, int64 ``[rows]``.

        Args:
            lens: As above.
            renewed: Together with a :meth:`renew` before it.
        """
        end = lens // GROUP_TOKENS
        if renewed:
            return self.groups.bytes_to_refill(end)
        return self.groups.bytes_to_grow(end) if (end > self.groups.used).any() else 0

    def grow(self, before: npt.NDArray[np.int32 | np.int64] | None, lens: IntArray) -> bool:
        """Gives every complete group a code page.

        Args:
            before: int ``[rows]``, tokens before the pass that completed the groups; None for
                groups of no one pass.
            lens: int64 ``[rows]``, tokens present.

        Returns:
            Whether the table changed.

        Raises:
            CacheMemoryError: The limit does not allow it. Nothing has changed then.
        """
        end = lens // GROUP_TOKENS
        if not (end > self.groups.used).any():
            if before is not None:
                self.coded_lens = None
            return False
        # Nothing is ever written to a page that a row has already, so none is copied.
        changed = self.groups.make_room(np.zeros_like(end), end, self.groups.used)
        self.coded_lens = None
        if before is not None:
            self.coded_lens = torch.from_numpy(before.astype(np.int32)).to(self.groups.device)
        return changed

    @torch.inference_mode(False)  # made inside of it, it could not be written to outside
    def begin_static(self, seq_lens: Tensor) -> None:
        """Makes ``coded_lens`` a tensor that steps of a preallocated cache write to.

        Args:
            seq_lens: int32 ``[rows]``, the lengths that these steps count up.
        """
        self.coded_lens = seq_lens.clone()

    def truncate(self, lens: IntArray) -> None:
        """Lets go of the groups that are not complete in these lengths, int64 ``[rows]``."""
        self.coded_lens = None
        self.groups.truncate(lens // GROUP_TOKENS)

    def select(self, rows: IntArray) -> None:
        """Row i becomes the old row ``rows[i]``; code pages are shared."""
        self.coded_lens = None
        self.groups.select(rows)

    def renew(self, lens: IntArray) -> None:
        """Makes all codes void, after keys were changed by others; accepts these keys.

        Rows no longer share code pages, for their keys may differ.
        """
        self.truncate(np.zeros_like(lens))
        self.grow(None, lens)
        for storage in self.groups.storages:
            storage.is_void = True
        self._accept_keys()

    @torch.inference_mode(False)  # made inside of it, the table could not be written to outside
    def publish(self) -> None:
        """Brings ``code_table`` up to date."""
        # Operators want an entry for each group that a row of the block table has room for.
        self.groups.widen(self.keys.table.shape[1] * self.page_size // GROUP_TOKENS)
        table, device = self.groups.table, self.groups.device
        if device.type == "cpu":  # the tensor shares the memory of the array
            self.code_table = torch.from_numpy(table)
        elif tuple(self.code_table.shape) == table.shape and self.code_table.device.type != "cpu":
            self.code_table.copy_(torch.from_numpy(table))
        else:
            self.code_table = torch.from_numpy(table).to(device)

    @torch.inference_mode(False)
    def __deepcopy__(self, memo: dict[int, Any]) -> CodeTable:
        clone = copy.copy(self)
        memo[id(self)] = clone
        clone.keys = copy.deepcopy(self.keys, memo)
        clone.groups = copy.deepcopy(self.groups, memo)
        clone.code_table = self.code_table.clone()
        clone.coded_lens = None
        return clone
