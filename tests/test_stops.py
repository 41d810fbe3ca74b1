"""Stops on difficult inputs, and at thresholds where differences of outputs are noise."""

import math

import pytest
import torch
from cases import DTYPES, PLANE, Case, Inputs, build, plane_cache
from contract import Tally, check

from art_torch import Stability, decode_attention

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH, DIM = 1200, 32
WALKS = ("oldest_first", "recent_first", "sink_recent")
by_dtype = {"ids": lambda dtype: str(dtype).removeprefix("torch.")}


def from_logits(logits, values, dtype, device, walk):
    """One group of three query heads that see `logits` times 1, 1/2 and -1."""
    length = len(logits)
    keys = torch.zeros(length, DIM)
    keys[:, 3] = logits
    query = torch.zeros(1, 3, DIM)
    query[0, :, 3] = torch.tensor([1.0, 0.5, -1.0])
    tensors = (
        query.to(dtype),
        keys.to(dtype)[None, :, None],
        values.to(dtype).contiguous()[None, :, None],
        torch.zeros(1, 1, dtype=torch.int32),
        torch.tensor([length], dtype=torch.int32),
    )
    return Inputs(tuple(t.to(device) for t in tensors), {"walk": walk, "scale": 1.0})


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def settled():
    return 1 + 0.3 * noise(LENGTH, DIM, seed=1)


def ramp(start, end):
    return torch.linspace(start, end, LENGTH) + 0.1 * noise(LENGTH)


def with_rows(tensor, rows, value):
    tensor = tensor.clone()
    tensor[rows] = value
    return tensor


