"""What bench_gpu.py measures: the operator, its peers, and a plain read, as calls on inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_guided import num_coded_inputs, prepare_step, prepare_walk
from gpu_inputs import DTYPE, Inputs, error_of_contiguous, error_of_paged
from gpu_points import (
    BLOCK,
    CODE_FRACTION,
    EVERY_CHANGE,
    FRACTIONS,
    GUIDED_FRACTIONS,
    num_inputs,
    stop_after,
)
from gpu_timing import Calls
from torch import Tensor

import art_torch

FLASHINFER_WORKSPACE_BYTES = 256 << 20
TOLERANCE = 0.02  # relative to the largest output; bfloat16 rounds by up to 0.004


@dataclass
class Prepared:
    """Checked calls of one implementation, one per input; of several variants the best counts."""

    variants: list[Calls]
    num_bytes: int  # read by one call
    error: float | None = None  # largest, relative to the largest output
    note: str = ""

    def notes(self) -> str:
        """What there is to know about the result, as one line."""
        parts = [self.note] if self.note else []
        if self.error is not None:
            wrong = "" if self.error <= TOLERANCE else "WRONG: "
            parts.append(f"{wrong}max error {self.error:.1e}")
        return ", ".join(parts)


def poisoned(inputs: Inputs) -> Tensor:
    """An output in which unwritten elements show."""
    return torch.full_like(inputs.queries[0], math.nan)


def art_arguments(name: str, inputs: Inputs) -> dict[str, Any]:
    """The operator's arguments beside the tensors."""
    point = inputs.point
    if name == "art_never":
        return {"criterion": art_torch.Stability(0.0, 0.0, patience=2)}
    if name in FRACTIONS:
        patience, _ = stop_after(point.tokens, FRACTIONS[name])
        return {"criterion": art_torch.Stability(EVERY_CHANGE, EVERY_CHANGE, patience)}
    arguments: dict[str, dict[str, Any]] = {
        "art_dense": {},
        "art_invariant": {"batch_invariant": True},
        "art_oldest": {"walk": "oldest_first"},
    }
    return arguments[name]


def uneven_thresholds(inputs: Inputs) -> Tensor:
    """Thresholds ``[num_kv_heads, 2]`` that stop the heads one after the other.

    The output over random tokens is a mean that shrinks with their number: block j turns it by
    1 - cos = 1 / 2j, give or take a tenth.
    """
    point = inputs.point
    mean_blocks = sum(point.lens) / point.batch / BLOCK
    heads = torch.arange(1, point.num_kv_heads + 1) / (point.num_kv_heads + 1)
    thresholds = torch.full((point.num_kv_heads, 2), EVERY_CHANGE)
    thresholds[:, 1] = 0.5 / (heads * mean_blocks)
    return thresholds.to(inputs.pool.device)


def art_call(name: str, inputs: Inputs, result: art_torch.DecodeResult) -> Callable[[int], Any]:
    """Attention over input ``index`` into ``result``."""
    fixed = (inputs.keys.transpose(1, 2), inputs.values.transpose(1, 2))

    def tensors(index: int) -> tuple[Tensor, ...]:
        return (inputs.queries[index], *fixed, inputs.block_tables[index], inputs.seq_lens)

    if name == "art_uneven":
        # The operator itself: the Python function would stack the thresholds anew in every call.
        settings = {"criterion": 1, "thresholds": uneven_thresholds(inputs), **result._asdict()}
        return lambda index: torch.ops.art.decode_attention.out(*tensors(index), **settings)
    settings = {**art_arguments(name, inputs), "out": result}
    return lambda index: art_torch.decode_attention(*tensors(index), **settings)


def check_reads(name: str, inputs: Inputs, result: art_torch.DecodeResult) -> None:
    """That the first input was read as far as the name says.

    Raises:
        RuntimeError: It was not.
    """
    expected = inputs.seq_lens[:, None].expand_as(result.tokens_read)
    if name in FRACTIONS:
        _, tokens = stop_after(inputs.point.tokens, FRACTIONS[name])
        expected = torch.full_like(expected, tokens)
    if not torch.equal(expected, result.tokens_read):
        wrong = (expected != result.tokens_read).nonzero()[0]
        row, head = wrong.tolist()
        raise RuntimeError(
            f"expected {expected[row, head]} tokens read in row {row}, head {head}, "
            f"got {result.tokens_read[row, head]}"
        )


def prepare_art(name: str, inputs: Inputs) -> Prepared:
    point, query = inputs.point, inputs.queries[0]
    counts = (point.batch, point.num_kv_heads)
    result = art_torch.DecodeResult(
        poisoned(inputs),
        query.new_empty(query.shape[:2], dtype=torch.float32),
        query.new_empty(counts, dtype=torch.int32),
        query.new_empty(counts, dtype=torch.int32),
    )
    call = art_call(name, inputs, result)
    call(0)
    error = error_of_paged(inputs, result.out, result.tokens_read)
    note = ""
    if name != "art_uneven":
        check_reads(name, inputs, result)
        num_bytes = int(result.tokens_read.sum()) * point.token_bytes
    else:
        num_bytes, note = mean_bytes(inputs, call, result)
    if name in FRACTIONS:
        note = f"reads {num_bytes / point.kv_bytes:.1%}"
    count = min(num_inputs(num_bytes), len(inputs.queries))
    return Prepared([[partial(call, index) for index in range(count)]], num_bytes, error, note)


