"""Calls of which each would fill the device, from several streams of different priority.

Thread blocks that wait for others of their sequence must not keep those from starting: here they
compete with other calls of the same kind, and with kernels that hold part of the device.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import torch  # noqa: E402
from gpu_helpers import EARLY, LATE, SPLITS, Large, call_split, same_bits  # noqa: E402

ROUNDS = 60
SHAPES = [
    Large("B1", (20_000,)),
    Large("B2", (9_000, 12_000)),
    Large("B4", (6_000, 100, 5_000, 4_000), head_dim=64),
    Large("B12", (2_000,) * 12),
    Large("B16", (2_000,) * 16),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--limit", type=float, default=60.0, help="seconds a round may take")
    limit = parser.parse_args().limit
    device = torch.device("cuda")
    inputs = [shape.build(torch.bfloat16, device, i) for i, shape in enumerate(SHAPES)]
    least, most = torch.cuda.Stream.priority_range()
    streams = [torch.cuda.Stream(priority=p) for p in (least, most, least, most)]
    busy = torch.cuda.Stream(priority=least)
    matrix = torch.randn(2048, 2048, device=device)
    calls = 0
    for num_splits in SPLITS:
        expected = [call_split(i, c, num_splits) for i in inputs for c in (EARLY, LATE, None)]
        torch.cuda.synchronize()
        same = []
        faulthandler.dump_traceback_later(limit, exit=True)
        for turn in range(ROUNDS):
            with torch.cuda.stream(busy):  # long thread blocks on some of the multiprocessors
                matrix @ matrix
            for k in range(len(expected)):
                place = (k + turn) % len(expected)
                with torch.cuda.stream(streams[k % len(streams)]):
                    criterion = (EARLY, LATE, None)[place % 3]
                    result = call_split(inputs[place // 3], criterion, num_splits)
                    same.append(same_bits(result, expected[place]))
                    calls += 1
        torch.cuda.synchronize()
        faulthandler.cancel_dump_traceback_later()
        if not torch.stack(same).all():
            raise AssertionError(f"{num_splits} thread blocks per item gave other bits")
        print(f"{num_splits} thread blocks per item", flush=True)
    print(f"{calls} calls on four streams at once, on a device kept busy, without a hang")


if __name__ == "__main__":
    main()
