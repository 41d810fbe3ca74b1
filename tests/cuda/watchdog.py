"""Thousands of random calls, many at a time without waiting; a hang ends the process.

    python tests/cuda/watchdog.py                        # what the tests run
    python tests/cuda/watchdog.py --first 1200 --batch 1 # again, one call at a time

Every call is made twice, in another order and beside another stream, and must give the same bits;
some are compared with the reference. A batch that takes longer than its limit is reported with a
traceback and its numbers, and the process exits.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import torch  # noqa: E402
from cases import Inputs  # noqa: E402
from contract import Tally, check  # noqa: E402
from gpu_helpers import call_split, same_bits  # noqa: E402

from art_torch import Stability, decode_attention  # noqa: E402

POOL_TOKENS = 8192
# (dtype, head_dim, num_kv_heads); float32 and odd sizes take the portable kernels.
POOLS = [
    (torch.bfloat16, 128, 8),
    (torch.bfloat16, 128, 1),
    (torch.float16, 64, 4),
    (torch.bfloat16, 64, 2),
    (torch.float16, 256, 1),
    (torch.bfloat16, 96, 2),
    (torch.bfloat16, 192, 2),
    (torch.float16, 72, 2),
    (torch.float32, 64, 2),
]
SPLITS = (0, 0, 0, 1, 2, 3, 4, 5, 7, 8, 16, 24, 33, 64)
INVARIANT = -1  # in the place of a number of splits


@dataclass
class Pattern:
    """One random call, on the host and on the device."""

    number: int
    host: Inputs
    inputs: Inputs
    criterion: Stability | None
    num_splits: int

    def call(self):
        if self.num_splits == INVARIANT:
            return self.inputs.call(
                decode_attention, criterion=self.criterion, batch_invariant=True
            )
        return call_split(self.inputs, self.criterion, self.num_splits)


class Pools:
    """Caches that all patterns read from; pages of any size are views of the same tokens."""

    def __init__(self, device):
        self.device = device
        g = torch.Generator().manual_seed(0)
        self.host, self.on_device = [], []
        for dtype, dim, heads in POOLS:
            # What values have in common differs along the pool: outputs settle late, or not at all.
            drift = torch.linspace(0, 2, POOL_TOKENS)[:, None, None]
            keys = torch.randn(POOL_TOKENS, heads, dim, generator=g)
            values = torch.randn(POOL_TOKENS, heads, dim, generator=g) + drift
            self.host.append((keys.to(dtype), values.to(dtype)))
            self.on_device.append(tuple(t.to(device) for t in self.host[-1]))

    def pattern(self, number):
        g = torch.Generator().manual_seed(number)

        def choose(values):
            return values[int(torch.randint(0, len(values), (), generator=g))]

        def integers(low, high, shape):
            return torch.randint(low, high, shape, generator=g, dtype=torch.int32)

        pool = choose(range(len(POOLS)))
        dtype, dim, heads = POOLS[pool]
        page = choose((16, 16, 32, 64, 128, 256))
        unit = choose([u for u in (4, 8, 16, 16, 32, 64) if page % u == 0])
        block = unit * max(1, choose((16, 32, 64, 64, 128, 256)) // unit)
        batch = choose((1, 1, 2, 3, 4, 8, 16, 40))
        longest = choose((70, 700, 2500, 6000, 16_000)) // (1 + batch // 16)
        group = choose((1, 2, 3, 4, 4, 7, 8, 12, 16, 20))
        lens = integers(0, longest + 1, (batch,))
        lens[torch.rand(batch, generator=g) < 0.15] = choose((0, 1))
        max_pages = -(-longest // page) + choose((0, 1, 50))
        table = integers(0, POOL_TOKENS // page, (batch, max_pages))
        query = torch.randn(batch, heads * group, dim, generator=g)
        query *= torch.rand(batch, 1, 1, generator=g) * 12 + 2
        options = {"unit_size": unit, "block_size": block, "num_pinned": choose((None, 0, 1, 9))}
        options["walk"] = choose(("sink_recent", "recent_first", "oldest_first", "explicit"))
        if options["walk"] == "explicit":
            units = max_pages * (page // unit)
            order = torch.rand(batch, heads, units, generator=g).argsort(-1)
            options["walk"] = order.int()
            options["walk_lens"] = integers(0, units + 1, (batch, heads))
        if choose(range(4)) == 0:
            options["seq_starts"] = integers(0, longest + 9, (batch,))
        if choose(range(6)) == 0:
            options["sliding_window"] = choose((1, 40, 500))
        if choose(range(6)) == 0:
            options["attn_sinks"] = 3 * torch.randn(heads * group, generator=g)
        if choose(range(8)) == 0:
            options["softcap"] = 15.0
        scale = 10 ** (torch.rand(2, heads, generator=g) * 2 - 2)
        criterion = choose((None, "float", "heads", "heads"))
        patience = choose((1, 1, 2, 3, 8))
        if criterion == "float":
            criterion = Stability(float(scale[0, 0]), float(scale[1, 0]) / 10, patience)
        elif criterion == "heads":
            criterion = Stability(scale[0], scale[1] / 10, patience)
        tables = (query.to(dtype), table, lens)
        host = self._inputs(self.host[pool], page, tables, options)
        moved = {k: self._move(v) for k, v in options.items()}
        tables = tuple(map(self._move, tables))
        inputs = self._inputs(self.on_device[pool], page, tables, moved)
        num_splits = INVARIANT if choose(range(8)) == 0 else choose(SPLITS)
        return Pattern(number, host, inputs, criterion, num_splits)

    def _move(self, value):
        return value.to(self.device) if isinstance(value, torch.Tensor) else value

    @staticmethod
    def _inputs(pool, page, tables, options):
        query, table, lens = tables
        caches = (cache.view(POOL_TOKENS // page, page, *cache.shape[1:]) for cache in pool)
        return Inputs((query, *caches, table, lens), options)


def on_device(criterion, device):
    """Thresholds per head are moved before anything is launched: a copy would wait."""
    if criterion is None or not criterion.per_head:
        return criterion
    limits = (criterion.d_scale.to(device), criterion.d_direction.to(device))
    return Stability(*limits, criterion.patience)


def run_batch(patterns, device, side):
    """All calls, then all again the other way round on another stream; returns the results."""
    limits = {p.number: p.criterion for p in patterns}
    for pattern in patterns:
        pattern.criterion = on_device(pattern.criterion, device)
    synchronize(device)
    results = [pattern.call() for pattern in patterns]
    if side is None:
        again = [pattern.call() for pattern in reversed(patterns)]
    else:
        with torch.cuda.stream(side):
            again = [pattern.call() for pattern in reversed(patterns)]
    synchronize(device)
    for pattern, result, second in zip(patterns, results, reversed(again), strict=True):
        if not same_bits(result, second):
            raise AssertionError(f"pattern {pattern.number} gave other bits in its second run")
        pattern.criterion = limits[pattern.number]
    return results


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--first", type=int, default=0, help="number of the first pattern")
    parser.add_argument("--count", type=int, default=3000, help="patterns")
    parser.add_argument("--batch", type=int, default=100, help="calls launched at a time")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds a batch may take")
    parser.add_argument("--every", type=int, default=25, help="compare one in so many")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    side = torch.cuda.Stream() if device.type == "cuda" else None
    start, pools = time.perf_counter(), Pools(device)
    tally, stopped, items, places = Tally(), 0, 0, set()
    end = arguments.first + arguments.count
    for first in range(arguments.first, end, arguments.batch):
        numbers = range(first, min(first + arguments.batch, end))
        patterns = [pools.pattern(number) for number in numbers]
        print(f"patterns {first} to {numbers[-1]}", flush=True)
        # A thread outside Python: it also ends a process that waits for a device that hangs.
        faulthandler.dump_traceback_later(arguments.limit, exit=True)
        results = run_batch(patterns, device, side)
        faulthandler.cancel_dump_traceback_later()
        for pattern, result in zip(patterns, results, strict=True):
            stops = result.stop_block.flatten().tolist()
            items += len(stops)
            stopped += sum(stop >= 0 for stop in stops)
            places.update(stops)
            if pattern.number % arguments.every == 0:
                tally += check(pattern.host, pattern.criterion, result)
    print(
        f"{arguments.count} patterns twice in {time.perf_counter() - start:.0f} s: {items} heads, "
        f"{stopped} stopped at {len(places)} different blocks; {tally.pairs} compared with the "
        f"reference, {tally.inside} inside the margin, {tally.different} stopped elsewhere there"
    )


if __name__ == "__main__":
    main()
