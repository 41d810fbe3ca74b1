"""Random keys and values for all points of bench_gpu.py, and what attention over them must give."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from gpu_points import ELEMENT_BYTES, SINK_TOKENS, Point
from torch import Tensor

DTYPE = torch.bfloat16
READ_BYTES = 32 << 10  # what one program of the plain read loads at most
FILL_ELEMENTS = 1 << 28  # at once: random number generators do not like more than 2^31


class Pool:
    """Keys and values, drawn once. Every point sees them as pages, or contiguous, of its shape."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.device = device
        self.data = torch.empty(num_bytes // ELEMENT_BYTES, dtype=DTYPE, device=device)
        generator = torch.Generator(device).manual_seed(0)
        for chunk in self.data.split(FILL_ELEMENTS):
            chunk.normal_(generator=generator)
        self.keys, self.values = self.data.chunk(2)

    def pages(self, point: Point) -> tuple[Tensor, Tensor]:
        """Keys and values ``[num_pages, num_kv_heads, page_size, head_dim]``."""
        shape = (point.num_kv_heads, point.page_size, point.head_dim)
        num_pages = self.keys.numel() // torch.Size(shape).numel()
        size = num_pages * torch.Size(shape).numel()
        return self.keys[:size].view(-1, *shape), self.values[:size].view(-1, *shape)

    def contiguous(self, point: Point, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch, num_kv_heads, tokens, head_dim]`` of one input."""
        shape = (point.batch, point.num_kv_heads, point.tokens, point.head_dim)
        size = torch.Size(shape).numel()
        start = window(index, size, self.keys.numel())
        part = slice(start, start + size)
        return self.keys[part].view(shape), self.values[part].view(shape)

    def bytes_of(self, num_bytes: int, index: int) -> Tensor:
        """int32 view of about ``num_bytes`` bytes, for a plain read."""
        size = -(-num_bytes // READ_BYTES) * READ_BYTES // ELEMENT_BYTES
        start = window(index, size, self.data.numel())
        return self.data[start : start + size].view(torch.int32)


def window(index: int, size: int, total: int) -> int:
    """Where the ``index``-th piece of ``size`` elements starts: apart while there is room."""
    room = total - size
    if room < 0:
        raise ValueError(f"the pool must have {size} elements, has {total}")
    aligned = READ_BYTES // ELEMENT_BYTES
    return index * size % (room + 1) // aligned * aligned


@dataclass
class Inputs:
    """``num_inputs`` inputs of one point, over pages in random order."""

    point: Point
    pool: Pool
    queries: Tensor  # [num_inputs, batch, num_q_heads, head_dim]
    block_tables: Tensor  # int32 [num_inputs, batch, max_pages]
    page_lists: list[Tensor]  # per input int32: the pages of all sequences, one after the other
    seq_lens: Tensor  # int32 [batch]
    pages_of: Tensor  # int32 [batch], on the host: pages of each sequence
    keys: Tensor  # [num_pages, num_kv_heads, page_size, head_dim]
    values: Tensor


def make_inputs(point: Point, pool: Pool, num_inputs: int) -> Inputs:
    device = pool.device
    generator = torch.Generator(device).manual_seed(point.batch)
    keys, values = pool.pages(point)
    pages_of = torch.tensor([-(-tokens // point.page_size) for tokens in point.lens])
    needed, widest = int(pages_of.sum()), int(pages_of.max())
    order = torch.randperm(keys.shape[0], generator=generator, device=device).to(torch.int32)
    room = order.numel() - needed
    if room < 0:
        raise ValueError(f"{point.name}: {needed} pages needed, the pool has {order.numel()}")
    used = torch.arange(widest, device=device) < pages_of.to(device)[:, None]
    tables = torch.zeros(num_inputs, point.batch, widest, dtype=torch.int32, device=device)
    lists = []
    for index in range(num_inputs):
        start = index * needed % (room + 1)
        lists.append(order[start : start + needed].contiguous())
        tables[index][used] = lists[-1]
    shape = (num_inputs, point.batch, point.num_q_heads, point.head_dim)
    queries = torch.randn(shape, generator=generator, device=device).to(DTYPE)
    lens = torch.tensor(point.lens, dtype=torch.int32, device=device)
    return Inputs(point, pool, queries, tables, lists, lens, pages_of.to(torch.int32), keys, values)


def paged_tokens(inputs: Inputs, row: int, head: int) -> tuple[Tensor, Tensor]:
    """Keys and values ``[tokens, head_dim]`` of one sequence and head of the first input."""
    tokens = inputs.point.lens[row]
    pages = inputs.block_tables[0, row, : inputs.pages_of[row]].long()

    def gather(cache: Tensor) -> Tensor:
        return cache[pages, head].flatten(0, 1)[:tokens]

    return gather(inputs.keys), gather(inputs.values)


def first_read(tokens: Tensor, count: int) -> Tensor:
    """The ``count`` tokens that the default walk reads first; it ends in whole units."""
    if count == len(tokens):
        return tokens
    return torch.cat((tokens[:SINK_TOKENS], tokens[len(tokens) - (count - SINK_TOKENS) :]))


def largest_error(out: Tensor, query: Tensor, keys: Tensor, values: Tensor) -> float:
    """Of ``out`` ``[group, head_dim]`` against float32, relative to its largest element."""
    logits = query.float() @ keys.float().T * query.shape[-1] ** -0.5
    expected = logits.softmax(-1) @ values.float()
    error = (out.float() - expected).abs().max() / expected.abs().max()
    return float(error)


def error_of(
    inputs: Inputs, out: Tensor, tokens_at: Callable[[int, int], tuple[Tensor, Tensor]]
) -> float:
    """Largest error of the first input's ``out`` ``[batch, num_q_heads, head_dim]`` at two heads.

    Args:
        inputs: Whose queries were used.
        out: What an implementation computed.
        tokens_at: The keys and values ``[tokens, head_dim]`` it read, of a sequence and a KV head.

    Returns:
        NaN if an element of any head is not a number.
    """
    point = inputs.point
    group = point.num_q_heads // point.num_kv_heads
    errors = [0.0 if bool(out.isfinite().all()) else float("nan")]
    for row, head in ((0, 0), (point.batch - 1, point.num_kv_heads - 1)):
        heads = slice(head * group, (head + 1) * group)
        errors.append(
            largest_error(out[row, heads], inputs.queries[0, row, heads], *tokens_at(row, head))
        )
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


def error_of_paged(inputs: Inputs, out: Tensor, tokens_read: Tensor | None = None) -> float:
    """``tokens_read`` ``[batch, num_kv_heads]``: how far the default walk went; None: all."""

    def tokens_at(row: int, head: int) -> tuple[Tensor, Tensor]:
        keys, values = paged_tokens(inputs, row, head)
        count = len(keys) if tokens_read is None else int(tokens_read[row, head])
        return first_read(keys, count), first_read(values, count)

    return error_of(inputs, out, tokens_at)


def error_of_contiguous(inputs: Inputs, out: Tensor) -> float:
    keys, values = inputs.pool.contiguous(inputs.point, 0)
    return error_of(inputs, out, lambda row, head: (keys[row, head], values[row, head]))
