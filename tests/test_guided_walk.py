"""The order of the units, from key codes."""

import inspect
import math

import pytest
import torch
from cases import BASE, CACHE_DTYPES, DTYPES, LOOSE, Case, build
from coded import (
    GUIDED_CASES,
    UNIT,
    call_guided,
    check,
    check_rest,
    guided_inputs,
    visible_of,
    with_codes,
)
from contract import check as check_attention
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from art_torch import Stability, decode_attention, guided_walk, reference
from art_torch.guided import GUIDED_TENSORS, LOGIT_ARGUMENTS

pytestmark = pytest.mark.usefixtures("one_thread")
by_name = {"ids": lambda case: case.name}
by_dtype = {"ids": lambda dtype: str(dtype).removeprefix("torch.")}

LENGTHS = [Case(f"length_{n}", (n,), num_q_heads=6) for n in (127, 128, 129)]
LARGE = Case("large", (4000, 17, 0, 900, 64, 2500), num_q_heads=8, query_scale=3.0)
# Tests that only need some of everything.
SOME = [
    LARGE,
    Case("head_pool", ((4000, 17), (900, 2500)), layout="head_pool", head_dim=128),
    Case(
        "everything", (4000, 1500), starts=(37, 1400), sinks=True, alibi=True,
        options={"softcap": 20.0, "sliding_window": 3500},
    ),
    Case("tokens_last", (1000, 2023), layout="tokens_last", head_dim=96, num_q_heads=14),
]  # fmt: skip


def test_arguments_that_others_hand_on():
    """One that is left out would make the walk of another attention."""
    handed_on = (*GUIDED_TENSORS, *LOGIT_ARGUMENTS)
    of_walk, of_attention = (
        inspect.signature(function).parameters for function in (guided_walk, decode_attention)
    )
    assert set(of_walk) - set(handed_on) == {"checked", "rest"}
    assert set(handed_on) <= set(of_attention)


def walk_of(inputs, codes, **more):
    return call_guided(guided_walk, inputs, codes, **more)


@pytest.mark.parametrize("dtype", CACHE_DTYPES, **by_dtype)
@pytest.mark.parametrize("case", [*GUIDED_CASES, *LENGTHS, *SOME], **by_name)
def test_against_the_reference(case, dtype, device):
    inputs = build(case, dtype, device)
    total, different = check(inputs, with_codes(inputs))
    # A share is rounded twice; both roundings seldom fall on the other side.
    assert different <= 5 + 0.02 * total


@pytest.mark.parametrize("dtype", CACHE_DTYPES, **by_dtype)
@pytest.mark.parametrize("case", [*GUIDED_CASES, *LENGTHS, *SOME], **by_name)
def test_what_a_walk_leaves(case, dtype, device):
    inputs = build(case, dtype, device)
    codes = with_codes(inputs)
    plain, result = walk_of(inputs, codes), walk_of(inputs, codes, rest=True)
    assert plain.log_rest.shape == (*inputs.tensors[0].shape[:2], 0)
    assert result.log_rest.dtype == plain.log_rest.dtype == torch.float32
    assert result.log_rest.shape == (*inputs.tensors[0].shape[:2], result.walk.shape[-1])
    for a, b in zip(plain[:4], result[:4], strict=True):
        assert torch.equal(a, b)
    total, different = check_rest(inputs, codes, result)
    # A heavy unit that is rounded the other way moves all that is left before it.
    assert different <= 5 + 0.02 * total


