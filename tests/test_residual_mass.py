"""ResidualMass, alone and together with Stability: stops where little is left to read."""

import math
import operator
from dataclasses import replace

import pytest
import torch
from cases import BASE, CACHE_DTYPES, CASES, DTYPES, PLANE, Case, Inputs, build, plane_cache
from coded import call_guided, guided_inputs, with_codes
from contract import Tally, check
from rests import bare_arguments, with_true_rest, without_rest

from art_torch import (
    CombinedCriterion,
    DecodeResult,
    ResidualMass,
    Stability,
    decode_attention,
    guided_walk,
    reference,
)

pytestmark = pytest.mark.usefixtures("one_thread")
by_name = {"ids": lambda case: case.name}
by_dtype = {"ids": lambda dtype: str(dtype).removeprefix("torch.")}
by_text = {"ids": lambda criterion: str(criterion)}

SETTLED = Stability(0.1, 5e-3, 2)
CRITERIA = [
    *(ResidualMass(eps) for eps in (0.0, 1e-3, 0.03, 0.2, 0.5, 0.9)),
    *(SETTLED | ResidualMass(eps) for eps in (1e-3, 0.2, 0.5)),
    *(SETTLED & ResidualMass(eps) for eps in (0.0, 0.05, 0.3, 0.7)),
    Stability(torch.tensor([0.2, 0.05]), torch.tensor([0.02, 2e-3]), 1) & ResidualMass(0.4),
]
EXPLICIT = [case for case in CASES if case.walk == "explicit"]
LISTED = replace(BASE, walk="explicit", pinned=5)
WALKS = [
    *EXPLICIT,
    replace(LISTED, name="peaked", query_scale=5.0, seq_lens=(1000, 333, 0, 17)),
    replace(LISTED, name="diffuse", query_scale=0.1, seq_lens=(64, 0, 1, 700), pinned=None),
    replace(LISTED, name="sinks", sinks=True, pinned="per_head"),
    replace(LISTED, name="all_logits", sinks=True, alibi=True, starts=(150, 20),
            options={"softcap": 20.0, "sliding_window": 900}),
    replace(LISTED, name="gqa", num_q_heads=24, num_kv_heads=2, layout="tokens_last"),
    replace(LISTED, name="per_head", seq_lens=((700, 20), (0, 333)), layout="head_pool"),
    replace(LISTED, name="small_blocks", options={"unit_size": 4, "block_size": 4}),
]  # fmt: skip
GUIDED = [
    Case("ragged", (2000, 17, 0, 900, 64), num_q_heads=8, query_scale=3.0),
    Case("everything", (2000, 1500), starts=(37, 1400), sinks=True, alibi=True,
         options={"softcap": 20.0, "sliding_window": 1800}),
    Case("heads", ((700, 20), (0, 1333)), num_q_heads=4, query_scale=4.0, layout="head_pool"),
]  # fmt: skip


def check_all(inputs, report, name):
    tally, stops = Tally(), set()
    for criterion in CRITERIA:
        result = inputs.call(decode_attention, criterion=criterion)
        tally += check(inputs, criterion, result)
        stops.add(tuple(result.stop_block.flatten().tolist()))
    device = inputs.tensors[0].device.type
    report(
        f"ResidualMass, {name}, {inputs.dtype}, {device}: {tally.inside} of {tally.pairs} in the "
        f"margin, {tally.different} of them stopped elsewhere"
    )
    allowed = {torch.float32: 0, torch.float16: 0.05, torch.bfloat16: 0.15}[inputs.dtype]
    assert tally.inside <= allowed * tally.pairs
    assert len(stops) >= 4


@pytest.mark.parametrize("dtype", CACHE_DTYPES, **by_dtype)
@pytest.mark.parametrize("case", WALKS, **by_name)
def test_true_rests_against_the_reference(case, dtype, device, report):
    check_all(with_true_rest(build(case, dtype, device)), report, case.name)