def mean_bytes(
    inputs: Inputs, call: Callable[[int], Any], result: art_torch.DecodeResult
) -> tuple[int, str]:
    """Bytes that a call reads over all inputs that will take turns, and a note about them."""
    point = inputs.point
    lens = inputs.seq_lens[:, None]
    num_bytes, total, least, most = point.kv_bytes, 0, 1.0, 0.0
    for index in range(len(inputs.queries)):
        if index >= num_inputs(num_bytes):
            break
        call(index)
        total += int(result.tokens_read.sum())
        fractions = result.tokens_read / lens
        least, most = min(least, float(fractions.min())), max(most, float(fractions.max()))
        num_bytes = total * point.token_bytes // (index + 1)
    return num_bytes, f"reads {num_bytes / point.kv_bytes:.1%}, heads {least:.0%} to {most:.0%}"


@cache
def flashinfer_workspace(name: str) -> Tensor:
    """Zeros: the kernels keep semaphores in it."""
    return torch.zeros(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")


def flashinfer_fa2(inputs: Inputs, out: Tensor, index: int) -> Callable[[], Any]:
    """Tensor-core decode; its plan is made here, and not timed."""
    import flashinfer

    point = inputs.point
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        flashinfer_workspace("fa2"), "HND", use_tensor_cores=True, backend="fa2"
    )
    starts = torch.zeros(point.batch + 1, dtype=torch.int32)
    starts[1:] = inputs.pages_of.cumsum(0)
    last = torch.tensor([(tokens - 1) % point.page_size + 1 for tokens in point.lens])
    wrapper.plan(
        starts,
        inputs.page_lists[index],
        last.to(torch.int32),
        point.num_q_heads,
        point.num_kv_heads,
        point.head_dim,
        point.page_size,
        q_data_type=DTYPE,
        kv_data_type=DTYPE,
    )
    cache_ = (inputs.keys, inputs.values)
    return lambda: wrapper.run(inputs.queries[index], cache_, out=out)


def flashinfer_xqa(inputs: Inputs, out: Tensor, index: int) -> Callable[[], Any]:
    import flashinfer

    return lambda: flashinfer.decode.trtllm_batch_decode_with_kv_cache(
        inputs.queries[index],
        (inputs.keys, inputs.values),
        flashinfer_workspace("xqa"),
        inputs.block_tables[index],
        inputs.seq_lens,
        max(inputs.point.lens),
        bmm1_scale=inputs.point.head_dim**-0.5,
        bmm2_scale=1.0,
        out=out,
        kv_layout="HND",
        backend="xqa",
    )


def prepare_flashinfer(name: str, inputs: Inputs) -> Prepared:
    make = {"flashinfer_fa2": flashinfer_fa2, "flashinfer_xqa": flashinfer_xqa}[name]
    out = poisoned(inputs)
    num_bytes = inputs.point.kv_bytes
    calls = [make(inputs, out, index) for index in range(num_inputs(num_bytes))]
    calls[0]()
    return Prepared([calls], num_bytes, error_of_paged(inputs, out))


def prepare_sdpa(name: str, inputs: Inputs) -> Prepared:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    point = inputs.point
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa_flash": SDPBackend.FLASH_ATTENTION}
    grouped = point.num_q_heads != point.num_kv_heads

    def call(index: int) -> Tensor:
        query = inputs.queries[index].unsqueeze(2)
        keys, values = inputs.pool.contiguous(point, index)
        with sdpa_kernel(backends[name]):
            return F.scaled_dot_product_attention(query, keys, values, enable_gqa=grouped)

    error = error_of_contiguous(inputs, call(0).squeeze(2))
    calls = [partial(call, index) for index in range(num_inputs(point.kv_bytes))]
    return Prepared([calls], point.kv_bytes, error, "contiguous cache")


def prepare_read(inputs: Inputs) -> Prepared:
    num_bytes = inputs.point.kv_bytes
    sources = [inputs.pool.bytes_of(num_bytes, index) for index in range(num_inputs(num_bytes))]
    if inputs.pool.device.type == "cpu":
        return Prepared([[source.sum for source in sources]], num_bytes)
    from gpu_read import SHAPES, SINK_ELEMENTS, read

    sink = torch.empty(SINK_ELEMENTS, dtype=torch.int32, device=inputs.pool.device)
    variants: list[Calls] = [
        [partial(read, source, sink, shape) for source in sources] for shape in SHAPES
    ]
    return Prepared(variants, num_bytes)


def prepare(name: str, inputs: Inputs) -> Prepared:
    """The calls of one implementation, whose first result has been compared with float32.

    Raises:
        Exception: What the implementation raised where it does not support the point.
    """
    if name == "art_guided_walk" or name in GUIDED_FRACTIONS:
        guided = prepare_step(name, inputs) if name in GUIDED_FRACTIONS else prepare_walk(inputs)
        calls, *rest = guided
        return Prepared([calls], *rest)
    if name.startswith("art_"):
        return prepare_art(name, inputs)
    if name == "read":
        return prepare_read(inputs)
    if inputs.pool.device.type == "cpu":
        raise NotImplementedError(f"{name} needs a GPU")
    if name.startswith("flashinfer_"):
        return prepare_flashinfer(name, inputs)
    return prepare_sdpa(name, inputs)


def inputs_needed(point_bytes: int, names: list[str]) -> int:
    """How many inputs the implementations ``names`` use at most."""
    least = min([FRACTIONS.get(name, 1.0) for name in names])
    # A stop may read a little less than its fraction, and uneven ones are only known later.
    least = min(least / 1.25, 0.25 if "art_uneven" in names else 1.0)
    count = num_inputs(max(1, int(least * point_bytes)))
    if any(name.startswith("art_guided_") for name in names):
        count = max(count, num_coded_inputs(max(1, int(CODE_FRACTION * point_bytes))))
    return count
