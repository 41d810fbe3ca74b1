"""The guided walk in bench_gpu.py: codes of every input, the walk alone, and a whole step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_inputs import Inputs, error_of, paged_tokens
from gpu_points import EVERY_CHANGE, GUIDED_FRACTIONS, num_inputs, stop_after
from gpu_timing import Calls
from torch import Tensor

import art_torch
from art_torch.guided import GROUP_TOKENS, UNIT_TOKENS

MAX_CODED_INPUTS = 256  # of short sequences there would be thousands


@dataclass
class Coded:
    """Codes of some inputs, each in records of its own: none is in the L2 cache when it is read."""

    inputs: Inputs
    pools: list[Tensor]  # uint8 [num_groups, num_kv_heads, record_bytes]
    table: Tensor  # int32 [batch, max_groups]: the same records in all pools
    num_bytes: int  # of the records that one call reads

    def walk(self, index: int) -> art_torch.GuidedWalk:
        inputs = self.inputs
        return art_torch.guided_walk(
            inputs.queries[index],
            inputs.keys.transpose(1, 2),
            inputs.block_tables[index],
            inputs.seq_lens,
            self.pools[index],
            self.table,
        )


def num_coded_inputs(num_bytes: int) -> int:
    """How many inputs take turns, where one call reads ``num_bytes``."""
    return min(num_inputs(num_bytes), MAX_CODED_INPUTS)


def code_bytes(inputs: Inputs) -> int:
    """Of the records of one input."""
    point = inputs.point
    groups = sum(tokens // GROUP_TOKENS for tokens in point.lens)
    return groups * point.num_kv_heads * art_torch.key_code_bytes(point.head_dim)


def encode(inputs: Inputs, num_bytes: int) -> Coded:
    """Codes of the inputs that take turns, where one call reads ``num_bytes``."""
    point, device = inputs.point, inputs.pool.device
    count = min(num_coded_inputs(num_bytes), len(inputs.queries)) if device.type == "cuda" else 2
    groups = inputs.block_tables.shape[-1] * point.page_size // GROUP_TOKENS
    order = torch.randperm(point.batch * groups, generator=torch.Generator().manual_seed(0))
    table = order.view(point.batch, groups).to(device, torch.int32)
    shape = (order.numel(), point.num_kv_heads, art_torch.key_code_bytes(point.head_dim))
    pools = []
    for index in range(count):
        pools.append(torch.zeros(shape, dtype=torch.uint8, device=device))
        keys = inputs.keys.transpose(1, 2)
        art_torch.encode_keys(keys, inputs.block_tables[index], inputs.seq_lens, pools[-1], table)
    return Coded(inputs, pools, table, code_bytes(inputs))


def step(coded: Coded, patience: int, index: int) -> art_torch.DecodeResult:
    """Scores, order, and attention that ends at the same block whatever it reads."""
    inputs = coded.inputs
    return art_torch.decode_attention(
        inputs.queries[index],
        inputs.keys.transpose(1, 2),
        inputs.values.transpose(1, 2),
        inputs.block_tables[index],
        inputs.seq_lens,
        walk="guided",
        key_codes=coded.pools[index],
        code_table=coded.table,
        criterion=art_torch.Stability(EVERY_CHANGE, EVERY_CHANGE, patience),
    )


def error_of_walk(
    inputs: Inputs, walk: art_torch.GuidedWalk, result: art_torch.DecodeResult
) -> float:
    """Of attention over as much of the walk as was read, which ends in whole units."""

    def tokens_at(row: int, head: int) -> tuple[Tensor, Tensor]:
        keys, values = paged_tokens(inputs, row, head)
        count = -(-int(result.tokens_read[row, head]) // UNIT_TOKENS)
        units = walk.walk[row, head, :count].long()
        tokens = (
            units[:, None] * UNIT_TOKENS + torch.arange(UNIT_TOKENS, device=units.device)
        ).flatten()
        tokens = tokens[tokens < len(keys)]
        return keys[tokens], values[tokens]

    return error_of(inputs, result.out, tokens_at)


def kernel_times(calls: Calls) -> str:
    """Mean time of the kernels of a guided walk by themselves, as the profiler sees them.

    The order gets ready while the scores still run; its time is what it takes after their end.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for call in calls:
            call()
        torch.cuda.synchronize()

    def spans(*names: str) -> list[tuple[float, float]]:
        events = [e for e in profiler.events() if any(name in e.name for name in names)]
        return sorted((e.time_range.start, e.time_range.end) for e in events)

    scores, orders = spans("tensor_kernel", "plain_kernel"), spans("order_kernel")
    if not len(scores) == len(orders) == len(calls):
        raise RuntimeError(
            f"expected {len(calls)} kernels of each kind, got {len(scores)} and {len(orders)}"
        )
    of_scores = sum(end - start for start, end in scores)
    of_order = sum(
        end - max(start, scored) for (_, scored), (start, end) in zip(scores, orders, strict=True)
    )
    return f"scores {of_scores / len(calls):.1f} us, order {of_order / len(calls):.1f} us"


def prepare_walk(inputs: Inputs) -> tuple[Calls, int, float | None, str]:
    """Scores and order alone; the bytes are those of the codes, for the ceiling is to read them."""
    num_bytes = code_bytes(inputs)
    coded = encode(inputs, num_bytes)
    calls: list[Callable[[], Any]] = [partial(coded.walk, i) for i in range(len(coded.pools))]
    lens = calls[0]().walk_lens
    if not torch.equal(lens, -(-inputs.seq_lens[:, None] // UNIT_TOKENS).expand_as(lens)):
        raise RuntimeError("expected every unit in the walk")
    on_gpu = inputs.pool.device.type == "cuda"
    return calls, num_bytes, None, kernel_times(calls) if on_gpu else ""


def prepare_step(name: str, inputs: Inputs) -> tuple[Calls, int, float | None, str]:
    """A whole step, the walk included: calls, bytes, largest error of the first, and a note."""
    point = inputs.point
    patience, tokens = stop_after(point.tokens, GUIDED_FRACTIONS[name])
    num_bytes = tokens * point.batch * point.num_kv_heads * point.token_bytes + code_bytes(inputs)
    coded = encode(inputs, num_bytes)
    result = step(coded, patience, 0)
    if not (result.tokens_read == tokens).all():
        raise RuntimeError(f"expected {tokens} tokens read, got {result.tokens_read.tolist()}")
    error = error_of_walk(inputs, coded.walk(0), result)
    calls: list[Callable[[], Any]] = [
        partial(step, coded, patience, index) for index in range(len(coded.pools))
    ]
    return calls, num_bytes, error, f"reads {num_bytes / point.kv_bytes:.1%} with codes"
