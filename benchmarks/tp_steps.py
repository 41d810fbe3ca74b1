"""The time of a decode step of bench_tensor_parallel.py: points, caches, and the clock."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from common import recorded
from gpu_points import EVERY_CHANGE, stop_after
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tp_models import Ranks
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import art_torch
from art_torch import ARTCache
from art_torch.integrations.transformers import cache_argument

WARMUP = 2
STEPS = 6
PROFILED = 2
PAGE = 64  # of ARTCache: as many tokens are kept free for the steps, so that no cache grows

# The most telling first, for a run may end early.
IMPLEMENTATIONS = ("art_dense", "sdpa_dynamic", "art_half", "art_guided_10", "sdpa_static")
POINTS = ((1, 32), (8, 32), (32, 32), (32, 8), (1, 8), (8, 8))  # batch, thousands of tokens
SMOKE_POINTS = ((1, 1), (2, 1))

# Of the memory that is free, what a point may take; and how many times the keys and values of one
# layer come on top of those in the cache: made, put in order, and repeated for the query heads.
SHARE_OF_FREE = 0.92
EXTRA_LAYERS = 4.2
CACHE_OVERHEAD = 1.1  # key codes
SMOKE_FREE_BYTES = 3_700_000  # for each rank: the larger point has room for half the layers

Row = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One batch and context, and the layers of the model that are run."""

    batch: int
    tokens: int
    config: LlamaConfig
    layers: int

    @property
    def name(self) -> str:
        config = self.config
        heads = f"H{config.num_attention_heads}/{config.num_key_value_heads}"
        return f"B{self.batch}_S{self.tokens}_{heads}_D{config.head_dim}_bf16_L{self.layers}"

    @property
    def layer_bytes(self) -> int:
        """Keys and values of one layer, all heads."""
        return self.batch * self.tokens * self.config.num_key_value_heads * self.token_bytes

    @property
    def token_bytes(self) -> int:
        """A key and a value of one head."""
        return 2 * self.config.head_dim * torch.bfloat16.itemsize

    @property
    def filled(self) -> int:
        """Tokens in the cache before the first step."""
        return self.tokens - PAGE // 2


def make_points(config: LlamaConfig, free_bytes: int, smoke: bool) -> list[Point]:
    """The points, each with as many layers as one device has room for."""
    points = []
    for batch, thousands in SMOKE_POINTS if smoke else POINTS:
        point = Point(batch, thousands * 1024, config, config.num_hidden_layers)
        room = SHARE_OF_FREE * free_bytes / point.layer_bytes - EXTRA_LAYERS
        layers = min(point.layers, int(room / CACHE_OVERHEAD) // 2 * 2)
        if layers >= 2:
            points.append(replace(point, layers=layers))
    return points


# ---------------------------------------------------------------- one implementation


def make_cache(impl: str, point: Point, kv_heads: int, device: torch.device) -> Any:
    """A cache of random keys and values, those of all layers alike."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (point.batch, kv_heads, point.filled, point.config.head_dim)
    key, value = torch.empty(2, *shape, dtype=torch.bfloat16, device=device)
    for tensor in (key, value):
        for row in tensor:  # random number generators do not like more than 2^31 elements
            row.normal_(generator=generator)
    if impl.startswith("art_"):
        limit = int(1.3 * point.layers * point.layer_bytes) + (64 << 20)
        art = ARTCache(point.config, page_size=PAGE, max_bytes=limit)
        for layer in art.layers:
            layer.append(key, value, None)
        return art
    if impl == "sdpa_dynamic":
        cache = DynamicCache(config=point.config)
    else:
        cache = StaticCache(config=point.config, max_cache_len=point.tokens)
    for index in range(point.layers):
        cache.update(key, value, index)
    return cache


def patched(impl: str, model: LlamaForCausalLM, point: Point) -> Any:
    """The model with the rule of an implementation; None for its own attention."""
    if not impl.startswith("art_"):
        return nullcontext()
    if impl == "art_dense":
        return art_torch.patch(model, None)
    fraction, walk = (0.5, "sink_recent") if impl == "art_half" else (0.1, "guided")
    patience, _ = stop_after(point.tokens, fraction)
    rule = art_torch.Stability(EVERY_CHANGE, EVERY_CHANGE, patience)
    return art_torch.patch(model, rule, walk, exact_where_faster=False)


@contextmanager
def first_layers(model: LlamaForCausalLM, layers: int) -> Iterator[None]:
    """The model runs its first layers only."""
    before = model.config.num_hidden_layers
    model.config.num_hidden_layers = layers
    try:
        yield
    finally:
        model.config.num_hidden_layers = before


def time_steps(
    model: LlamaForCausalLM, impl: str, point: Point, ranks: Ranks, gpus: int, graphs: bool
) -> list[Row]:
    """Times decode steps of the model; of a split one on all ranks together.

    Returns:
        A row of steps that Python launches, and one of steps that a CUDA graph replays if
        ``graphs`` and the cache allow it.
    """
    device, kv_heads = ranks.device, point.config.num_key_value_heads // gpus
    rows: list[Row] = []
    with first_layers(model, point.layers), torch.no_grad():
        # Configs of a point and of the model are apart: a cache asks for the layers there are.
        own = replace(point, config=model.config)
        cache = make_cache(impl, own, kv_heads, device)
        with patched(impl, model, own) as handle:
            generator = torch.Generator(device).manual_seed(0)
            vocab, shape = point.config.vocab_size, (point.batch, 1)
            token = torch.randint(vocab, shape, generator=generator, device=device)

            def step() -> None:
                model(token, logits_to_keep=1, **{cache_argument(model): cache})

            row = timed(step, ranks) | kernel_times(step, ranks)
            rows.append(row | {"graph": False} | read_by(handle, gpus))
            if graphs and impl != "sdpa_dynamic":
                try:
                    replayed = replay_times(model, token, cache, own, ranks)
                except torch.OutOfMemoryError as error:
                    replayed = {"us": None, "note": out_of_memory(error)}
                except RuntimeError as error:  # whatever cannot be captured
                    first_line = str(error).splitlines()[0][:200]
                    replayed = {"us": None, "note": f"not captured: {first_line}"}
                rows.append(replayed | {"graph": True} | read_by(handle, gpus))
    names = {"case": point.name, "impl": impl, "gpus": gpus, "layers": point.layers}
    return [names | row for row in rows]


def read_by(handle: Any, gpus: int) -> Row:
    """What the steps so far have read, by the statistics of all ranks."""
    if handle is None:
        return {"read": 1.0}
    stats = handle.stats if gpus == 1 else handle.gather_stats()
    row = {
        "read": round(stats.read_fraction(), 4),
        "kv_heads_counted": stats.tokens_read().shape[1],
    }
    if stats.exact_fallbacks:
        row["exact_fallbacks"] = stats.exact_fallbacks
    return row


def timed(step: Callable[[], None], ranks: Ranks) -> Row:
    """Microseconds of each step after the first ones, and until all its work was launched."""
    times, launches = [], []
    for _ in range(WARMUP + STEPS):
        ranks.synchronize()
        start = time.perf_counter()
        step()
        launched = time.perf_counter()
        ranks.synchronize()
        times.append((time.perf_counter() - start) * 1e6)
        launches.append((launched - start) * 1e6)
    times, launches = times[WARMUP:], launches[WARMUP:]
    return {
        "us": round(median(times), 1),
        "us_min": round(min(times), 1),
        "us_max": round(max(times), 1),
        "us_until_launched": round(median(launches), 1),
        "note": "",
    }


def replay_times(
    model: LlamaForCausalLM, token: Tensor, cache: Any, point: Point, ranks: Ranks
) -> Row:
    """The same of a step in a CUDA graph, that of NCCL included.

    On the CPU, for trying the benchmark out, the step itself.
    """
    seen = int(cache.get_seq_length())
    position = torch.full((point.batch, 1), seen, device=ranks.device)
    if isinstance(cache, ARTCache):
        cache.preallocate(point.tokens)

    def step() -> None:
        model(token, position_ids=position, logits_to_keep=1, **{cache_argument(model): cache})
        position.add_(1)

    if ranks.device.type != "cuda":
        return timed(step, ranks)
    # Other threads, such as that which watches NCCL, may ask about their events meanwhile.
    graph = recorded(step, WARMUP, capture_error_mode="thread_local")
    return timed(graph.replay, ranks)


def profiled(ranks: Ranks) -> profile:
    """PyTorch's profiler, for the kernels of a GPU or the operators of a CPU."""
    on_gpu = ranks.device.type == "cuda"
    return profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU])


