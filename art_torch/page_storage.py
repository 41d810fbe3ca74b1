"""The memory of a paged KV cache: its limit, and the pages of one layer."""

from __future__ import annotations

import contextlib
import copy
import math
import mmap
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["NULL_PAGE", "CacheMemoryError", "MemoryBudget", "PageStorage", "default_max_bytes"]

# Page 0 is never handed out and stays zero: table entries without a token point at it, and a gather
# that meets a pad reads finite numbers.
NULL_PAGE = 0

_HUGE_PAGE = 2 << 20
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.13, same value


class CacheMemoryError(MemoryError):
    """A KV cache would grow past its memory limit."""


def default_max_bytes(device: torch.device) -> int:
    """Half of the device's memory; on the CPU of what the container may use.

    Args:
        device: Where the cache lives.

    Returns:
        Bytes.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1]) // 2
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total // 2


class MemoryBudget:
    """The memory limit shared by all page tables of a cache.

    Args:
        max_bytes: Limit in bytes; None for :func:`default_max_bytes` of the device first asked for.
    """

    def __init__(self, max_bytes: int | None) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0

    def limit(self, device: torch.device) -> int:
        """The limit in bytes."""
        if self.max_bytes is None:
            self.max_bytes = default_max_bytes(device)
        return self.max_bytes

    def claim(self, num_bytes: int, device: torch.device) -> None:
        """Counts ``num_bytes`` more as used.

        Raises:
            CacheMemoryError: That would exceed the limit. Nothing is counted then.
        """
        limit = self.limit(device)
        if self.used_bytes + num_bytes > limit:
            raise CacheMemoryError(
                f"the KV cache needs {self.used_bytes + num_bytes:,} bytes and its limit is "
                f"{limit:,}: pass a larger max_bytes, shorten the sequences or the batch, or "
                "reset() the cache"
            )
        self.used_bytes += num_bytes


class PageStorage:
    """Keys and values of one layer, in pages.

    A page keeps the tokens of each head adjacent. On the CPU its keys are followed by its values;
    the address space for ``max_pages`` is reserved at once, advised to use huge pages, and costs
    memory only where it was written, so growing copies nothing. Elsewhere memory is committed when
    allocated: there the storage grows by doubling, with a copy.

    Args:
        num_kv_heads: KV heads.
        head_dim: Elements of a key.
        value_dim: Elements of a value.
        page_size: Tokens a page.
        dtype: Of keys and values.
        device: Where they live.
        max_pages: Pages the memory limit allows.

    Attributes:
        key_cache: ``[used_pages, page_size, num_kv_heads, head_dim]``, strided.
        value_cache: ``[used_pages, page_size, num_kv_heads, value_dim]``, strided.
        used_pages: Pages that :meth:`ensure` made usable, the null page among them.
        page_bytes: Bytes of one page, keys and values.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        max_pages: int,
    ) -> None:
        self.num_kv_heads, self.head_dim, self.value_dim = num_kv_heads, head_dim, value_dim
        self.page_size, self.dtype, self.device = page_size, dtype, device
        self.page_bytes = num_kv_heads * page_size * (head_dim + value_dim) * dtype.itemsize
        self._capacity = 0
        self._keys: Tensor  # [capacity, num_kv_heads, page_size, head_dim]
        self._values: Tensor  # [capacity, num_kv_heads, page_size, value_dim]
        self._allocate(max(max_pages, 2) if device.type == "cpu" else 2)
        self._use(1)

    def ensure(self, num_pages: int) -> None:
        """Makes pages 0 to ``num_pages - 1`` usable; their content is kept."""
        if num_pages <= self.used_pages:
            return
        if num_pages > self._capacity:
            keys, values, used = self._keys, self._values, self.used_pages
            self._allocate(max(num_pages, 2 * self._capacity))
            self._keys[:used], self._values[:used] = keys[:used], values[:used]
        self._use(num_pages)

    def copy_pages(self, source: Tensor, target: Tensor) -> None:
        """Copies pages ``source`` to pages ``target``, both int64 ``[n]`` page ids."""
        self._keys[target] = self._keys[source]
        self._values[target] = self._values[source]

    def gather(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Reads tokens into dense tensors.

        Args:
            slots: int64 ``[batch, tokens]``, page * page_size + offset.

        Returns:
            Keys ``[batch, num_kv_heads, tokens, head_dim]`` and values
            ``[batch, num_kv_heads, tokens, value_dim]``, in new memory.
        """
        page = torch.div(slots, self.page_size, rounding_mode="floor")
        offset = slots % self.page_size
        return (
            self.key_cache[page, offset].transpose(1, 2),
            self.value_cache[page, offset].transpose(1, 2),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> PageStorage:
        # The reserved address space is far larger than what was written; only that is copied.
        clone = copy.copy(self)
        memo[id(self)] = clone
        used = self.used_pages
        clone._allocate(self._capacity)
        clone._keys[:used], clone._values[:used] = self._keys[:used], self._values[:used]
        clone._use(used)
        return clone

    def _use(self, num_pages: int) -> None:
        # No more than what is used is shown: a compiler that copies what an operator writes to
        # would otherwise commit the whole reservation.
        self.used_pages = num_pages
        self.key_cache = self._keys[:num_pages].transpose(1, 2)
        self.value_cache = self._values[:num_pages].transpose(1, 2)

    def _allocate(self, num_pages: int) -> None:
        shape = (num_pages, self.num_kv_heads, self.page_size)
        if self.device.type == "cpu":
            region, start = _reserve(num_pages * self.page_bytes)
            stride = self.page_bytes // self.dtype.itemsize
            values_start = start + shape[1] * shape[2] * self.head_dim * self.dtype.itemsize
            self._keys = _view(region, start, self.dtype, (*shape, self.head_dim), stride)
            self._values = _view(region, values_start, self.dtype, (*shape, self.value_dim), stride)
        else:
            options: Any = {"dtype": self.dtype, "device": self.device}
            self._keys = torch.empty(*shape, self.head_dim, **options)
            self._values = torch.empty(*shape, self.value_dim, **options)
            self._keys[NULL_PAGE].zero_()
            self._values[NULL_PAGE].zero_()
        self._capacity = num_pages


def _reserve(num_bytes: int) -> tuple[mmap.mmap, int]:
    """Zeroed memory that is taken only where it is written, and its first aligned byte."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    try:
        region = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=flags)
    except OSError as error:
        raise CacheMemoryError(
            f"cannot reserve {num_bytes:,} bytes of address space for the KV cache ({error}): pass "
            "a smaller max_bytes"
        ) from error
    with contextlib.suppress(OSError):  # a kernel without huge pages: only slower
        region.madvise(mmap.MADV_HUGEPAGE)
    return region, -torch.frombuffer(region, dtype=torch.uint8).data_ptr() % _HUGE_PAGE


def _view(
    region: mmap.mmap, start: int, dtype: torch.dtype, shape: tuple[int, ...], stride: int
) -> Tensor:
    """Dense pages ``stride`` elements apart.

    Keys and values never overlap, but to torch two views of one storage do, and a compiler would
    then copy both; so each gets a storage of its own.
    """
    count = (shape[0] - 1) * stride + math.prod(shape[1:])
    flat = torch.frombuffer(region, dtype=dtype, count=count, offset=start)
    inner = [math.prod(shape[i + 1 :]) for i in range(1, len(shape))]
    return flat.as_strided(shape, (stride, *inner))
