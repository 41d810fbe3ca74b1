"""The implementations that bench_decode.py always has: art_torch, PyTorch, and a plain read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import huge_pages
from decode_inputs import Case, Inputs, expected_output, relative_error
from gpu_points import EVERY_CHANGE, stop_after
from torch import Tensor

import art_torch
from art_torch import reference
from art_torch._decode_arguments import checked_rules, criterion_arguments
from art_torch.int8_storage import Int8PageStorage

NEVER = art_torch.Stability(0.0, 0.0, patience=2**30)
FRACTIONS = {"art_half": 0.5, "art_tenth": 0.1}
PAGE_SIZE = 64  # as of ARTCache; other sizes tell what contiguous runs gain
FEWEST_TOKENS = 2048  # that an implementation which reads a fraction is measured on
# Of outputs, relative to their norm. An output of many random tokens is small, so rounding weighs
# more than it would elsewhere; a wrong head or token gives about 1.
TOLERANCE = {"f32": 1e-5, "bf16": 1e-2, "f16": 2e-3}


@dataclass
class Implementation:
    """One way to compute a case.

    Attributes:
        call: Computes it and returns the output ``[B, Hq, D]``.
        num_bytes: Bytes of keys and values that one call reads.
        tolerance: Largest relative error of a right result; None if there is nothing to compare.
        note: For the result file.
        own_threads: Whether it computes with threads that are not PyTorch's.
        expected: What it must return, if not attention over the case's own tokens.
    """

    call: Callable[[], Any]
    num_bytes: int
    tolerance: float | None
    note: str = ""
    own_threads: bool = False
    expected: Tensor | None = None


def art(case: Case, inputs: Inputs) -> dict[str, Implementation]:
    """The operator, as others' are called; those that stop are checked to do so where they say."""

    storage = inputs.storage
    cache = (storage.key_cache, storage.value_cache, inputs.block_table, inputs.seq_lens)

    def result(criterion: art_torch.Stability | None) -> Callable[[], tuple[Tensor, ...]]:
        rules = criterion_arguments(checked_rules(criterion), storage.key_cache)
        operator = torch.ops.art.decode_attention.default
        return partial(operator, inputs.query, *cache, **rules, **storage.scales)

    def output(criterion: art_torch.Stability | None) -> Callable[[], Tensor]:
        call = result(criterion)
        return lambda: call()[0]

    tolerance, whole = TOLERANCE[case.dtype], case.kv_bytes
    implementations = {
        "art_dense": Implementation(output(None), whole, tolerance),
        "art_never": Implementation(output(NEVER), whole, tolerance),
    }
    for name, fraction in FRACTIONS.items():
        if case.ragged or case.tokens < FEWEST_TOKENS:
            continue
        patience, tokens = stop_after(case.tokens, fraction)
        criterion = art_torch.Stability(EVERY_CHANGE, EVERY_CHANGE, patience)
        read = result(criterion)()[2]
        if not (read == tokens).all():
            raise RuntimeError(f"{case.name}: expected {tokens} tokens read, got {read.tolist()}")
        implementations[name] = Implementation(
            output(criterion),
            whole * tokens // case.tokens,
            None,
            f"stops after exactly {tokens} of {case.tokens} tokens",
        )
    return implementations


def art_int8(case: Case, inputs: Inputs) -> dict[str, Implementation]:
    """art_torch with the same pages in a cache of int8, beside float32."""
    if case.dtype != "f32":
        return {}
    own, page = inputs.storage, case.page_size
    sizes = own.num_kv_heads, own.head_dim, own.value_dim, page
    storage = Int8PageStorage(*sizes, own.dtype, own.device, own.used_pages)
    storage.ensure(own.used_pages)
    for index in range(1, own.used_pages):
        slots = index * page + torch.arange(page)
        caches = storage.key_cache, storage.value_cache
        rows = own.key_cache[index], own.value_cache[index]
        art_torch.append_kv(*rows, *caches, slots, **storage.scales)
    keys, values = (
        reference.dequantize(*reference.quantize(rows), torch.float32)
        for rows in (inputs.keys, inputs.values)
    )
    expected = expected_output(inputs.query, keys, values, case.lens)
    num_bytes = case.kv_bytes // (4 * case.head_dim) * (case.head_dim + 4)
    implementations = art(case, replace(inputs, storage=storage))
    return {
        f"art_int8{name.removeprefix('art').removesuffix('_dense')}": replace(
            each, num_bytes=each.num_bytes * num_bytes // case.kv_bytes, expected=expected
        )
        for name, each in implementations.items()
        if name != "art_tenth"
    }


def art_tokens_last(case: Case, inputs: Inputs) -> dict[str, Implementation]:
    """art_torch over keys whose tokens are contiguous, ``[pages, Hkv, D, page]``: as vLLM's are."""
    if case.page_size != PAGE_SIZE or case.dtype == "f16" or case.tokens < FEWEST_TOKENS:
        return {}
    own = inputs.storage
    rows = own.key_cache[: own.used_pages].permute(0, 2, 3, 1)
    keys = huge_pages(*rows.shape, dtype=rows.dtype).copy_(rows).permute(0, 3, 1, 2)
    values = own.value_cache[: own.used_pages]
    cache = (keys, values, inputs.block_table, inputs.seq_lens)
    call = partial(torch.ops.art.decode_attention.default, inputs.query, *cache)
    tolerance = TOLERANCE[case.dtype]
    note = "tokens of keys are contiguous"
    return {"art_tokens_last": Implementation(lambda: call()[0], case.kv_bytes, tolerance, note)}


def sdpa_packed(case: Case, inputs: Inputs) -> Implementation:
    """PyTorch; of ragged sequences one after the other, so that it need not read padding."""
    query = inputs.query.view(case.batch, case.num_kv_heads, -1, case.head_dim)
    if not case.ragged:
        whole = partial(F.scaled_dot_product_attention, query, inputs.keys, inputs.values)
        return Implementation(whole, case.kv_bytes, TOLERANCE[case.dtype], "contiguous cache")
    rows = [
        (query[row, None], inputs.keys[row, None, :, :tokens], inputs.values[row, None, :, :tokens])
        for row, tokens in enumerate(case.lens)
    ]

    def in_turn() -> Tensor:
        return torch.cat([F.scaled_dot_product_attention(*row) for row in rows])

    note = "contiguous cache, one call a sequence"
    return Implementation(in_turn, case.kv_bytes, TOLERANCE[case.dtype], note)


def plain_read(inputs: Inputs) -> Implementation:
    pages = inputs.all_pages
    num_bytes = pages.numel() * pages.itemsize
    return Implementation(lambda: pages.sum(), num_bytes, None, "the same pages in order")


def check(case: Case, inputs: Inputs, implementations: dict[str, Implementation]) -> None:
    """Compares every output with float64.

    Raises:
        RuntimeError: One is wrong.
    """
    expected = expected_output(inputs.query, inputs.keys, inputs.values, case.lens)
    for name, implementation in implementations.items():
        if implementation.tolerance is None:
            continue
        right = expected if implementation.expected is None else implementation.expected
        error = relative_error(implementation.call().view(right.shape), right)
        if not error <= implementation.tolerance:
            raise RuntimeError(
                f"{case.name}: {name} must be within {implementation.tolerance:g} of attention in "
                f"float64, its error is {error:.2g}"
            )
