"""The points of bench_gpu.py, the most informative first, and what is measured at each."""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass
from functools import cached_property

ELEMENT_BYTES = 2  # bfloat16
SINK_TOKENS = 64  # read first by the default walk, sink_recent, and as many from the end
BLOCK = 64  # tokens between two looks at the output
MAX_KV_BYTES = 16 << 30
SHORTEST_RAGGED = 512  # tokens

# Inputs take turns so that none is still in the L2 cache when it is read again.
TOTAL_BYTES = 1.2e9
MANY_INPUTS = 8
L2_BYTES = 256e6  # several times the cache of any GPU this runs on

FRACTIONS = {"art_half": 1 / 2, "art_fifth": 1 / 5}
GUIDED_PERCENT = (5, 10, 15, 25)
GUIDED_FRACTIONS = {f"art_guided_{percent}": percent / 100 for percent in GUIDED_PERCENT}
EVERY_CHANGE = 1e9  # a threshold that every block of random tokens meets
CODE_FRACTION = 2560 / (64 * 512)  # of key codes in the bytes of a cache
EVERYWHERE = ("read", "art_dense", "art_never", "flashinfer_fa2", "flashinfer_xqa")
CONTIGUOUS = ("cudnn", "sdpa_flash")

# batch x tokens (~: ragged, up to so many), query / KV heads, head_dim, page_size, and what is
# measured beside the usual. The order is that of a first look: a budget that ends early has seen
# every kind of point.
TABLE = """
    1x32k    32/8   d128  p16   uneven invariant oldest
    8x8k     32/8   d128  p16   uneven invariant oldest
    32x8k    32/8   d128  p16   uneven invariant oldest
    128x8k   32/8   d128  p16
    1x128k   32/8   d128  p16   uneven
    4x8k     32/8   d128  p16   invariant
    32x~32k  32/8   d128  p16   uneven invariant
    8x8k     64/8   d128  p16
    8x8k     32/32  d128  p16
    32x8k    32/8   d64   p16
    32x8k    32/8   d128  p64
    32x8k    32/8   d128  p256
    16x8k    32/8   d128  p16   uneven
    1x8k     32/8   d128  p16   invariant
    2x32k    32/8   d128  p16
    64x8k    32/8   d128  p16
    4x32k    32/8   d128  p16   uneven
    8x32k    32/8   d128  p16   uneven oldest
    64x~32k  32/8   d128  p16   uneven
    1x32k    32/32  d128  p16
    1x32k    64/8   d128  p16
    1x32k    32/8   d64   p16
    1x32k    32/8   d128  p64
    1x32k    32/8   d128  p256
    32x2k    32/8   d128  p16
    128x2k   32/8   d128  p16   oldest
    16x32k   32/8   d128  p16
    32x32k   32/8   d128  p16   uneven
    4x2k     32/8   d128  p16
    4x128k   32/8   d128  p16   uneven
    8x2k     32/8   d128  p16   invariant
    8x128k   32/8   d128  p16
    32x~32k  64/8   d128  p16
    32x8k    64/8   d128  p16
    4x32k    64/8   d128  p16
    128x8k   64/8   d128  p16
    32x8k    32/32  d128  p16   invariant
    4x8k     32/32  d128  p16
    32x2k    32/32  d128  p16
    1x8k     32/32  d128  p16
    8x8k     32/8   d64   p16
    128x8k   32/8   d64   p16
    1x128k   32/8   d64   p16
    8x8k     32/32  d64   p16
    8x32k    64/8   d64   p16
    8x8k     32/8   d128  p64
    128x2k   32/8   d128  p64
    8x8k     32/8   d128  p256
    128x2k   32/8   d128  p256
    32x~32k  32/8   d128  p64
    32x~32k  32/8   d64   p16
    64x~32k  32/32  d128  p16
    1x128k   64/8   d128  p16
    8x2k     64/8   d128  p16
    1x2k     32/8   d128  p16   uneven
    1x2k     32/32  d128  p16
    2x8k     32/8   d128  p16
    16x2k    32/8   d128  p16
    64x2k    32/8   d128  p16
    64x32k   32/8   d128  p16
    32x128k  32/8   d128  p16
    128x32k  32/8   d128  p16
    8x32k    9/3    d64   p16
    32x8k    9/3    d64   p16
    32x32k   9/3    d64   p16
    128x8k   9/3    d64   p16
    128x32k  9/3    d64   p16
"""
# For trying the script out where there is no GPU.
SMOKE_TABLE = """
    1x1k     8/2    d64   p16   uneven invariant oldest
    3x~1k    8/2    d64   p64   uneven
"""
LINE = re.compile(r"(\d+)x(~?)(\d+)k\s+(\d+)/(\d+)\s+d(\d+)\s+p(\d+)\s*(.*)")


