"""The same bits run after run, and with `batch_invariant=True` whatever the batch."""

import pytest
import torch
from cases import Inputs
from gpu_helpers import (
    EARLY,
    LATE,
    NEVER,
    RAGGED,
    RUNS,
    SPLITS,
    Large,
    assert_same_bits,
    by_dtype,
    call_split,
    same_bits,
    soil,
)

from art_torch import Stability, decode_attention

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

pytestmark = pytest.mark.cuda

SHAPES = [
    Large("B1", (100_003,)),
    Large("B4", (16_000, 9_001, 12_345, 15_999)),
    Large("B16", tuple(4096 - 37 * i for i in range(16)), page_size=64),
    Large("B64", RAGGED, num_q_heads=64),
    Large("B4_D64", (8_000, 7_001, 1, 5_555), num_kv_heads=32, head_dim=64),
    Large("B2_D256", (9_000, 3_333), num_q_heads=8, num_kv_heads=1, head_dim=256),
]
CRITERIA = {"exact": None, "never": NEVER, "early": EARLY, "late": LATE}
HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA)
@pytest.mark.parametrize("dtype", HALVES, **by_dtype)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_fifty_runs(shape, dtype, criterion, gpu, report):
    inputs = shape.build(dtype, gpu)
    for invariant in (False, True):
        options = {"criterion": criterion, "batch_invariant": invariant}
        expected = inputs.call(decode_attention, **options)
        same = []
        for run in range(RUNS):
            soil(gpu, (0xFF, 0x00, 0x7F)[run % 3])
            same.append(same_bits(inputs.call(decode_attention, **options), expected))
        assert torch.stack(same).all(), (
            f"runs that differ: {[i for i, s in enumerate(same) if not s]}"
        )
        assert expected.out.isfinite().all()
    if criterion in (EARLY, LATE) and dtype == torch.bfloat16:
        stops = expected.stop_block.flatten().tolist()
        report(
            f"{shape.name}, {criterion}: {sum(s >= 0 for s in stops)} of {len(stops)} heads stop, "
            f"at {len(set(stops) - {-1})} different blocks from {min(stops)} to {max(stops)}"
        )


@pytest.mark.parametrize("num_splits", SPLITS[1:])
@pytest.mark.parametrize("criterion", [None, EARLY, LATE], ids=["exact", "early", "late"])
def test_fifty_runs_of_every_split(criterion, num_splits, gpu):
    for shape in (Large("few", (9_000, 20_011)), Large("short", (70, 1, 0, 130, 640), head_dim=64)):
        inputs = shape.build(torch.bfloat16, gpu)
        expected = call_split(inputs, criterion, num_splits)
        same = []
        for run in range(RUNS):
            soil(gpu, (0xFF, 0x00, 0x7F)[run % 3])
            same.append(same_bits(call_split(inputs, criterion, num_splits), expected))
        assert torch.stack(same).all()


@pytest.mark.parametrize("criterion", [None, EARLY], ids=["exact", "early"])
def test_float32_runs(criterion, gpu):
    inputs = Large("float32", (3000, 0, 17, 700), num_q_heads=6, num_kv_heads=2, head_dim=64).build(
        torch.float32, gpu
    )
    expected = inputs.call(decode_attention, criterion=criterion)
    for run in range(RUNS):
        soil(gpu, (0xFF, 0x00, 0x7F)[run % 3])
        assert_same_bits(inputs.call(decode_attention, criterion=criterion), expected)


# ---------------------------------------------------------------- batch_invariant