MIDDLE, LAST = slice(600, 664), slice(LENGTH - 64, LENGTH)
flat = 0.01 * noise(LENGTH)
ADVERSARIES = {
    "front_loaded": lambda: (with_rows(noise(LENGTH) - 5, slice(0, 64), 15.0), settled()),
    "back_loaded": lambda: (with_rows(noise(LENGTH) - 5, LAST, 15.0), settled()),
    "needle_in_the_last_block": lambda: (
        with_rows(noise(LENGTH), LENGTH - 5, 30.0),
        with_rows(settled(), LENGTH - 5, -4.0),
    ),
    "needle_in_the_first_block": lambda: (
        with_rows(noise(LENGTH), 5, 30.0),
        with_rows(settled(), 5, -4.0),
    ),
    "needle_in_the_middle": lambda: (
        with_rows(noise(LENGTH), 620, 30.0),
        with_rows(settled(), 620, -4.0),
    ),
    "diffuse": lambda: (flat, settled()),
    "diffuse_cancelling": lambda: (flat, noise(LENGTH, DIM, seed=2)),
    "late_flip": lambda: (
        with_rows(flat, LAST, 6.0),
        with_rows(settled(), LAST, -1.0),
    ),
    "orthogonal_turn": lambda: (
        flat,
        torch.cat([torch.eye(2, DIM)[0].expand(600, -1), torch.eye(2, DIM)[1].expand(600, -1)]),
    ),
    "constant_values": lambda: (noise(LENGTH), torch.full((LENGTH, DIM), 0.1)),
    "zero_values": lambda: (noise(LENGTH), torch.zeros(LENGTH, DIM)),
    "zero_values_then_some": lambda: (
        noise(LENGTH),
        with_rows(torch.zeros(LENGTH, DIM), MIDDLE, 1.0),
    ),
    "zero_values_after_some": lambda: (flat, with_rows(settled(), slice(600, None), 0.0)),
    "alternating_values": lambda: (
        torch.zeros(LENGTH),
        torch.tensor([1.0, -1.0]).repeat(LENGTH // 2)[:, None].expand(-1, DIM),
    ),
    "logits_of_1e4": lambda: (1e4 * noise(LENGTH).sign(), settled()),
    "logits_to_1e4": lambda: (1e4 * noise(LENGTH).clamp(-1, 1), settled()),
    "equal_keys": lambda: (torch.full((LENGTH,), 2.5), settled()),
    "equal_keys_equal_values": lambda: (torch.ones(LENGTH), torch.ones(LENGTH, DIM)),
    "falling": lambda: (ramp(0, -60), settled()),
    "falling_slowly": lambda: (ramp(0, -25), settled()),
    "rising": lambda: (ramp(-60, 0), settled()),
    "outweighs_all_before": lambda: (with_rows(flat, MIDDLE, 14.0), settled()),
    "outweighs_all_by_far": lambda: (with_rows(flat, MIDDLE, 17.0), settled()),
    "leaps": lambda: (torch.arange(LENGTH) // 64 * 13.0 + flat, settled()),
    "beyond_float32_exp": lambda: (ramp(150, -150), settled()),
}
CRITERIA = [
    Stability(),
    Stability.paper(),
    Stability(1e-5, 1e-10, 2),
    Stability(1e-7, 1e-9, 1),
    Stability(1e-9, 1e-9, 1),
    Stability(1e-9, 1e-9, 3),
    Stability(0.03, 1e-9, 2),
    Stability(0.0, 0.0, 1),
]


@pytest.mark.parametrize("dtype", DTYPES, **by_dtype)
@pytest.mark.parametrize("name", ADVERSARIES)
def test_adversary(name, dtype, device):
    logits, values = ADVERSARIES[name]()
    for walk in WALKS:
        inputs = from_logits(logits, values, dtype, device, walk)
        for criterion in CRITERIA:
            check(inputs, criterion)


@pytest.mark.parametrize("threshold", [1e-5, 1e-6, 1e-7, 1e-8, 1e-9])
@pytest.mark.parametrize("dtype", DTYPES, **by_dtype)
def test_tiny_thresholds_on_blocks_of_small_weight(dtype, threshold, device, report):
    """Block weights fall through the threshold: the stop is where float64 has it."""
    tally, stopped = Tally(), 0
    for seed in range(20):
        # Head 2 of the group sees the logits reversed: only positive factors here.
        logits = torch.linspace(0, -60, LENGTH) + noise(LENGTH, seed=seed)
        # Blocks pull in directions of their own, so that their weight decides and not the noise.
        blocks = noise(LENGTH // 64 + 1, DIM, seed=100 + seed).repeat_interleave(64, 0)[:LENGTH]
        values = blocks + 0.1 * noise(LENGTH, DIM, seed=200 + seed)
        inputs = from_logits(logits, values, dtype, device, "oldest_first")
        inputs.tensors[0][0, 2] *= -0.75
        criterion = Stability(threshold, max(threshold**2, 1e-9) / 2, 2)
        result = inputs.call(decode_attention, criterion=criterion)
        tally += check(inputs, criterion, result)
        stopped += int((result.stop_block >= 0).sum())
    report(
        f"decision margin, {dtype}, threshold {threshold}: {tally.inside} of {tally.pairs} inside, "
        f"{tally.different} of them stopped elsewhere; {stopped} stopped early"
    )
    assert stopped > 0.9 * tally.pairs
    assert tally.inside <= (0 if dtype == torch.float32 else 0.5 * tally.pairs)


@pytest.mark.parametrize("dtype", DTYPES, **by_dtype)
@pytest.mark.parametrize("patience", [1, 2, 5])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_nothing_changes_nothing_is_read_on(value, patience, dtype, device):
    logits = torch.zeros(LENGTH)
    values = torch.full((LENGTH, DIM), value)
    criterion = Stability(1e-6, 1e-6, patience)
    for walk, start in (("oldest_first", 64), ("sink_recent", 128)):
        inputs = from_logits(logits, values, dtype, device, walk)
        result = inputs.call(decode_attention, criterion=criterion)
        assert result.stop_block.item() == patience
        assert result.tokens_read.item() == start + 64 * patience
        assert (result.out == value).all()


@pytest.mark.parametrize("dtype", DTYPES, **by_dtype)
def test_a_block_that_outweighs_all_before(dtype, device):
    """Its share is within float32's rounding of 1, and what is left of the rest still counts."""
    values = with_rows(torch.ones(192, DIM), slice(64, 128), 3.0)
    for logit in range(10, 21):
        logits = with_rows(torch.zeros(192), slice(64, 128), float(logit))
        inputs = from_logits(logits, values, dtype, device, "oldest_first")
        inputs.tensors[0][:] = inputs.tensors[0][:, :1]  # all heads see the same
        change = 2 * math.exp(logit) / (1 + math.exp(logit))
        for threshold, stop in ((change * 0.999, 2), (change * 1.001, 1)):
            criterion = Stability(threshold, 0.1, 1)
            result = inputs.call(decode_attention, criterion=criterion)
            assert result.stop_block.item() == stop, (logit, threshold)
            check(inputs, criterion, result)


@pytest.mark.parametrize(
    ("criterion", "stop"),
    [
        (Stability(0.3, 0.2, 1), 1),
        (Stability(0.3, 0.2, 2), 2),
        (Stability(0.3, 0.2, 3), 3),
        (Stability(0.3, 0.2, 4), -1),
        (Stability(0.3, 0.1, 2), -1),
        (Stability(0.2, 0.2, 2), -1),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, **by_dtype)
def test_stops_found_by_hand(criterion, stop, dtype, device):
    # Changes (0, 0), (.2546, .1056), (.25, 0); see the test of the reference.
    points = [(1, 0), (1, 0), (0, 1), (0, 0)]
    inputs = Inputs(tuple(t.to(device) for t in plane_cache(points, dtype)), dict(PLANE))
    result = inputs.call(decode_attention, criterion=criterion)
    assert result.stop_block.item() == stop
    assert result.tokens_read.item() == (4 if stop < 0 else stop + 1)


@pytest.mark.parametrize(
    ("points", "stop"),
    [
        # From zero to something is infinite, zero to zero is none; then (1,0)/3 -> /4 changes .25.
        ([(0, 0), (0, 0), (1, 0), (0, 0)], {1: 1, 2: -1}),
        # Something to exactly zero is 1 and 1.
        ([(1, 0), (-1, 0), (0, 0), (0, 0)], {1: 2, 2: 3}),
    ],
)
def test_zero_outputs(points, stop, device):
    inputs = Inputs(tuple(t.to(device) for t in plane_cache(points)), dict(PLANE))
    for patience, expected in stop.items():
        result = inputs.call(decode_attention, criterion=Stability(0.5, 0.5, patience))
        assert result.stop_block.item() == expected
    # 1 and 1 is stable under larger thresholds, an infinite change only under infinite ones.
    at_one = inputs.call(decode_attention, criterion=Stability(1.0, 1.0, 3))
    assert at_one.stop_block.item() == (-1 if points[0] == (0, 0) else 3)
    unbounded = inputs.call(decode_attention, criterion=Stability(math.inf, math.inf, 3))
    assert unbounded.stop_block.item() == 3


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("hidden_by", ["seq_starts", "sliding_window"])
@pytest.mark.parametrize("dtype", DTYPES, **by_dtype)
def test_hidden_blocks_never_count(hidden_by, walk, dtype, device):
    """Hidden tokens in front change nothing; 304 of them are a whole number of units."""
    hidden, seen = 304, 700
    if hidden_by == "seq_starts":
        case = Case("hidden", (hidden + seen,), starts=(hidden,), walk=walk)
    else:
        case = Case("hidden", (hidden + seen,), walk=walk, options={"sliding_window": seen})
    inputs = build(case, dtype, device)
    query, keys, values, table, lens = inputs.tensors
    plain = Inputs((query, keys, values, table[:, hidden // 16 :], lens - hidden), {"walk": walk})
    criterion = Stability(0.1, 5e-3, 2)
    check(inputs, criterion)
    for a, b in zip(
        inputs.call(decode_attention, criterion=criterion),
        plain.call(decode_attention, criterion=criterion),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, **by_dtype)
def test_thresholds_per_head_are_those_of_each_head(dtype, device):
    inputs = build(Case("limits", (1500, 800), num_q_heads=6, num_kv_heads=3), dtype, device)
    scales, directions = (0.2, 0.1, 1e-7), (0.02, 5e-3, 1e-7)
    together = inputs.call(
        decode_attention,
        criterion=Stability(torch.tensor(scales), torch.tensor(directions), 2),
    )
    assert (together.stop_block[:, 2] == -1).all()
    assert (together.stop_block[:, :2] > 0).any()
    for h, limits in enumerate(zip(scales, directions, strict=True)):
        alone = inputs.call(decode_attention, criterion=Stability(*limits, 2))
        assert torch.equal(together.stop_block[:, h], alone.stop_block[:, h])
        assert torch.equal(together.out[:, 2 * h : 2 * h + 2], alone.out[:, 2 * h : 2 * h + 2])


def test_group_stops_with_its_last_head(device):
    """A group reads until all of its heads are stable, and every head uses all of it."""
    inputs = build(Case("group", (1504,), num_q_heads=4, num_kv_heads=1), torch.float32, device)
    criterion = Stability(0.03, 1e-3, 2)
    group = inputs.call(decode_attention, criterion=criterion)
    singles = []
    for q in range(4):
        query, *rest = inputs.tensors
        single = Inputs((query[:, q : q + 1], *rest), inputs.options)
        singles.append(single.call(decode_attention, criterion=criterion).stop_block.item())
    assert len(set(singles)) > 1
    assert group.stop_block.item() >= max(singles)
    assert group.tokens_read.item() == 128 + 64 * group.stop_block.item()
