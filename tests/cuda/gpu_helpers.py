"""What the tests of the CUDA kernels share: forced schedules, bits, large inputs, dirty memory."""

import math
from dataclasses import dataclass

import torch
from cases import Inputs
from coded import call_guided, code_arguments
from contract import Tally, check

from art_torch import Stability, decode_attention, encode_keys, guided_walk, reference
from art_torch._decode_arguments import checked_rules, criterion_arguments, walk_arguments
from art_torch.ops import DecodeResult

# Thread blocks per (sequence, KV head); 0 leaves it to the schedule, 1 is one for each.
SPLITS = (0, 1, 2, 3, 4, 8, 16, 33)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
by_dtype = {"ids": lambda value: str(value).removeprefix("torch.")}
RUNS = 50  # that have to agree
RAGGED = tuple(512 + (i * 5531) % 3600 for i in range(64))
# Share of (sequence, KV head) pairs where rounding may decide, at most.
MARGIN_SHARES = {torch.float32: 0.02, torch.float16: 0.12, torch.bfloat16: 0.2}


def call_split(inputs, criterion, num_splits, **changes):
    """Call the operator with a forced number of thread blocks per item."""
    options = {**inputs.options, **changes}
    arguments = walk_arguments(options.pop("walk"), options.pop("num_pinned", None))
    arguments |= criterion_arguments(checked_rules(criterion), inputs.tensors[1])
    operator = torch.ops.art._decode_attention_split
    return DecodeResult(*operator(*inputs.tensors, **options, **arguments, num_splits=num_splits))


class SplitStops:
    """Stops on the CPU, batch-invariant ones and those of every split, against the reference."""

    def __init__(self):
        self.tallies = {name: Tally() for name in ("cpu", "invariant", *SPLITS)}
        self.stops = []

    def add(self, host, inputs, criterion):
        """One call of each; `host` has the same inputs as `inputs`."""
        results = {
            "cpu": host.call(decode_attention, criterion=criterion),
            "invariant": inputs.call(decode_attention, criterion=criterion, batch_invariant=True),
        }
        results |= {n: call_split(inputs, criterion, n) for n in SPLITS}
        for name, result in results.items():
            self.tallies[name] += check(host, criterion, result)
        self.stops += results["cpu"].stop_block.flatten().tolist()

    @property
    def share(self):
        """Of the pairs, those whose decision is inside the margin."""
        return self.tallies["cpu"].inside / self.tallies["cpu"].pairs

    @property
    def stopped(self):
        return sum(stop >= 0 for stop in self.stops)

    def summary(self):
        tally = self.tallies["cpu"]
        different = {name: t.different for name, t in self.tallies.items() if t.different}
        return (
            f"{tally.inside} of {tally.pairs} inside the margin ({self.share:.1%}); stopped "
            f"elsewhere there: {different or 'none'}; {self.stopped} stopped, at "
            f"{len(set(self.stops) - {-1})} different blocks"
        )


def assert_nothing_waits(calls):
    """Call several times while the device is busy; fails where the host waits for it."""
    calls()  # loads the kernels
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    slept = torch.cuda.Event()
    slept.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            calls()
        assert not slept.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


def bits(tensor):
    """The same memory as integers: NaN equals NaN, and -0.0 is not 0.0."""
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])


def same_bits(result, expected):
    """Whether two results agree in every bit, as a tensor: asking does not wait for the device."""
    return torch.stack(
        [(bits(a) == bits(b)).all() for a, b in zip(result, expected, strict=True)]
    ).all()


def assert_same_bits(result, expected, message=""):
    for name, a, b in zip(DecodeResult._fields, result, expected, strict=True):
        assert a.shape == b.shape
        different = int((bits(a) != bits(b)).sum())
        assert different == 0, f"{name}: {different} of {a.numel()} elements differ {message}"


def soil(device, byte):
    """Leave garbage in the memory that the workspaces of the next calls are cut from."""
    sizes = [1 << e for e in range(9, 27)]
    blocks = [torch.full((n,), byte, dtype=torch.uint8, device=device) for n in sizes]
    del blocks


def capture(function):
    """Record one call; capturing fails where it waits for the device or allocates behind torch."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


class Remembered(Inputs):
    """Inputs whose reference is computed once per criterion, for many results to be checked."""

    def __init__(self, tensors, options):
        super().__init__(tensors, options)
        self._known = {}

    def call(self, function, **changes):
        if function is not reference.decode_attention:
            return super().call(function, **changes)
        criterion = changes["criterion"]
        if id(criterion) not in self._known:  # the criterion is kept, so that its id stays its own
            self._known[id(criterion)] = criterion, super().call(function, **changes)
        return self._known[id(criterion)][1]


@dataclass(frozen=True)
class Large:
    """Inputs too large to be made, or to be computed again, on the CPU.

    Sequences differ in how few tokens their attention sits on, so that they stop at very different
    places.
    """

    name: str
    seq_lens: tuple
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    spare_pages: int = 0  # table entries behind those of the longest sequence

    def build(self, dtype, device, seed=0):
        g = torch.Generator(device).manual_seed(seed)
        batch, longest = len(self.seq_lens), max(self.seq_lens)
        max_pages = -(-longest // self.page_size)
        num_pages = batch * max_pages
        kind = {"dtype": dtype, "device": device, "generator": g}
        shape = (num_pages, self.page_size, self.num_kv_heads, self.head_dim)
        keys, values = torch.randn(shape, **kind), torch.randn(shape, **kind)
        table = torch.randperm(num_pages, device=device, generator=g).int()
        table = table.view(batch, max_pages)
        spare = torch.full((batch, self.spare_pages), -1, dtype=torch.int32, device=device)
        sharpness = torch.linspace(math.log(3), math.log(16), batch + 2, device=device)[1:-1].exp()
        query = torch.randn(batch, self.num_q_heads, self.head_dim, **kind)
        query = query * sharpness.to(dtype)[:, None, None]
        lens = torch.tensor(self.seq_lens, dtype=torch.int32, device=device)
        tensors = (query, keys, values, torch.cat([table, spare], 1), lens)
        return Inputs(tensors, {"walk": "sink_recent"})


NEVER = Stability(0.0, 0.0, 10**6)
EARLY = Stability()
LATE = Stability(0.1, 5e-3, 20)


def encoded(inputs):
    """Codes of all complete groups, and a table for them."""
    _, keys, _, table, lens = inputs.tensors
    pool, code_table = code_arguments(inputs)
    encode_keys(keys, table, lens, pool, code_table)
    return pool, code_table


def walk_of(inputs, codes):
    return call_guided(guided_walk, inputs, codes)