@pytest.mark.parametrize("criterion", [None, LOOSE, Stability()], ids=["exact", "loose", "default"])
@pytest.mark.parametrize("dtype", CACHE_DTYPES, **by_dtype)
@pytest.mark.parametrize("case", [BASE, *LENGTHS, *SOME], **by_name)
def test_attention_over_a_guided_walk(case, dtype, criterion, device):
    """The walk is one that the operator takes, and its stops are those of the reference."""
    inputs = build(case, dtype, device)
    codes = with_codes(inputs)
    guided = guided_inputs(inputs, walk_of(inputs, codes))
    tally = check_attention(guided, criterion)
    assert tally.pairs == len(case.seq_lens) * case.num_kv_heads
    options = {**inputs.options, "num_pinned": None, "walk": "guided", "checked": True}
    result = decode_attention(
        *inputs.tensors, **options, criterion=criterion, key_codes=codes[0], code_table=codes[1]
    )
    for a, b in zip(result, guided.call(decode_attention, criterion=criterion), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", SOME, **by_name)
def test_pinned_first_and_every_unit_once(case, device):
    inputs = build(case, torch.float32, device)
    result = walk_of(inputs, with_codes(inputs))
    for b in range(len(case.seq_lens)):
        for h in range(case.num_kv_heads):
            visible = visible_of(inputs, b, h)
            units = sorted({token // UNIT for token in visible})
            walk = result.walk[b, h, : result.walk_lens[b, h]].tolist()
            assert sorted(walk) == units
            last_group = visible.stop // 64 * 64 - 64  # and all that follows it
            pinned = [u for u in units if u in units[:4] or u * UNIT >= last_group]
            assert walk[: result.num_pinned[b, h]] == pinned


def test_the_heaviest_unit_comes_first(device):
    """One unit holds nearly everything: right after the pinned ones, with a share near 1."""
    inputs = build(Case("needle", (3000,), num_q_heads=2, num_kv_heads=1), torch.float32, device)
    query, keys, _, table, _ = inputs.tensors
    keys[table[0, 77].long(), 3, 0] = 6 * query[0, 1]
    result = walk_of(inputs, with_codes(inputs))
    pinned = int(result.num_pinned[0, 0])
    assert result.walk[0, 0, pinned] == 77
    assert -0.05 < result.log_mass[0, 0, pinned] <= 0.02


def test_shares_add_up(device):
    """With one query head, the shares and that of the sink are those of a softmax."""
    case = Case("shares", (2000, 333), num_q_heads=2, num_kv_heads=2)
    inputs = build(case, torch.float32, device)
    codes = with_codes(inputs)
    torch.testing.assert_close(
        walk_of(inputs, codes).log_mass.exp().sum(-1).cpu(), torch.ones(2, 2), rtol=0, atol=0.011
    )
    inputs.options["attn_sinks"] = torch.full((2,), 50.0, device=device)
    assert (walk_of(inputs, codes).log_mass.exp().sum(-1) < 1e-3).all()


def test_equal_units_keep_their_order(device):
    inputs = build(Case("equal", (1600,), num_q_heads=2, num_kv_heads=1), torch.float32, device)
    inputs.tensors[0].zero_()
    result = walk_of(inputs, with_codes(inputs))
    walk = result.walk[0, 0, :100].tolist()
    assert walk == [0, 1, 2, 3, 96, 97, 98, 99, *range(4, 96)]
    mass = result.log_mass[0, 0, :100].cpu()
    torch.testing.assert_close(mass, torch.full((100,), -math.log(100)), rtol=0, atol=0.006)


@pytest.mark.parametrize("dtype", CACHE_DTYPES, **by_dtype)
@pytest.mark.parametrize("case", SOME, **by_name)
def test_alone_in_any_batch_and_with_any_threads(case, dtype, device):
    inputs = build(case, dtype, device)
    pool, table = with_codes(inputs)
    expected = walk_of(inputs, (pool, table), rest=True)
    size = len(case.seq_lens)
    for rows in [[i] for i in range(size)] + [list(range(size))[::-1], [size - 1, 0, 0]]:
        some = walk_of(inputs.select(rows), (pool, table[rows]), rest=True)
        for a, b in zip(some, expected, strict=True):
            assert torch.equal(a, b[rows])
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for _ in range(3):
            again = walk_of(inputs, (pool, table), rest=True)
            for a, b in zip(again, expected, strict=True):
                assert torch.equal(a, b)


def test_what_is_left_is_halved():
    """Equal units: after i + 1 of n, the log-sum-exp of n - 1 - i of them."""
    inputs = build(Case("equal", (1600,), num_q_heads=2, num_kv_heads=1), torch.float32)
    inputs.tensors[0].zero_()
    rest = walk_of(inputs, with_codes(inputs), rest=True).log_rest[0, :, :99]
    expected = torch.arange(99, 0, -1).log().expand(2, -1) + math.log(16)
    torch.testing.assert_close(rest, expected, rtol=0, atol=0.0055)


def one_heavy_unit(heads, logit):
    """Seventeen units with logits 0, but for the last one, which has no codes. Walk: 0 to 3, 12 to
    15, this one, 4 to 11.
    """
    inputs = build(Case("heavy", (272,), num_q_heads=heads, num_kv_heads=1), torch.float32)
    query, keys, _, table, _ = inputs.tensors
    keys[table[0, :17].long()] = 0.0
    keys[table[0, 16].long(), :, 0] = 1.0
    query.zero_()[0, :, 0] = torch.as_tensor(logit) * 8
    result = walk_of(inputs, with_codes(inputs), rest=True)
    assert result.walk[0, 0, :17].tolist() == [*range(4), *range(12, 17), *range(4, 12)]
    return result.log_rest[0]


@pytest.mark.parametrize(("octaves", "left"), [(28, 16), (31, 16), (32, 8), (33, 8), (1, 16)])
def test_what_weighs_next_to_nothing_is_not_left(octaves, left):
    """That is 2^-32 of the largest unit, though this one has been read already."""
    (rest,) = one_heavy_unit(1, octaves * math.log(2))
    assert (rest > -math.inf).tolist() == [i < left for i in range(len(rest))]
    if left == 16:
        expected = torch.arange(8, 0, -1).log() + math.log(16)
        torch.testing.assert_close(rest[8:16], expected, rtol=0, atol=0.006)


def test_logits_beyond_the_limit_leave_more_than_can_be_told():
    rest = one_heavy_unit(2, [340.0, 400.0])
    assert (rest[0, :8] - 340 - math.log(16)).abs().max() < 0.006
    assert rest[1].tolist() == [math.inf] * 8 + [-math.inf] * 10


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_extreme_numbers(value, device):
    """Nothing is lost or doubled, whatever the keys and queries are."""
    inputs = build(Case("extreme", (1000,)), torch.float32, device)
    query, keys, _, table, _ = inputs.tensors
    codes = with_codes(inputs)
    keys[table[0, 61].long(), 5] = value  # not in a complete group
    query[0, 0, 3] = value
    result = walk_of(inputs, codes, rest=True)
    for h in range(2):
        assert sorted(result.walk[0, h, :63].tolist()) == list(range(63))
    assert not result.log_mass.isnan().any()
    assert not result.log_rest.isnan().any()


def test_no_sequences(device):
    inputs = build(Case("none", (5,)), torch.float32, device).select([])
    pool, table = with_codes(inputs)
    result = walk_of(inputs, (pool, table))
    assert result.walk.shape == (0, 2, 2)
    assert result.walk_lens.shape == result.num_pinned.shape == (0, 2)
    assert walk_of(inputs, (pool, table), rest=True).log_rest.shape == (0, 4, 2)


@settings(
    max_examples=120, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(st.data())
def test_random_cases(device, data):
    draw = data.draw
    heads, batch = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    options, more = {}, {}
    if draw(st.booleans()):
        lens = [tuple(draw(st.integers(0, 400)) for _ in range(heads)) for _ in range(batch)]
    else:
        lens = [draw(st.integers(0, 500)) for _ in range(batch)]
        more["alibi"] = draw(st.booleans())
        if draw(st.booleans()):
            options["sliding_window"] = draw(st.integers(1, 600))
    if draw(st.booleans()):
        options["softcap"] = draw(st.floats(1.0, 50.0))
    if draw(st.booleans()):
        more["starts"] = tuple(draw(st.integers(0, 300)) for _ in range(batch))
    case = Case(
        "drawn", tuple(lens), heads * draw(st.integers(1, 17)), heads,
        head_dim=8 * draw(st.integers(4, 32)),
        page_size=16 * draw(st.integers(1, 8)),
        layout=draw(st.sampled_from(["nhd", "hnd", "padded", "dense", "tokens_last", "head_pool"])),
        per_head_table=draw(st.booleans()), sinks=draw(st.booleans()),
        query_scale=draw(st.sampled_from([0.1, 1.0, 4.0])), options=options, **more,
    )  # fmt: skip
    inputs = build(case, draw(st.sampled_from(DTYPES)), device, seed=draw(st.integers(0, 99)))
    codes = with_codes(inputs)
    result = walk_of(inputs, codes, rest=True)
    check(inputs, codes, result)
    check_rest(inputs, codes, result)


def test_reference_result_is_usable(device):
    """What the reference orders, the reference and the operator read alike."""
    inputs = build(Case("reference", (700, 90)), torch.float32, device)
    expected = call_guided(reference.guided_walk, inputs, with_codes(inputs))
    expected = type(expected)(*(t.to(device) for t in expected))
    check_attention(guided_inputs(inputs, expected), LOOSE)
