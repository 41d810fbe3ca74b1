"""The operator against the reference, over the table of cases."""

import math

import pytest
import torch
from cases import CACHE_DTYPES, CASES, CRITERIA, DTYPES, LOOSE, Case, build
from contract import Tally, check

from art_torch import DecodeResult, Stability, decode_attention

pytestmark = pytest.mark.usefixtures("one_thread")

by_name = {"ids": lambda case: case.name}
by_dtype = {"ids": lambda dtype: str(dtype).removeprefix("torch.")}


@pytest.mark.parametrize("dtype", CACHE_DTYPES, **by_dtype)
@pytest.mark.parametrize("case", CASES, **by_name)
def test_case(case, dtype, device):
    inputs = build(case, dtype, device)
    check(inputs, None)
    check(inputs, LOOSE)


@pytest.mark.parametrize("dtype", CACHE_DTYPES, **by_dtype)
@pytest.mark.parametrize("criterion", CRITERIA, ids=range(len(CRITERIA)))
def test_criteria(criterion, dtype, device):
    case = Case("criteria", (700, 1500, 90), query_scale=6.0)
    check(build(case, dtype, device), criterion)


@pytest.mark.parametrize("dtype", CACHE_DTYPES, **by_dtype)
def test_a_criterion_that_never_fires_changes_no_bit(dtype, device):
    inputs = build(Case("never", (700, 64, 0)), dtype, device)
    exact = inputs.call(decode_attention)
    for criterion in (Stability(0.0, 0.0, 1), Stability(0.1, 0.1, 10**6)):
        never = inputs.call(decode_attention, criterion=criterion)
        for a, b in zip(exact, never, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", CACHE_DTYPES, **by_dtype)
def test_out_variant(dtype, device):
    inputs = build(Case("out", (700, 64, 0)), dtype, device)
    expected = inputs.call(decode_attention, criterion=LOOSE)
    out = DecodeResult(*(torch.full_like(t, 77) for t in expected))
    returned = inputs.call(decode_attention, criterion=LOOSE, out=out)
    for got, written, wanted in zip(returned, out, expected, strict=True):
        assert got.data_ptr() == written.data_ptr()
        assert torch.equal(written, wanted)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, **by_dtype)
def test_disjoint_walks_merge_by_lse(sinks, dtype, device):
    case = Case("merge", (1000, 333, 40), sinks=sinks, walk="explicit")
    inputs = build(case, dtype, device)
    sink_logits = inputs.options.pop("attn_sinks", None)
    walk, lens = inputs.options["walk"], inputs.options["walk_lens"]
    first = lens // 3
    parts = [inputs.call(decode_attention, walk_lens=first)]
    rest = torch.full_like(walk, -1)
    for b in range(walk.shape[0]):
        for h in range(walk.shape[1]):
            tail = walk[b, h, first[b, h] : lens[b, h]]
            rest[b, h, : len(tail)] = tail
    parts.append(inputs.call(decode_attention, walk=rest, walk_lens=lens - first))

    lse = torch.logaddexp(parts[0].lse, parts[1].lse)
    share = [(p.lse - lse).exp().nan_to_num(0)[..., None] for p in parts]
    out = sum(p.out.float() * s for p, s in zip(parts, share, strict=True))
    if sinks:
        inputs.options["attn_sinks"] = sink_logits
        out = out * torch.sigmoid(lse - sink_logits)[..., None]
    # The merged result has to pass as a result of the whole walk.
    whole = inputs.call(decode_attention)
    tokens = parts[0].tokens_read + parts[1].tokens_read
    check(inputs, None, DecodeResult(out.to(dtype), lse, tokens, whole.stop_block))
    assert torch.equal(tokens, whole.tokens_read)


def test_nan_in_a_visible_token_is_never_stable(device):
    inputs = build(Case("nan", (400,), walk="recent_first"), torch.float32, device)
    _, _, value_cache, table, _ = inputs.tensors
    value_cache[table[0, 300 // 16], 300 % 16] = math.nan  # read in the second block
    result = inputs.call(decode_attention, criterion=Stability(1e9, 1e9, 2))
    assert (result.stop_block == -1).all()
    assert (result.tokens_read == 400).all()
    assert result.out.isnan().all()


# Share of stops that rounding may decide, at most: (independent normal inputs, attention that sits
# on few of the tokens, where many more sequences stop).
SHARES = {
    torch.float32: (0.01, 0.01),
    torch.float16: (0.05, 0.05),
    torch.bfloat16: (0.05, 0.15),
    torch.int8: (0.01, 0.01),  # with float32 queries
}


@pytest.mark.parametrize("peaked", [False, True], ids=["normal", "peaked"])
@pytest.mark.parametrize("dtype", CACHE_DTYPES, **by_dtype)
def test_share_inside_the_margin(dtype, peaked, device, report):
    tally, stopped = Tally(), 0
    for seed in range(24):
        case = Case(
            "margin",
            (600, 1200, 2000),
            num_q_heads=8,
            query_scale=(6.0 + seed % 4) if peaked else 1.0,
            value_mean=0.0,
            walk=("sink_recent", "oldest_first", "recent_first")[seed % 3],
        )
        inputs = build(case, dtype, device, seed)
        result = inputs.call(decode_attention, criterion=Stability())
        tally += check(inputs, Stability(), result)
        stopped += int((result.stop_block >= 0).sum())
    share = tally.inside / tally.pairs
    report(
        f"decision margin, {dtype}, {'peaked' if peaked else 'normal'} inputs on {device}: "
        f"{tally.inside} of {tally.pairs} inside ({share:.1%}), {tally.different} of them stopped "
        f"elsewhere; {stopped} stopped early"
    )
    assert share < SHARES[dtype][peaked]
    assert (stopped > tally.pairs / 2) == peaked