class Pool:
    """Sequences in one cache, of which batches of any kind can be made."""

    def __init__(self, dtype, device, head_dim, num_kv_heads, group, per_head=False):
        g = torch.Generator().manual_seed(head_dim + group)
        self.generator, self.device = g, device
        self.page_size, self.heads = 16, num_kv_heads
        # The first five are watched; the others are mates.
        self.lens = [
            1,
            700,
            5000,
            20_011,
            300,
            *torch.randint(0, 3000, (70,), generator=g).tolist(),
        ]
        num_pages = 4096
        shape = (num_pages, self.page_size, num_kv_heads, head_dim)
        on_device = torch.Generator(device).manual_seed(1)
        kind = {"dtype": dtype, "device": device, "generator": on_device}
        self.caches = torch.randn(shape, **kind), torch.randn(shape, **kind)
        query = torch.randn(len(self.lens), num_kv_heads * group, head_dim, generator=g)
        sharpness = torch.rand(len(self.lens), 1, 1, generator=g) * 12 + 3
        self.query = (query * sharpness).to(device=device, dtype=dtype)
        rows = (num_kv_heads,) if per_head else ()
        self.pages = [
            torch.randint(0, num_pages, (*rows, -(-max(n, 1) // 16)), generator=g)
            for n in self.lens
        ]
        self.starts = [n // 7 if i % 3 else 0 for i, n in enumerate(self.lens)]

    def batch(self, members, spare_pages, explicit=False):
        """Inputs for some sequences, in a table that is wider than it has to be."""
        width = max(self.pages[i].shape[-1] for i in members) + spare_pages
        pages = [self.pages[i] for i in members]
        rows = [torch.nn.functional.pad(p, (0, width - p.shape[-1]), value=-7) for p in pages]
        tensors = (
            self.query[members],
            *self.caches,
            torch.stack(rows).int().to(self.device),
            torch.tensor([self.lens[i] for i in members], dtype=torch.int32, device=self.device),
        )
        starts = torch.tensor([self.starts[i] for i in members], dtype=torch.int32)
        options = {"walk": "sink_recent", "seq_starts": starts.to(self.device)}
        if explicit:
            options |= self._walks(members, width)
        return Inputs(tensors, options)

    def _walks(self, members, width):
        walk = torch.zeros(len(members), self.heads, width, dtype=torch.int32)
        lens = torch.zeros(len(members), self.heads, dtype=torch.int32)
        for row, i in enumerate(members):
            units = self.pages[i].shape[-1]
            for head in range(self.heads):
                own = torch.Generator().manual_seed(1000 * i + head)
                walk[row, head, :units] = torch.randperm(units, generator=own).int()
                lens[row, head] = units - units // 5
        return {
            "walk": walk.to(self.device),
            "walk_lens": lens.to(self.device),
            "num_pinned": (lens // 9).to(self.device),
        }


def batches_with(watched, generator):
    """Batches of 2, 7 and 64 with other mates and the watched sequence at any place."""
    for size in (2, 7, 64):
        for _ in range(3):
            members = (5 + torch.randperm(70, generator=generator)[:size]).tolist()
            place = int(torch.randint(0, size, (), generator=generator))
            members[place] = watched
            yield place, members


@pytest.mark.parametrize("explicit", [False, True], ids=["built_in", "explicit"])
@pytest.mark.parametrize("criterion", [None, EARLY, LATE], ids=["exact", "early", "late"])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "num_kv_heads", "group", "per_head"),
    [
        (torch.bfloat16, 128, 8, 4, False),
        (torch.float16, 128, 2, 16, True),
        (torch.bfloat16, 64, 4, 1, False),
        (torch.float16, 256, 1, 5, False),
        (torch.float32, 64, 2, 2, False),
    ],
    ids=["bf16_128_g4", "f16_128_g16_per_head", "bf16_64_g1", "f16_256_g5", "f32"],
)
def test_batch_invariant(dtype, head_dim, num_kv_heads, group, per_head, criterion, explicit, gpu):
    pool = Pool(dtype, gpu, head_dim, num_kv_heads, group, per_head)
    options = {"criterion": criterion, "batch_invariant": True}
    for watched in range(5):
        alone = pool.batch([watched], 0, explicit).call(decode_attention, **options)
        for spare in (1, 64, 3000):
            wide = pool.batch([watched], spare, explicit).call(decode_attention, **options)
            assert_same_bits(wide, alone, f"in a table {spare} pages wider")
        for place, members in batches_with(watched, pool.generator):
            inputs = pool.batch(members, place, explicit)
            result = inputs.call(decode_attention, **options)
            own = [tensor[place : place + 1] for tensor in result]
            assert_same_bits(own, alone, f"at place {place} of {len(members)}")


def test_batch_invariant_with_thresholds_per_head(gpu):
    pool = Pool(torch.bfloat16, gpu, 128, 8, 4)
    limits = torch.logspace(-3, -1, 8, device=gpu)
    options = {"criterion": Stability(limits, limits**2, 3), "batch_invariant": True}
    for watched in range(5):
        alone = pool.batch([watched], 0).call(decode_attention, **options)
        for place, members in batches_with(watched, pool.generator):
            result = pool.batch(members, 0).call(decode_attention, **options)
            assert_same_bits([t[place : place + 1] for t in result], alone)
