"""The memory of a paged KV cache: its limit, and the pages of one layer."""

from __future__ import annotations

import contextlib
import copy
import math
import mmap
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "NULL_PAGE",
    "CacheMemoryError",
    "GrowingPool",
    "MemoryBudget",
    "PagePart",
    "PageStorage",
    "default_max_bytes",
    "reserve",
    "view",
]

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

    def check(self, num_bytes: int, device: torch.device) -> None:
        """Checks that ``num_bytes`` more would fit, and counts nothing.

        Args:
            num_bytes: Bytes that are wanted.
            device: Where they are.

        Raises:
            CacheMemoryError: That would exceed the limit.
        """
        limit = self.limit(device)
        needed = self.used_bytes + num_bytes
        if needed > limit:
            raise CacheMemoryError(
                f"the KV cache needs {needed:,} bytes and its limit is "
                f"{limit:,}: pass a larger max_bytes, shorten the sequences or the batch, or "
                "reset() the cache"
            )

    def claim(self, num_bytes: int, device: torch.device, then: int = 0) -> None:
        """Counts ``num_bytes`` more as used.

        Args:
            num_bytes: Bytes to count.
            device: Where they are.
            then: Bytes that will be claimed right after, and must fit as well.

        Raises:
            CacheMemoryError: That would exceed the limit. Nothing is counted then.
        """
        self.check(num_bytes + then, device)
        self.used_bytes += num_bytes

    def release(self, num_bytes: int) -> None:
        """Counts ``num_bytes`` that were claimed as free again."""
        self.used_bytes -= num_bytes


class GrowingPool(ABC):
    """Pages of one layer that grow in number and keep their content.

    Attributes:
        page_bytes: Bytes of one page.
        used_pages: Pages that :meth:`ensure` made usable, the null page among them.
        device: Where they live.
    """

    page_bytes: int
    used_pages: int
    device: torch.device
    _capacity: int
    _pools: tuple[Tensor, ...]  # [capacity, ...] each

    def ensure(self, num_pages: int) -> None:
        """Makes pages 0 to ``num_pages - 1`` usable; their content is kept."""
        if num_pages <= self.used_pages:
            return
        if num_pages > self._capacity:
            old, used = self._pools, self.used_pages
            self._allocate(max(num_pages, 2 * self._capacity))
            self._fill(old, used)
        self._use(num_pages)

    def copy_pages(self, source: Tensor, target: Tensor) -> None:
        """Copies pages ``source`` to pages ``target``, both int64 ``[n]`` page ids."""
        for pool in self._pools:
            pool[target] = pool[source]

    def __deepcopy__(self, memo: dict[int, Any]) -> GrowingPool:
        # The reserved address space is far larger than what was written; only that is copied.
        clone = copy.copy(self)
        memo[id(self)] = clone
        clone._allocate(self._capacity)
        clone._fill(self._pools, self.used_pages)
        clone._use(self.used_pages)
        return clone

    def _fill(self, old: tuple[Tensor, ...], used: int) -> None:
        for pool, source in zip(self._pools, old, strict=True):
            pool[:used] = source[:used]

    @abstractmethod
    def _allocate(self, num_pages: int) -> None:
        """Makes new ``_pools`` for so many pages."""

    @abstractmethod
    def _use(self, num_pages: int) -> None:
        """Shows the first ``num_pages`` pages."""


class PagePart(NamedTuple):
    """A part of a page, dense in memory: ``[num_kv_heads, page_size, ...]``."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


class PageStorage(GrowingPool):
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
        scales: What else operators want to know of both, by the names of their arguments.
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
        self._parts = self.parts_of(num_kv_heads, head_dim, value_dim, page_size, dtype)
        self.page_bytes = sum(part.num_bytes for part in self._parts)
        self._allocate(max(max_pages, 2) if device.type == "cpu" else 2)
        self.foreign_writes = 0
        self._use(1)

    @classmethod
    def parts_of(
        cls, num_kv_heads: int, head_dim: int, value_dim: int, page_size: int, dtype: torch.dtype
    ) -> tuple[PagePart, ...]:
        """What a page consists of, in memory one behind the other; every other part is of keys."""
        tokens = (num_kv_heads, page_size)
        return PagePart(dtype, (*tokens, head_dim)), PagePart(dtype, (*tokens, value_dim))

    def _writes_to_keys(self) -> int:
        return sum(pool._version for pool in self._pools[::2])

    @property
    def foreign_writes(self) -> int:
        """PyTorch operations that wrote to the keys, those of this class left out.

        :func:`art_torch.append_kv` does not count. Set it to 0 to accept what was written.
        """
        return self._writes_to_keys() - self._own_version

    @foreign_writes.setter
    def foreign_writes(self, count: int) -> None:
        self._own_version = self._writes_to_keys() - count

    def copy_pages(self, source: Tensor, target: Tensor) -> None:
        """Copies pages ``source`` to pages ``target``, both int64 ``[n]`` page ids."""
        foreign = self.foreign_writes
        super().copy_pages(source, target)
        self.foreign_writes = foreign

    def _fill(self, old: tuple[Tensor, ...], used: int) -> None:
        foreign = sum(pool._version for pool in old[::2]) - self._own_version
        super()._fill(old, used)
        self.foreign_writes = foreign

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

    def _use(self, num_pages: int) -> None:
        # No more than what is used is shown: a compiler that copies what an operator writes to
        # would otherwise commit the whole reservation.
        self.used_pages = num_pages
        # [num_pages, num_kv_heads, page_size, head_dim or value_dim]
        shown = [pool[:num_pages].transpose(1, 2) for pool in self._pools]
        self.key_cache, self.value_cache = shown[:2]
        self.scales = dict(zip(("key_scale", "value_scale"), shown[2:], strict=False))

    # Inference tensors would not count what is written to them.
    @torch.inference_mode(False)
    def _allocate(self, num_pages: int) -> None:
        if self.device.type == "cpu":
            region, start = reserve(num_pages * self.page_bytes)
            pools = []
            for dtype, shape in self._parts:
                stride = self.page_bytes // dtype.itemsize
                pools.append(view(region, start, dtype, (num_pages, *shape), stride))
                start += PagePart(dtype, shape).num_bytes
            self._pools = tuple(pools)
        else:
            self._pools = tuple(
                torch.empty(num_pages, *shape, dtype=dtype, device=self.device)
                for dtype, shape in self._parts
            )
            for pool in self._pools:
                pool[NULL_PAGE].zero_()
        self._capacity = num_pages


def reserve(num_bytes: int) -> tuple[mmap.mmap, int]:
    """Zeroed memory that is taken only where it is written, and its first aligned byte."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    try:
        region = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=flags)
    except OSError as error:
        raise CacheMemoryError(
            f"cannot reserve {num_bytes:,} bytes of address space for the KV cache ({error}): pass "
            "a smaller max_bytes"
        ) from error
    # Only slower without them: not every system has the advice, and a kernel may refuse it.
    if (advice := getattr(mmap, "MADV_HUGEPAGE", None)) is not None:
        with contextlib.suppress(OSError):
            region.madvise(advice)
    return region, -torch.frombuffer(region, dtype=torch.uint8).data_ptr() % _HUGE_PAGE


def view(
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
