"""The inputs of bench_decode.py, and what attention over them must give."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from common import huge_pages
from torch import Tensor

import art_torch
from art_torch.page_storage import PageStorage

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One shape, dtype, page size and number of threads.

    The sequences have ``tokens`` tokens each; ragged ones up to so many.
    """

    batch: int
    tokens: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    page_size: int
    threads: int
    ragged: bool = False

    @property
    def lens(self) -> list[int]:
        """Tokens of each sequence; of ragged ones from an eighth to all of them, if there are 8."""
        if not self.ragged:
            return self.batch * [self.tokens]
        # Not one of them, but the longest, ends where a page does.
        step = self.tokens // self.batch
        return [step * row - 7 for row in range(1, self.batch)] + [self.tokens]

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a KV head."""
        return self.num_q_heads > self.num_kv_heads

    @property
    def name(self) -> str:
        threads = "_ragged" if self.ragged else ""
        threads += f"_t{self.threads}" if self.threads > 1 else ""
        return (
            f"B{self.batch}_S{self.tokens}_H{self.num_q_heads}/{self.num_kv_heads}"
            f"_D{self.head_dim}_{self.dtype}_p{self.page_size}{threads}"
        )

    @property
    def kv_bytes(self) -> int:
        elements = sum(self.lens) * self.num_kv_heads * self.head_dim
        return 2 * elements * DTYPES[self.dtype].itemsize


@dataclass
class Inputs:
    """The tokens of a case: in shuffled pages, and contiguous."""

    query: Tensor  # [B, Hq, D]
    storage: PageStorage
    block_table: Tensor  # int32 [B, pages]
    seq_lens: Tensor  # int32 [B]
    keys: Tensor  # [B, Hkv, S, D]
    values: Tensor  # [B, Hkv, S, D]
    all_pages: Tensor  # int64, the bytes of all pages in use


def make_inputs(case: Case) -> Inputs:
    """Random tokens. All have some weight: exponentials that underflow would slow others down."""
    generator = torch.Generator().manual_seed(0)
    dtype, heads, dim, page = DTYPES[case.dtype], case.num_kv_heads, case.head_dim, case.page_size

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    query = normal(case.batch, case.num_q_heads, dim)
    keys = huge_pages(case.batch, heads, case.tokens, dim, dtype=dtype)
    values = huge_pages(case.batch, heads, case.tokens, dim, dtype=dtype)
    for row in range(case.batch):
        keys[row] = normal(heads, case.tokens, dim)
        values[row] = normal(heads, case.tokens, dim)
    pages_of = [-(-tokens // page) for tokens in case.lens]
    num_pages = sum(pages_of)
    device = torch.device("cpu")
    # Page 0 is the cache's own; a page beyond the last leaves room to look at the bytes of all.
    storage = PageStorage(heads, dim, dim, page, keys.dtype, device, num_pages + 2)
    storage.ensure(num_pages + 1)
    shuffled = torch.randperm(num_pages, generator=torch.Generator().manual_seed(1)) + 1
    block_table = torch.zeros(case.batch, max(pages_of), dtype=torch.int64)
    for row, (tokens, pages) in enumerate(zip(case.lens, shuffled.split(pages_of), strict=True)):
        block_table[row, : len(pages)] = pages
        art_torch.append_kv(
            keys[row, :, :tokens].transpose(0, 1),
            values[row, :, :tokens].transpose(0, 1),
            storage.key_cache,
            storage.value_cache,
            (pages[:, None] * page + torch.arange(page)).flatten()[:tokens],
        )
    size = storage.page_bytes // keys.dtype.itemsize
    offset = storage.key_cache.storage_offset() + size
    in_use = storage.key_cache.as_strided((num_pages * size,), (1,), offset)
    return Inputs(
        query,
        storage,
        block_table.to(torch.int32),
        torch.tensor(case.lens, dtype=torch.int32),
        keys,
        values,
        in_use.view(torch.int64),
    )


def expected_output(query: Tensor, keys: Tensor, values: Tensor, lens: list[int]) -> Tensor:
    """Attention in float64.

    Args:
        query: ``[B, Hq, D]``.
        keys: ``[B, Hkv, S, D]``.
        values: As the keys.
        lens: How many of the tokens each of the ``B`` sequences has.

    Returns:
        ``[B, Hq, D]``.
    """
    batch, heads, _, dim = keys.shape
    groups = query.double().view(batch, heads, -1, dim) * dim**-0.5
    out = torch.empty_like(groups)
    for row, tokens in enumerate(lens):
        for head in range(heads):
            logits = groups[row, head] @ keys[row, head, :tokens].double().T
            out[row, head] = logits.softmax(-1) @ values[row, head, :tokens].double()
    return out.view_as(query)


def relative_error(out: Tensor, expected: Tensor) -> float:
    """Of the whole output, in the Euclidean norm."""
    return float((out.double() - expected).norm() / expected.norm())
