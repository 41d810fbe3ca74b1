"""Times calls on a GPU as replays of a CUDA graph, and ends a process whose kernel hangs."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

Calls = list[Callable[[], Any]]

GRAPH_US = 1500.0  # a graph shorter than this shows the gaps between graphs
RUN_US = 5000.0
MAX_CALLS = 320  # in one graph, as long as every input is in it once
GUESSED_GBPS = 3000.0
SHORTEST_US = 8.0


class GraphTimer:
    """One implementation: its calls on all inputs, several times over, in one CUDA graph."""

    def __init__(self, calls: Calls, num_bytes: int) -> None:
        self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for call in calls[:2]:  # loads kernels, and allocates what is kept
                call()
        self._stream.synchronize()
        guess = len(calls) * max(SHORTEST_US, num_bytes / GUESSED_GBPS / 1e3)
        repeats = max(1, min(round(GRAPH_US / guess), MAX_CALLS // len(calls)))
        self._num_calls = repeats * len(calls)
        # Not torch.cuda.graph(), which empties the allocator's cache at every entry.
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            self._graph.capture_begin()
            try:
                for _ in range(repeats):
                    for call in calls:
                        call()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # that the capture is invalid, is known
                    self._graph.capture_end()
                raise
            self._graph.capture_end()
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._replays = 1
        self.run()
        self._replays = max(1, min(50, round(RUN_US / (self.run() * self._num_calls))))

    def run(self) -> float:
        """Microseconds a call."""
        self._begin.record()
        for _ in range(self._replays):
            self._graph.replay()
        self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) * 1e3 / (self._replays * self._num_calls)


class LoopTimer:
    """The same on a CPU, for trying the benchmark out."""

    def __init__(self, calls: Calls, num_bytes: int) -> None:
        self._calls = calls
        self.run()

    def run(self) -> float:
        start = time.perf_counter()
        for call in self._calls:
            call()
        return (time.perf_counter() - start) * 1e6 / len(self._calls)


@contextlib.contextmanager
def watchdog(seconds: float, on_expiry: Callable[[], None]) -> Iterator[None]:
    """Ends the process if the block takes longer: a kernel that hangs cannot be interrupted."""

    def expire() -> None:
        on_expiry()
        os._exit(3)

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # a thread that ends with the interpreter can abort it