def guided(case, dtype, device):
    inputs = build(case, dtype, device)
    codes = with_codes(inputs)
    return guided_inputs(inputs, call_guided(guided_walk, inputs, codes, rest=True)), codes


@pytest.mark.parametrize("dtype", CACHE_DTYPES, **by_dtype)
@pytest.mark.parametrize("case", GUIDED, **by_name)
def test_estimated_rests_against_the_reference(case, dtype, device, report):
    inputs, (pool, table) = guided(case, dtype, device)
    check_all(inputs, report, f"guided {case.name}")
    # The operator asks for the walk and its rest by itself.
    alone = build(case, dtype, device)
    alone.options |= {"walk": "guided", "key_codes": pool, "code_table": table, "num_pinned": None}
    for criterion in (*CRITERIA[2:5], SETTLED | ResidualMass(0.1), SETTLED):
        rests = inputs if criterion is not SETTLED else without_rest(inputs)
        expected = rests.call(decode_attention, criterion=criterion)
        for a, b in zip(alone.call(decode_attention, criterion=criterion), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("eps", [0.0, 1e-4, 0.01, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("dtype", CACHE_DTYPES, **by_dtype)
@pytest.mark.parametrize("case", [*EXPLICIT, WALKS[-3], WALKS[-5]], **by_name)
def test_a_true_rest_bounds_what_is_missing(case, dtype, eps, device):
    """Exactly what is read of the softmax mass, sinks included, is at least 1 - eps."""
    inputs = with_true_rest(build(case, dtype, device))
    result = inputs.call(decode_attention, criterion=ResidualMass(eps))
    result = DecodeResult(*(tensor.cpu() for tensor in result))
    exact = without_rest(inputs).call(reference.decode_attention)
    read, everything = result.lse.double(), exact.lse
    if "attn_sinks" in inputs.options:
        read, everything = (
            torch.logaddexp(lse, inputs.options["attn_sinks"].double().cpu())
            for lse in (read, everything)
        )
    some = exact.lse > -math.inf
    share = (read - everything).exp()[some]
    # Half types may sum rounded probabilities.
    assert share.min() >= 1 - eps - 1e-5 - reference.PROBABILITY_ROUNDING.get(dtype, 0.0)
    # And the block before would have left more; so nothing is read in vain.
    assert ((result.stop_block >= 0) == (exact.tokens_read > 0)).all()
    if eps >= 0.5:
        assert (result.tokens_read < exact.tokens_read).any()
    if eps == 0:
        assert torch.equal(result.tokens_read, exact.tokens_read)


# Four tokens with logits 0: after block j, (3 - j) / 4 is left. Changes of the blocks 1 to 3:
# (0, 0), (.2546, .1056), (.25, 0); see the test of the reference.
POINTS = [(1, 0), (1, 0), (0, 1), (0, 0)]
ALL, TWO, FIRST = Stability(0.3, 0.2, 1), Stability(0.3, 0.2, 2), Stability(0.2, 0.2, 1)
BY_HAND = [
    (ResidualMass(0.9), 0),
    (ResidualMass(0.74), 1),
    (ResidualMass(0.51), 1),
    (ResidualMass(0.49), 2),
    (ResidualMass(0.24), 3),
    (ResidualMass(0.0), 3),
    # Either: whichever comes first.
    (ALL | ResidualMass(0.9), 0),
    (ALL | ResidualMass(0.1), 1),
    (TWO | ResidualMass(0.6), 1),
    (TWO | ResidualMass(0.1), 2),
    (Stability(0.2, 0.2, 2) | ResidualMass(0.3), 2),
    # Both: the first stable block that is covered, however long it took to be.
    (ALL & ResidualMass(0.9), 1),
    (ALL & ResidualMass(0.3), 2),
    (TWO & ResidualMass(0.9), 2),
    (TWO & ResidualMass(0.1), 3),
    (Stability(0.3, 0.2, 3) & ResidualMass(0.3), 3),
    (FIRST & ResidualMass(0.6), 1),
    (FIRST & ResidualMass(0.4), -1),  # stable at block 1, covered from block 2 on
    (Stability(0.3, 0.2, 4) & ResidualMass(0.9), -1),
]


def plane(device, dtype=torch.float32, pinned=None, rest=(3, 2, 1, 0), **more):
    tensors = plane_cache(POINTS, dtype)
    walk = {
        "walk": torch.tensor([[[0, 1, 2, 3]]], dtype=torch.int32),
        "walk_lens": torch.tensor([[4]], dtype=torch.int32),
        "log_rest": torch.tensor([[rest]], dtype=torch.float32).log(),
        "num_pinned": pinned,
    }
    return Inputs(tensors, {**PLANE, **walk, **more}).to(device)


FUNCTIONS = [decode_attention, reference.decode_attention]
which = {"ids": ["operator", "reference"]}


@pytest.mark.parametrize("function", FUNCTIONS, **which)
@pytest.mark.parametrize("dtype", DTYPES, **by_dtype)
@pytest.mark.parametrize(("criterion", "stop"), BY_HAND, ids=lambda value: str(value))
def test_stops_found_by_hand(criterion, stop, dtype, function, device):
    result = plane(device, dtype).call(function, criterion=criterion)
    assert result.stop_block.item() == stop
    assert result.tokens_read.item() == (4 if stop < 0 else stop + 1)


@pytest.mark.parametrize("function", FUNCTIONS, **which)
def test_all_pinned_units_are_read_before_any_decision(function, device):
    """They are block 0, however many steps a kernel takes for them."""
    for pinned, stop, read in ((2, 0, 2), (3, 0, 3), (1, 1, 2)):
        result = plane(device, pinned=pinned).call(function, criterion=ResidualMass(0.6))
        assert (result.stop_block.item(), result.tokens_read.item()) == (stop, read)
    loose = plane(device, pinned=3).call(function, criterion=ResidualMass(0.99))
    assert (loose.stop_block.item(), loose.tokens_read.item()) == (0, 3)


@pytest.mark.parametrize("function", FUNCTIONS, **which)
@pytest.mark.parametrize(
    ("sink", "eps", "stop"),
    [(math.log(4), 0.4, 0), (math.log(4), 0.37, 1), (200.0, 1e-30, 0), (-200.0, 0.49, 2)],
)
def test_sinks_count_as_read(sink, eps, stop, function, device):
    """With 4 more in the denominator: 3/8 is left, 2/8, 1/8. 200 overflows exp()."""
    inputs = plane(device, attn_sinks=torch.tensor([sink]))
    result = inputs.call(function, criterion=ResidualMass(eps))
    assert result.stop_block.item() == stop


@pytest.mark.parametrize("function", FUNCTIONS, **which)
@pytest.mark.parametrize(
    ("rest", "eps", "stop"),
    [
        ((math.nan, math.nan, 1, 0), 0.9, 2),
        ((math.nan, math.nan, math.nan, math.nan), 0.9, -1),
        ((math.inf, math.inf, 1, 0), 0.9, 2),
        ((5, 0, 5, 0), 0.0, 1),  # nothing left is nothing left, wherever
        ((5, 5, 5, 1), 0.1, -1),  # what the caller says counts, after the last block too
        ((0.1, 0.1, 5, 0), 0.2, 0),
    ],
)
def test_odd_rests(rest, eps, stop, function, device):
    inputs = plane(device, rest=rest)
    assert inputs.call(function, criterion=ResidualMass(eps)).stop_block.item() == stop
    expected = inputs.call(reference.decode_attention, criterion=ResidualMass(eps))
    assert not reference.decision_margin(expected, ResidualMass(eps), torch.float32).any()


@pytest.mark.parametrize("function", FUNCTIONS, **which)
@pytest.mark.parametrize("key", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers(key, function, device):
    """NaN and infinity are never covered, and 0 of 0 is not; the reference agrees on each."""
    inputs = plane(device)
    inputs.tensors[0][..., 0] = 1.0
    inputs.tensors[1][0, :, 0, 0] = key
    assert inputs.call(function, criterion=ResidualMass(0.9)).stop_block.item() == -1


@pytest.mark.parametrize("function", FUNCTIONS, **which)
def test_every_head_of_a_group_must_be_covered(function, device):
    case = replace(LISTED, num_q_heads=8, query_scale=4.0)
    inputs = with_true_rest(build(case, torch.float32, device))
    criterion = ResidualMass(0.2)
    group = inputs.call(function, criterion=criterion).stop_block
    query, *rest = inputs.tensors
    alone = []
    for q in range(4):
        heads = [q, 4 + q]
        options = {**inputs.options, "log_rest": inputs.options["log_rest"][:, heads]}
        single = Inputs((query[:, heads], *rest), options)
        alone.append(single.call(function, criterion=criterion).stop_block)
    alone = torch.stack(alone)
    assert torch.equal(group, alone.amax(0))
    assert (alone.amin(0) < group).any()


@pytest.mark.parametrize("criterion", [CRITERIA[3], CRITERIA[8], CRITERIA[11]], **by_text)
@pytest.mark.parametrize("dtype", CACHE_DTYPES, **by_dtype)
@pytest.mark.parametrize("case", [WALKS[3], WALKS[-2], *GUIDED[:2]], **by_name)
def test_any_splits_threads_and_batch(case, dtype, criterion, device):
    """On a GPU one thread block for each sequence and head is a schedule with bits of its own."""
    if case in GUIDED:
        inputs, _ = guided(case, dtype, device)
    else:
        inputs = with_true_rest(build(case, dtype, device))
    on_gpu = device.type == "cuda"
    chosen = inputs.call(decode_attention, criterion=criterion)
    options = bare_arguments(inputs, criterion)
    split = torch.ops.art._decode_attention_split
    schedules = [(1,), (2, 5, 1000)] if on_gpu else [(1, 2, 5, 1000)]
    bits = [split(*inputs.tensors, **options, num_splits=numbers[0]) for numbers in schedules]
    assert any(all(map(torch.equal, chosen, expected)) for expected in bits)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for numbers, expected in zip(schedules, bits, strict=True):
            for num_splits in numbers:
                result = split(*inputs.tensors, **options, num_splits=num_splits)
                assert all(map(torch.equal, result, expected))
    call = {"criterion": criterion, "batch_invariant": on_gpu}
    together = inputs.call(decode_attention, **call)
    for row in range(len(case.seq_lens)):
        single = inputs.select([row]).call(decode_attention, **call)
        assert all(torch.equal(a[0], b[row]) for a, b in zip(single, together, strict=True))


@pytest.mark.parametrize("eps", [-0.1, 1, 1.5, math.nan, math.inf])
def test_bad_eps(eps):
    with pytest.raises(ValueError, match=f"at least 0 and less than 1, got {eps}"):
        ResidualMass(eps)


@pytest.mark.parametrize("eps", [None, "0.1", True, torch.tensor(0.1)])
def test_eps_of_another_type(eps):
    with pytest.raises(TypeError, match=f"number, got {type(eps).__name__}"):
        ResidualMass(eps)


def test_combinations():
    stability, residual = Stability(0.1, 0.01, 3), ResidualMass(0.1)
    either, both = stability | residual, stability & residual
    assert either == residual | stability == CombinedCriterion(stability, residual)
    assert both == residual & stability == CombinedCriterion(stability, residual, all_agree=True)
    assert len({either, both, stability | ResidualMass(0.1), residual, ResidualMass(0.1)}) == 3
    for a, b in ((stability, stability), (residual, residual), (residual, 0.1), (either, residual)):
        for combine in (operator.or_, operator.and_):
            with pytest.raises(TypeError, match="unsupported operand"):
                combine(a, b)
    for wrong in ((residual, stability), (stability, None), (stability, residual, 1)):
        with pytest.raises(TypeError, match="must be a "):
            CombinedCriterion(*wrong)
