"""Shapes, walks and options drawn at random, against the reference."""

from dataclasses import replace

import pytest
import torch
from cases import DTYPES, Case, build
from contract import check
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rests import with_true_rest

from art_torch import ResidualMass, Stability, append_kv, decode_attention, reference

pytestmark = pytest.mark.usefixtures("one_thread")

# The same examples in every run: a failure is a change of the code, never of the dice.
SETTINGS = settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
LAYOUTS = ["nhd", "hnd", "interleaved_tokens", "padded", "dense", "tokens_last", "head_pool"]
lengths = st.one_of(st.integers(0, 70), st.integers(0, 700))


@st.composite
def cases(draw):
    """A case that keeps the rules of the contract."""
    layout = draw(st.sampled_from(LAYOUTS))
    heads, batch = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    dims = st.integers(4, 32).map(lambda n: 8 * n)
    unit = draw(st.sampled_from([1, 4, 8, 16, 32]))
    options = {"unit_size": unit, "block_size": unit * draw(st.integers(1, 8))}
    if layout == "dense":
        options["unit_size"] = unit = draw(st.integers(1, 100))
        options["block_size"] = unit * draw(st.integers(1, 3))
    per_head_lens = draw(st.booleans())
    if per_head_lens:
        lens = draw(st.lists(st.tuples(*[lengths] * heads), min_size=batch, max_size=batch))
    else:
        lens = draw(st.lists(lengths, min_size=batch, max_size=batch))
        if draw(st.booleans()):
            options["sliding_window"] = draw(st.integers(1, 800))
    if draw(st.booleans()):
        options["softcap"] = draw(st.floats(1.0, 50.0))
    if draw(st.booleans()):
        options["scale"] = draw(st.floats(0.01, 0.4))
    walk = draw(st.sampled_from(["oldest_first", "recent_first", "sink_recent", "explicit"]))
    return Case(
        "drawn",
        tuple(lens),
        num_q_heads=heads * draw(st.integers(1, 8)),
        num_kv_heads=heads,
        head_dim=draw(dims),
        value_dim=draw(dims),
        page_size=unit * draw(st.integers(1, 64 // unit)) if layout != "dense" else 16,
        layout=layout,
        per_head_table=draw(st.booleans()),
        query_scale=draw(st.sampled_from([0.1, 1.0, 4.0])),
        value_mean=draw(st.sampled_from([0.0, 1.0])),
        starts=draw(st.none() | st.tuples(*[st.integers(0, 300)] * batch)),
        sinks=draw(st.booleans()),
        alibi=not per_head_lens and draw(st.booleans()),
        walk=walk,
        pinned=draw(st.sampled_from([None, 0, 1, 5, 1000, "per_head"])),
        options=options,
    )


thresholds = st.floats(-9, -0.5).map(lambda e: 10.0**e)


@SETTINGS
@given(
    case=cases(),
    dtype=st.sampled_from(DTYPES),
    criterion=st.none() | st.builds(Stability, thresholds, thresholds, st.integers(1, 4)),
    seed=st.integers(0, 2**31),
)
def test_any_call_agrees_with_the_reference(case, dtype, criterion, seed, device):
    check(build(case, dtype, device, seed), criterion)


@SETTINGS
@given(
    case=cases(),
    query_dtype=st.sampled_from(DTYPES),
    criterion=st.none() | st.builds(Stability, thresholds, thresholds, st.integers(1, 4)),
    seed=st.integers(0, 2**31),
)
def test_any_call_over_int8_agrees_with_the_reference(case, query_dtype, criterion, seed):
    check(build(case, torch.int8, seed=seed, query_dtype=query_dtype), criterion)


@settings(SETTINGS, max_examples=120)
@given(
    case=cases(), dtype=st.sampled_from(DTYPES), eps=st.floats(0, 1, exclude_max=True),
    other=st.none() | st.builds(Stability, thresholds, thresholds, st.integers(1, 3)),
    all_agree=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_rest_agrees_with_the_reference(case, dtype, eps, other, all_agree, seed, device):
    # This is about stops. Values that cancel would make it one of rounding in long sums, too.
    inputs = build(replace(case, walk="explicit", value_mean=1.0), dtype, device, seed)
    criterion = ResidualMass(eps)
    if other is not None:
        criterion = criterion & other if all_agree else criterion | other
    check(with_true_rest(inputs), criterion)


@SETTINGS
@given(case=cases(), dtype=st.sampled_from(DTYPES), data=st.data())
def test_any_row_alone_has_the_bits_it_has_in_a_batch(case, dtype, data, device):
    inputs = build(case, dtype, device)
    criterion = Stability(0.1, 5e-3, 1)
    together = inputs.call(decode_attention, criterion=criterion)
    row = data.draw(st.integers(0, len(case.seq_lens) - 1))
    alone = inputs.select([row]).call(decode_attention, criterion=criterion)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a[0], b[row])


@SETTINGS
@given(
    pages=st.integers(1, 5),
    page_size=st.integers(1, 20),
    heads=st.integers(1, 4),
    dims=st.tuples(*[st.integers(4, 32).map(lambda n: 8 * n)] * 2),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_any_append_agrees_with_the_reference(pages, page_size, heads, dims, dtype, data, device):
    slots = st.integers(-1, pages * page_size - 1)
    unique = st.lists(slots, max_size=30, unique_by=lambda s: s if s >= 0 else object())
    mapping = torch.tensor(data.draw(unique), dtype=torch.long)
    if data.draw(st.booleans()):  # every head writes in an order of its own
        orders = [data.draw(st.permutations(mapping.tolist())) for _ in range(heads)]
        mapping = torch.tensor(orders, dtype=torch.long).view(heads, -1).T
    new = [torch.randn(len(mapping), heads, d).to(device=device, dtype=dtype) for d in dims]
    ours, theirs = (
        [torch.zeros(pages, page_size, heads, d, dtype=dtype, device=device) for d in dims]
        for _ in range(2)
    )
    append_kv(*new, *ours, mapping.to(device))
    reference.append_kv(*new, *theirs, mapping.to(device))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@SETTINGS
@given(
    rows=st.lists(
        st.lists(st.floats(width=32) | st.floats(-10, 10, width=32), min_size=8, max_size=8),
        min_size=1,
        max_size=20,
    ),
    copies=st.integers(4, 32),
    dtype=st.sampled_from(DTYPES),
)
def test_any_int8_row_has_the_bytes_of_the_reference(rows, copies, dtype):
    new = torch.tensor(rows).repeat(1, copies).to(dtype)[:, None]
    cache = torch.zeros(len(rows), 1, 1, new.shape[-1], dtype=torch.int8)
    scale = torch.zeros(len(rows), 1, 1)
    slots = torch.arange(len(rows))
    append_kv(new, new, cache, cache.clone(), slots, key_scale=scale, value_scale=scale.clone())
    codes, expected = reference.quantize(new)
    assert torch.equal(cache[:, 0], codes)
    assert torch.equal(scale[:, 0].view(torch.int32), expected.view(torch.int32))
