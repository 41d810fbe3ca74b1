"""The stop is that of the reference, however many thread blocks share a sequence."""

import pytest
import torch
from cases import Case, Inputs, build
from gpu_helpers import MARGIN_SHARES, SPLITS, Remembered, SplitStops, call_split

from art_torch import Stability

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("one_thread")]

WALKS = ("sink_recent", "oldest_first", "recent_first", "explicit")
CRITERIA = [
    Stability(),
    Stability(0.1, 5e-3, 2),
    Stability(0.05, 1e-3, 4),
    Stability(0.2, 0.02, 8),
    Stability(torch.tensor([0.1, 0.02]), torch.tensor([5e-3, 2e-4]), 3),
    Stability(0.03, 4.5e-4, 1),
]


def random_case(seed, walk, head_dim, group, dtype):
    """Attention on few tokens, sharper and flatter, so that stops lie far apart."""
    g = torch.Generator().manual_seed(seed)
    lens = torch.randint(300, 3500, (3,), generator=g).tolist()
    options = {"block_size": (64, 16, 128, 64)[seed % 4]}
    if seed % 5 == 4:
        options["softcap"] = 20.0
    return Case(
        "random",
        (*lens, 1),
        num_q_heads=2 * group,
        head_dim=head_dim,
        value_dim=head_dim,
        page_size=(16, 64, 32)[seed % 3],
        query_scale=(14.0, 9.0, 5.0)[seed // 2 % 3],
        value_mean=(0.0, 1.0)[seed % 2],
        sinks=seed % 4 == 1,
        walk=walk,
        pinned="per_head" if walk == "explicit" else None,
        options=options,
    )


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "group"),
    [
        (torch.bfloat16, 128, 4),
        (torch.float16, 128, 8),
        (torch.bfloat16, 64, 5),
        (torch.float16, 256, 2),
        (torch.bfloat16, 128, 16),
        (torch.float32, 64, 3),
    ],
    ids=["bf16_128_g4", "f16_128_g8", "bf16_64_g5", "f16_256_g2", "bf16_128_g16", "f32"],
)
def test_stops_are_those_of_the_reference(dtype, head_dim, group, walk, gpu, report):
    stops = SplitStops()
    for seed in range(12):
        case = random_case(seed, walk, head_dim, group, dtype)
        host = build(case, dtype, "cpu", seed)
        host = Remembered(host.tensors, host.options)
        stops.add(host, build(case, dtype, gpu, seed), CRITERIA[seed % len(CRITERIA)])
    report(f"decision margin, {dtype}, D{head_dim} G{group}, {walk}: {stops.summary()}")
    assert stops.share <= MARGIN_SHARES[dtype]
    assert stops.stopped > len(stops.stops) / 5
    assert len(set(stops.stops)) > 12


DIM, BLOCK, LAST = 128, 64, 112  # LAST blocks of 64 tokens, a page each


def settling_cache(dtype, device, length):
    """Page i < DIM holds unit vector i times `length`; page DIM + k the mean of the first k."""
    values = length * torch.eye(DIM).repeat(2, 1)
    for k in range(1, DIM):
        values[DIM + k] = values[:k].mean(0)
    values = values[:, None, None].expand(-1, BLOCK, 1, -1).to(dtype=dtype, device=device)
    return torch.zeros_like(values), values.contiguous()


def settling_table(settle):
    """`settle` blocks that each turn the output by a lot, then blocks that change nothing."""
    return [*range(settle), *[DIM + settle] * (LAST - settle)]


@pytest.mark.parametrize("walk", ["oldest_first", "recent_first"])
@pytest.mark.parametrize("patience", [1, 4])
# The squares of the shorter one leave float32 after a few blocks.
@pytest.mark.parametrize("length", [1.0, 2.0**-47], ids=["long", "short"])
@pytest.mark.parametrize("num_splits", SPLITS)
def test_every_block_can_be_the_last(num_splits, length, patience, walk, gpu):
    """All logits are equal, and block `settle` is the first that changes nothing."""
    caches = settling_cache(torch.bfloat16, gpu, length)
    criterion = Stability(2e-3, 2e-3, patience)
    pending = []
    for first in range(1, 101, 3):
        some = range(first, min(first + 3, 101))
        tables = [settling_table(k) for k in some]
        if walk == "recent_first":
            tables = [table[::-1] for table in tables]
        table = torch.tensor(tables, dtype=torch.int32, device=gpu)
        lens = torch.full((len(some),), LAST * BLOCK, dtype=torch.int32, device=gpu)
        query = torch.zeros(len(some), 4, DIM, dtype=torch.bfloat16, device=gpu)
        inputs = Inputs((query, *caches, table, lens), {"walk": walk})
        pending.append((some, call_split(inputs, criterion, num_splits)))
    for some, result in pending:
        expected = torch.tensor([[k + patience - 1] for k in some])
        assert torch.equal(result.stop_block.cpu().long(), expected)
        assert torch.equal(result.tokens_read.cpu().long(), (expected + 1) * BLOCK)
        for row, k in enumerate(some):
            mean = length * torch.eye(DIM)[:k].mean(0)
            torch.testing.assert_close(
                result.out[row].float().cpu(), mean.expand(4, -1), rtol=2**-7, atol=1e-6 * length
            )