@dataclass(frozen=True)
class Point:
    """One shape. ``tokens`` is the length of every sequence, or bounds those of a ragged batch."""

    batch: int
    tokens: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    ragged: bool
    extras: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return (
            f"B{self.batch}_S{self.tokens}_H{self.num_q_heads}/{self.num_kv_heads}"
            f"_D{self.head_dim}_bf16_p{self.page_size}{'_ragged' if self.ragged else ''}"
        )

    @cached_property
    def lens(self) -> list[int]:
        """Tokens of each sequence; of a ragged batch drawn with an even logarithm."""
        if not self.ragged:
            return [self.tokens] * self.batch
        generator = random.Random(self.batch)
        low, high = math.log(SHORTEST_RAGGED), math.log(self.tokens)
        return [round(math.exp(generator.uniform(low, high))) for _ in range(self.batch)]

    @property
    def token_bytes(self) -> int:
        """Of a key and a value of one KV head."""
        return 2 * self.head_dim * ELEMENT_BYTES

    @property
    def kv_bytes(self) -> int:
        return sum(self.lens) * self.num_kv_heads * self.token_bytes

    @property
    def implementations(self) -> list[str]:
        """What is measured here.

        The contiguous ones know no pages and one length: once per shape, at the smallest page.
        """
        names = list(EVERYWHERE)
        if not self.ragged:
            names += FRACTIONS
        if not self.ragged and self.page_size == 16:
            names += ["art_guided_walk", *GUIDED_FRACTIONS]
        if not self.ragged and self.page_size == 16:
            names += CONTIGUOUS
        return names + [f"art_{extra}" for extra in self.extras]


def parse_points(table: str) -> list[Point]:
    points = []
    for line in table.strip().splitlines():
        match = LINE.fullmatch(line.strip())
        if match is None:
            raise ValueError(f"not a point: {line.strip()!r}")
        batch, ragged, tokens, q_heads, kv_heads, dim, page, extras = match.groups()
        sizes = map(int, (q_heads, kv_heads, dim, page))
        points.append(
            Point(int(batch), int(tokens) * 1024, *sizes, bool(ragged), tuple(extras.split()))
        )
    return points


def num_inputs(num_bytes: int) -> int:
    """How many inputs take turns, where one call reads ``num_bytes``."""
    count = min(MANY_INPUTS, max(2, math.ceil(TOTAL_BYTES / num_bytes)))
    return max(count, math.ceil(L2_BYTES / num_bytes))


def stop_after(tokens: int, fraction: float) -> tuple[int, int]:
    """A patience that ends the default walk after about ``fraction``, if every block is stable.

    Returns:
        The patience, and how many of the ``tokens`` are read until then.
    """
    # First and last tokens form the starting output; patience counts the blocks after them.
    patience = max(1, round((fraction * tokens - 2 * SINK_TOKENS) / BLOCK))
    return patience, min(tokens, 2 * SINK_TOKENS + patience * BLOCK)
