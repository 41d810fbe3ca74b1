"""The inputs of bench_decode.py: shapes, and tokens on which reading may stop exactly half way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from common import huge_pages
from torch import Tensor

import art_torch
from art_torch.page_storage import PageStorage

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
SINK_TOKENS = 64  # read first by the default walk, sink_recent
HALF = art_torch.Stability.paper()  # stops half way on these inputs


@dataclass(frozen=True)
class Case:
    """One shape, dtype, page size and number of threads."""

    batch: int
    tokens: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    page_size: int
    threads: int

    @property
    def name(self) -> str:
        threads = f"_t{self.threads}" if self.threads > 1 else ""
        return (
            f"B{self.batch}_S{self.tokens}_H{self.num_q_heads}/{self.num_kv_heads}"
            f"_D{self.head_dim}_{self.dtype}_p{self.page_size}{threads}"
        )

    @property
    def kv_bytes(self) -> int:
        elements = self.batch * self.tokens * self.num_kv_heads * self.head_dim
        return 2 * elements * DTYPES[self.dtype].itemsize


@dataclass
class Inputs:
    """The tokens of a case: in shuffled pages, and contiguous."""

    query: Tensor  # [B, Hq, D]
    storage: PageStorage
    block_table: Tensor  # [B, pages]
    seq_lens: Tensor  # [B]
    keys: Tensor  # [B, Hkv, S, D]
    values: Tensor  # [B, Hkv, S, D]
    all_pages: Tensor  # int64, the bytes of all pages in use


def make_tokens(case: Case, settled: range) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, keys and values; the keys of the tokens ``settled`` get no weight at all."""
    generator = torch.Generator().manual_seed(0)
    dtype, batch, heads = DTYPES[case.dtype], case.batch, case.num_kv_heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    query = normal(batch, case.num_q_heads, case.head_dim)
    keys = huge_pages(batch, heads, case.tokens, case.head_dim, dtype=dtype)
    values = huge_pages(batch, heads, case.tokens, case.head_dim, dtype=dtype)
    for row in range(batch):
        keys[row] = normal(heads, case.tokens, case.head_dim)
        values[row] = normal(heads, case.tokens, case.head_dim)
    # A dimension in which all queries agree: a large negative number there is a logit of -1000.
    query[..., 0] = 1.0
    keys[:, :, settled.start : settled.stop, 0] = -1000.0 * case.head_dim**0.5
    return query, keys, values


def make_inputs(case: Case, settles: bool = True) -> Inputs:
    """The tokens of a case.

    Args:
        case: Its shape.
        settles: Whether half of the tokens have no weight, so that ``HALF`` stops at them.
    """
    # The walk: 64 sink tokens, then from the newest backwards. What comes after its first half,
    # and the blocks that complete the patience before that, is settled.
    settled = case.tokens // 2 + HALF.patience * 64 if settles else 0
    query, keys, values = make_tokens(case, range(SINK_TOKENS, SINK_TOKENS + settled))
    heads, dim, page = case.num_kv_heads, case.head_dim, case.page_size
    pages_per_row = case.tokens // page
    num_pages = case.batch * pages_per_row
    device = torch.device("cpu")
    # Page 0 is the cache's own; a page beyond the last leaves room to look at the bytes of all.
    storage = PageStorage(heads, dim, dim, page, keys.dtype, device, num_pages + 2)
    storage.ensure(num_pages + 1)
    shuffled = torch.randperm(num_pages, generator=torch.Generator().manual_seed(1)) + 1
    block_table = shuffled.view(case.batch, pages_per_row)
    for row in range(case.batch):
        art_torch.append_kv(
            keys[row].transpose(0, 1),
            values[row].transpose(0, 1),
            storage.key_cache,
            storage.value_cache,
            (block_table[row][:, None] * page + torch.arange(page)).flatten(),
        )
    size = storage.page_bytes // keys.dtype.itemsize
    offset = storage.key_cache.storage_offset() + size
    in_use = storage.key_cache.as_strided((num_pages * size,), (1,), offset)
    return Inputs(
        query,
        storage,
        block_table.to(torch.int32),
        torch.full((case.batch,), case.tokens, dtype=torch.int32),
        keys,
        values,
        in_use.view(torch.int64),
    )