def kernel_times(step: Callable[[], None], ranks: Ranks) -> Row:
    """Microseconds that a step keeps the GPU busy: kernels, and those of NCCL, which also wait.

    On the CPU, for trying the benchmark out, those of PyTorch's operators.
    """
    on_gpu = ranks.device.type == "cuda"
    with profiled(ranks) as profiler:
        for _ in range(PROFILED):
            step()
        ranks.synchronize()
    kernels = waits = 0.0
    for event in profiler.key_averages():
        us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if re.search("nccl|gloo|c10d", event.key):
            waits += us
        else:
            kernels += us
    return {
        "us_kernels": round(kernels / PROFILED, 1),
        "us_communication": round(waits / PROFILED, 1),
    }


def measure(
    model: LlamaForCausalLM, impl: str, point: Point, ranks: Ranks, gpus: int, graphs: bool
) -> list[Row]:
    """The rows of one implementation; one that runs out of memory says so in its note.

    Where not all layers have room, half of them are timed as well, and from the difference follows
    the time of all: ``us_all_layers``.
    """
    try:
        rows = time_steps(model, impl, point, ranks, gpus, graphs)
        if point.layers < point.config.num_hidden_layers:
            release(ranks)
            half = replace(point, layers=point.layers // 2)
            shorter = time_steps(model, impl, half, ranks, gpus, graphs)
        else:
            shorter = rows
        for row, other in zip(rows, shorter, strict=True):
            if row["us"] is not None and other["us"] is not None:
                add_all_layers(row, other, point.config.num_hidden_layers)
    except torch.OutOfMemoryError as error:
        names = {"case": point.name, "impl": impl, "gpus": gpus, "layers": point.layers}
        rows = [names | {"graph": False, "us": None, "note": out_of_memory(error)}]
    release(ranks)
    return rows


def out_of_memory(error: torch.OutOfMemoryError) -> str:
    return f"out of memory: {str(error).splitlines()[0][:100]}"


def add_all_layers(row: Row, shorter: Row, total: int) -> None:
    """The time of all layers, from that of some and of fewer; they may be all there are."""
    row["us_all_layers"] = row["us"]
    if row["layers"] < total:
        of_layer = (row["us"] - shorter["us"]) / (row["layers"] - shorter["layers"])
        row["us_half_layers"] = shorter["us"]
        row["us_all_layers"] = round(row["us"] + of_layer * (total - row["layers"]), 1)


def release(ranks: Ranks) -> None:
    """Gives the memory of the last cache back."""
    gc.collect()
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
