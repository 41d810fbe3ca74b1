"""The same bits alone and in any batch, with any number of threads and splits, run after run."""

import pytest
import torch
from cases import CACHE_DTYPES, CASES, LOOSE, Case, Inputs, build

from art_torch import Stability, decode_attention

by_name = {"ids": lambda case: case.name}
by_dtype = {"ids": lambda dtype: str(dtype).removeprefix("torch.")}

RAGGED = Case("ragged", (4000, 17, 0, 900, 64, 2500), num_q_heads=6)
LONG = Case("long", (20000,), num_q_heads=3, num_kv_heads=1, query_scale=4.0)
MIXED = [
    RAGGED,
    LONG,
    Case("explicit", (4000, 17, 900), walk="explicit", pinned="per_head", sinks=True),
    Case("head_pool", ((4000, 17), (900, 2500)), layout="head_pool", walk="recent_first"),
    Case(
        "everything",
        (4000, 1500),
        starts=(37, 1400),
        sinks=True,
        alibi=True,
        walk="oldest_first",
        options={"softcap": 20.0, "sliding_window": 3500},
    ),
    Case("tokens_last", (1000, 4000), layout="tokens_last", head_dim=128, num_q_heads=10),
]
TIGHT = Stability(0.02, 2e-4, 3)


@pytest.fixture
def threads():
    """Set the number of threads; restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_bits(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("criterion", [None, LOOSE], ids=["exact", "art"])
@pytest.mark.parametrize("dtype", CACHE_DTYPES, **by_dtype)
@pytest.mark.parametrize(
    "case", [RAGGED, *(c for c in CASES if len(c.seq_lens) > 1 and c.layout != "dense")], **by_name
)
def test_alone_and_in_any_batch(case, dtype, criterion, device):
    inputs = build(case, dtype, device)
    # On a GPU the batch decides on the schedule, unless it is asked not to.
    options = {"criterion": criterion, "batch_invariant": device.type == "cuda"}
    together = inputs.call(decode_attention, **options)
    size = len(case.seq_lens)
    batches = [[i] for i in range(size)] + [list(range(size))[::-1], [size - 1, 0, 0, size - 1]]
    for rows in batches:
        result = inputs.select(rows).call(decode_attention, **options)
        assert_bits(result, [t[rows] for t in together])


@pytest.mark.parametrize("criterion", [None, LOOSE, TIGHT], ids=["exact", "loose", "tight"])
@pytest.mark.parametrize("dtype", CACHE_DTYPES, **by_dtype)
@pytest.mark.parametrize("case", MIXED, **by_name)
def test_threads_and_repetition(case, dtype, criterion, device, threads):
    inputs = build(case, dtype, device)
    threads(1)
    expected = inputs.call(decode_attention, criterion=criterion)
    assert_bits(inputs.call(decode_attention, criterion=criterion), expected)
    for count in (2, 3):
        threads(count)
        for _ in range(4):
            assert_bits(inputs.call(decode_attention, criterion=criterion), expected)


def split(inputs, criterion, num_splits):
    """Call the operator with a forced number of splits."""
    options = dict(inputs.options)
    if isinstance(options["walk"], str):
        options["walk_order"] = options.pop("walk")
    if isinstance(options.get("num_pinned"), torch.Tensor):
        options["num_pinned_per_head"] = options.pop("num_pinned")
    if criterion is not None:
        options |= {
            "criterion": 1,
            "d_scale": criterion.d_scale,
            "d_direction": criterion.d_direction,
            "patience": criterion.patience,
        }
    return torch.ops.art._decode_attention_split(*inputs.tensors, **options, num_splits=num_splits)


@pytest.mark.parametrize("criterion", [None, LOOSE, TIGHT], ids=["exact", "loose", "tight"])
@pytest.mark.parametrize("dtype", CACHE_DTYPES, **by_dtype)
@pytest.mark.parametrize("case", MIXED, **by_name)
def test_any_number_of_splits(case, dtype, criterion, device, threads):
    """On a GPU one thread block for each sequence and head is a schedule with bits of its own."""
    inputs = build(case, dtype, device)
    threads(1)
    schedules = [(1, 2, 3, 7, 16, 61, 1000)]
    if device.type == "cuda":
        schedules = [(1,), (2, 3, 7, 16, 61, 1000)]
    expected = [split(inputs, criterion, numbers[0]) for numbers in schedules]
    for count in (1, 2):
        threads(count)
        for numbers, bits in zip(schedules, expected, strict=True):
            for num_splits in numbers:
                assert_bits(split(inputs, criterion, num_splits), bits)
        chosen = inputs.call(decode_attention, criterion=criterion)
        assert any(all(map(torch.equal, chosen, bits)) for bits in expected)


@pytest.mark.parametrize("num_splits", [None, 2, 5, 40])
def test_stops_hold_when_threads_race(num_splits, device, threads):
    """Many short runs: a lost or doubled chunk would show up as another bit sooner or later."""
    inputs = build(LONG, torch.float32, device)
    criterion = Stability(0.05, 1e-3, 2)
    threads(1)
    expected = inputs.call(decode_attention, criterion=criterion)
    assert 0 < expected.stop_block.item() < 200
    threads(4)
    for _ in range(60):
        if num_splits is None:
            result = inputs.call(decode_attention, criterion=criterion)
        else:
            result = split(inputs, criterion, num_splits)
        assert_bits(result, expected)


@pytest.mark.parametrize("dtype", CACHE_DTYPES, **by_dtype)
def test_layout_does_not_change_a_stop(dtype, device):
    """The same tokens in another memory layout: the same stops, and outputs within rounding."""
    inputs = build(Case("layouts", (1500, 700), page_size=32), dtype, device)
    query, keys, values, table, lens = inputs.tensors
    expected = inputs.call(decode_attention, criterion=LOOSE)
    hnd = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (keys, values))
    tokens_last = keys.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    for caches in (hnd, (tokens_last, values)):
        moved = Inputs((query, *caches, table, lens), inputs.options)
        result = moved.call(decode_attention, criterion=LOOSE)
        assert torch.equal(result.stop_block, expected.stop_block)
        assert torch.equal(result.tokens_read, expected.tokens_read)
        torch.testing.assert_close(result.out, expected.out)


@pytest.mark.parametrize("dtype", CACHE_DTYPES, **by_dtype)
def test_batch_invariant_is_accepted(dtype, device):
    inputs = build(RAGGED, dtype, device)
    assert_bits(
        inputs.call(decode_attention, criterion=LOOSE, batch_invariant=True),
        inputs.call(decode_attention, criterion=LOOSE),
    )
