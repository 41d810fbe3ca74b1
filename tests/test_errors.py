"""Bad input ends in a Python exception that says what was expected and what came."""

import math
import re

import pytest
import torch
from cases import Case, build
from contract import assert_refused, call

from art_torch import (
    DecodeResult,
    ResidualMass,
    Stability,
    _operators,
    decode_attention,
    reference,
)

BATCH, HQ, HKV, DIM, PAGES, PAGE = 2, 4, 2, 32, 9, 16


def arguments(device="cpu"):
    """A valid call: two sequences of 40 and 20 tokens in pages of 16."""
    g = torch.Generator().manual_seed(0)
    given = {
        "query": torch.randn(BATCH, HQ, DIM, generator=g),
        "key_cache": torch.randn(PAGES, PAGE, HKV, DIM, generator=g),
        "value_cache": torch.randn(PAGES, PAGE, HKV, DIM, generator=g),
        "block_table": torch.tensor([[3, 1, 2], [4, 5, 0]], dtype=torch.int32),
        "seq_lens": torch.tensor([40, 20], dtype=torch.int32),
    }
    return {name: tensor.to(device) for name, tensor in given.items()}


def moved(changes, device):
    """The same on a device; `Tensor.to` would give a strided tensor other strides."""
    return {
        name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)
        if isinstance(x, torch.Tensor)
        else x
        for name, x in changes.items()
    }


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def explicit(entries, lens=((2, 2), (2, 2)), **more):
    return {
        "walk": torch.tensor(entries, dtype=torch.int32),
        "walk_lens": torch.tensor(lens, dtype=torch.int32),
        **more,
    }


def heads_of_dim(dim, value_dim=DIM):
    return {
        "query": torch.zeros(BATCH, HQ, dim),
        "key_cache": torch.zeros(PAGES, PAGE, HKV, dim),
        "value_cache": torch.zeros(PAGES, PAGE, HKV, value_dim),
    }


GOOD_WALK = [[[0, 1], [2, 0]], [[0, 1], [1, 0]]]
PER_HEAD_LENS = torch.tensor([[40, 3], [20, 0]], dtype=torch.int32)

# name: (changed arguments, exception, words of the message)
BAD = {
    "query_rank": ({"query": torch.zeros(BATCH, DIM)}, ValueError, "query"),
    "key_rank": ({"key_cache": torch.zeros(PAGES, PAGE, DIM)}, ValueError, "key_cache"),
    "value_rank": ({"value_cache": torch.zeros(PAGES, DIM)}, ValueError, "value_cache"),
    "table_rank_1": ({"block_table": int32(3, 1, 2)}, ValueError, "block_table"),
    "table_rank_4": ({"block_table": int32([[[[3, 1, 2]]]])}, ValueError, "block_table"),
    "table_batch": ({"block_table": int32([3, 1, 2])}, ValueError, "block_table"),
    "table_heads": (
        {"block_table": torch.zeros(BATCH, HKV + 1, 3, dtype=torch.int32)},
        ValueError,
        "block_table",
    ),
    "lens_rank": ({"seq_lens": int32([[[40]]])}, ValueError, "seq_lens"),
    "lens_scalar": ({"seq_lens": torch.tensor(40, dtype=torch.int32)}, ValueError, "seq_lens"),
    "lens_batch": ({"seq_lens": int32(40, 20, 1)}, ValueError, "seq_lens"),
    "lens_heads": ({"seq_lens": int32([40, 1, 1], [2, 2, 2])}, ValueError, "seq_lens"),
    "starts_shape": ({"seq_starts": int32([0, 0])}, ValueError, "seq_starts"),
    "query_integer": ({"query": torch.zeros(BATCH, HQ, DIM).int()}, TypeError, "int32"),
    "key_dtype": ({"key_cache": torch.zeros(PAGES, PAGE, HKV, DIM).half()}, TypeError, "float16"),
    "value_dtype": (
        {"value_cache": torch.zeros(PAGES, PAGE, HKV, DIM).bfloat16()},
        TypeError,
        "bfloat16",
    ),
    "table_int64": ({"block_table": torch.zeros(BATCH, 3).long()}, TypeError, "int64"),
    "table_float": ({"block_table": torch.zeros(BATCH, 3)}, TypeError, "float32"),
    "lens_int64": ({"seq_lens": torch.tensor([40, 20])}, TypeError, "int64"),
    "starts_int64": ({"seq_starts": torch.tensor([0, 0])}, TypeError, "int64"),
    "walk_int64": (
        {"walk": torch.zeros(BATCH, HKV, 2).long(), "walk_lens": PER_HEAD_LENS * 0},
        TypeError,
        "int64",
    ),
    "walk_lens_int64": (
        explicit(GOOD_WALK) | {"walk_lens": torch.ones(2, 2).long()},
        TypeError,
        "int64",
    ),
    "pinned_int64": ({"num_pinned": torch.zeros(BATCH, HKV).long()}, TypeError, "int64"),
    "pages_negative": ({"block_table": int32([3, -1, 2], [4, 5, 0])}, ValueError, "-1"),
    "pages_too_large": ({"block_table": int32([3, 1, 2], [4, 9, 0])}, ValueError, "9"),
    "lens_beyond_table": ({"seq_lens": int32(49, 20)}, ValueError, "49"),
    "lens_negative": ({"seq_lens": int32(40, -1)}, ValueError, "-1"),
    "lens_beyond_table_per_head": ({"seq_lens": int32([40, 20], [20, 60])}, ValueError, "60"),
    "starts_negative": ({"seq_starts": int32(0, -3)}, ValueError, "-3"),
    "heads_not_a_multiple": ({"query": torch.zeros(BATCH, 5, DIM)}, ValueError, "5"),
    "heads_fewer": ({"query": torch.zeros(BATCH, 1, DIM)}, ValueError, "1"),
    "dims_differ": ({"query": torch.zeros(BATCH, HQ, 40)}, ValueError, "40"),
    "dim_36": (heads_of_dim(36), ValueError, "36"),
    "dim_24": (heads_of_dim(24), ValueError, "24"),
    "dim_264": (heads_of_dim(264), ValueError, "264"),
    "dim_mla": (heads_of_dim(576, 512), ValueError, "576"),
    "value_dim_0": (heads_of_dim(64, 0), ValueError, "0"),
    "value_dim_36": (heads_of_dim(64, 36), ValueError, "36"),
    "value_pages": (
        {"value_cache": torch.zeros(PAGES - 1, PAGE, HKV, DIM)},
        ValueError,
        "value_cache",
    ),
    "value_heads": ({"value_cache": torch.zeros(PAGES, PAGE, 1, DIM)}, ValueError, "value_cache"),
    "value_page_size": ({"value_cache": torch.zeros(PAGES, 8, HKV, DIM)}, ValueError, ""),
    "unit_zero": ({"unit_size": 0}, ValueError, "0"),
    "unit_negative": ({"unit_size": -16}, ValueError, "-16"),
    "unit_not_dividing_page": ({"unit_size": 12, "block_size": 24}, ValueError, "12"),
    "block_not_a_multiple": ({"block_size": 40}, ValueError, "40"),
    "block_zero": ({"block_size": 0}, ValueError, "0"),
    "block_below_unit": ({"block_size": 8}, ValueError, "8"),
    "walk_name": ({"walk": "newest"}, ValueError, "newest"),
    "walk_without_lens": ({"walk": torch.zeros(BATCH, HKV, 2).int()}, ValueError, "walk_lens"),
    "lens_without_walk": ({"walk_lens": PER_HEAD_LENS}, ValueError, "walk_lens"),
    "walk_rank": (explicit([[0, 1], [1, 0]]), ValueError, "walk"),
    "walk_heads": (explicit([[[0, 1]], [[1, 0]]]), ValueError, "walk"),
    "walk_lens_shape": (explicit(GOOD_WALK, (2, 2)), ValueError, "walk_lens"),
    "walk_lens_too_large": (explicit(GOOD_WALK, ((2, 2), (3, 2))), ValueError, "3"),
    "walk_lens_negative": (explicit(GOOD_WALK, ((2, 2), (-2, 2))), ValueError, "-2"),
    "walk_negative": (explicit([[[0, -4], [2, 0]], [[0, 1], [1, 0]]]), ValueError, "-4"),
    "walk_too_large": (explicit([[[0, 1], [2, 0]], [[0, 1], [3, 0]]]), ValueError, "3"),
    "walk_twice": (
        explicit([[[0, 1], [2, 0]], [[1, 1], [1, 0]]], checked=True),
        ValueError,
        "1",
    ),
    "pinned_negative": ({"num_pinned": -1}, ValueError, "-1"),
    "pinned_negative_per_head": ({"num_pinned": int32([0, 1], [0, -2])}, ValueError, "-2"),
    "pinned_shape": ({"num_pinned": int32(1, 2)}, ValueError, "num_pinned"),
    "scale_nan": ({"scale": math.nan}, ValueError, "nan"),
    "scale_infinite": ({"scale": math.inf}, ValueError, "inf"),
    "softcap_negative": ({"softcap": -1.0}, ValueError, "-1"),
    "softcap_nan": ({"softcap": math.nan}, ValueError, "nan"),
    "window_zero": ({"sliding_window": 0}, ValueError, "0"),
    "window_negative": ({"sliding_window": -5}, ValueError, "-5"),
    "window_per_head": (
        {"sliding_window": 5, "seq_lens": PER_HEAD_LENS},
        ValueError,
        "sliding_window",
    ),
    "alibi_per_head": (
        {"alibi_slopes": torch.ones(HQ), "seq_lens": PER_HEAD_LENS},
        ValueError,
        "alibi_slopes",
    ),
    "alibi_shape": ({"alibi_slopes": torch.ones(HKV)}, ValueError, "alibi_slopes"),
    "sinks_shape": ({"attn_sinks": torch.ones(BATCH, HQ)}, ValueError, "attn_sinks"),
    "limits_shape": ({"criterion": Stability(torch.ones(3), 0.1)}, ValueError, "3"),
    "criterion_type": ({"criterion": 0.03}, TypeError, "float"),
    "rest_of_a_name": ({"criterion": ResidualMass(0.1)}, ValueError, "walk='sink_recent'"),
    "rest_missing": (explicit(GOOD_WALK, criterion=ResidualMass(0.1)), ValueError, "log_rest"),
    "rest_shape": (
        explicit(GOOD_WALK, criterion=ResidualMass(0.1), log_rest=torch.zeros(BATCH, HKV, 2)),
        ValueError,
        "[2, 2, 2]",
    ),
    "rest_units": (
        explicit(GOOD_WALK, criterion=ResidualMass(0.1), log_rest=torch.zeros(BATCH, HQ, 3)),
        ValueError,
        "[2, 4, 3]",
    ),
    "rest_without_criterion": (
        explicit(GOOD_WALK, log_rest=torch.zeros(BATCH, HQ, 2)), ValueError, "ResidualMass",
    ),
    "rest_of_stability": (
        explicit(GOOD_WALK, criterion=Stability(), log_rest=torch.zeros(BATCH, HQ, 2)),
        ValueError,
        "ResidualMass",
    ),
}  # fmt: skip
# What the reference does not have, or does not care about.
BAD_FOR_OPERATORS = {
    "query_float64": ({k: v.double() for k, v in heads_of_dim(DIM).items()}, TypeError, "float64"),
    "query_strided": ({"query": torch.zeros(BATCH, HQ, 2 * DIM)[..., ::2]}, ValueError, "query"),
    "key_strided": (
        {"key_cache": torch.zeros(PAGES, PAGE, HKV, 2 * DIM)[..., ::2]},
        ValueError,
        "key_cache",
    ),
    "value_strided": (
        {"value_cache": torch.zeros(PAGES, HKV, DIM, PAGE).permute(0, 3, 1, 2)},
        ValueError,
        "value_cache",
    ),
    "walk_type": ({"walk": 3}, TypeError, "int"),
    "query_type": ({"query": [1.0]}, (TypeError, ValueError, RuntimeError), "list"),
    "query_none": ({"query": None}, (TypeError, ValueError, RuntimeError), "None"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name, device):
    changes, kind, words = BAD[name]
    given = arguments(device) | moved(changes, device)
    assert_refused(decode_attention, given, kind, words)
    assert_refused(reference.decode_attention, given, kind, words)


@pytest.mark.parametrize("name", BAD_FOR_OPERATORS)
def test_bad_argument_of_the_operator(name, device):
    changes, kind, words = BAD_FOR_OPERATORS[name]
    given = arguments(device) | moved(changes, device)
    assert_refused(decode_attention, given, kind, words)


# name: (changed arguments, end of the message)
FOUND_AT = {
    "lens": ({"seq_lens": int32(40, -1)}, "got -1 for sequence 1"),
    "lens_per_head": (
        {"seq_lens": int32([40, 20], [20, 60])}, "got 60 for sequence 1, KV head 1",
    ),
    "starts": ({"seq_starts": int32(0, -3)}, "got -3 for sequence 1"),
    "pages": ({"block_table": int32([3, 1, 2], [4, 9, 0])}, "got 9 at page 1 of sequence 1"),
    "pages_per_head": (
        {"block_table": int32([[3, 1, 2], [3, 1, -5]], [[4, 5, 0], [4, 5, 0]])},
        "got -5 at page 2 of sequence 0, KV head 1",
    ),
    "walk_lens": (explicit(GOOD_WALK, ((2, 2), (3, 2))), "got 3 for sequence 1, KV head 0"),
    "walk": (
        explicit([[[0, 1], [2, 0]], [[0, 1], [1, 3]]]),
        "got 3 at position 1 of sequence 1, KV head 1",
    ),
    "walk_twice": (
        explicit([[[0, 1], [2, 2]], [[0, 1], [1, 0]]], checked=True),
        "got 2 again at position 1 of sequence 0, KV head 1",
    ),
    "pinned": ({"num_pinned": int32([0, 1], [-2, 0])}, "got -2 for sequence 1, KV head 0"),
    "key_dtype": (
        {"key_cache": torch.zeros(PAGES, PAGE, HKV, DIM).half()},
        "dtype of key_cache must be float32 like that of query, got float16",
    ),
    "value_dtype": (
        {"value_cache": torch.zeros(PAGES, PAGE, HKV, DIM).bfloat16()},
        "dtype of value_cache must be float32 like that of key_cache, got bfloat16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND_AT)
def test_where_it_was_found(name):
    """A KV head is named where each has its own."""
    changes, end = FOUND_AT[name]
    with pytest.raises((TypeError, ValueError)) as caught:
        call(decode_attention, arguments() | changes)
    assert str(caught.value).endswith(end)


@pytest.mark.parametrize(
    ("limits", "end"),
    [
        ([[0.0, 0.0], [-1.0, 0.0]], "got -1 as d_scale of KV head 1"),
        ([[0.0, math.nan], [0.0, 0.0]], "got nan as d_direction of KV head 0"),
    ],
)
def test_where_a_bad_threshold_was_found(limits, end):
    given = arguments() | {"criterion": 1, "thresholds": torch.tensor(limits)}
    with pytest.raises(RuntimeError, match=end):
        torch.ops.art.decode_attention(**given)


def test_the_call_without_changes_is_good(device):
    given = arguments(device)
    for function in (decode_attention, reference.decode_attention):
        assert call(function, given).tokens_read.tolist() == [[40, 40], [20, 20]]
        read = call(function, given | moved(explicit(GOOD_WALK), device)).tokens_read
        assert read.tolist() == [[32, 24], [20, 20]]


@pytest.mark.parametrize("name", arguments())
def test_wrong_device(name, device):
    given = arguments(device)
    given[name] = given[name].to("meta")
    assert_refused(decode_attention, given, (TypeError, ValueError, RuntimeError), name)


@pytest.mark.parametrize(
    "values",
    [(-0.1, 0.1, 1), (0.1, -0.1, 1), (math.nan, 0.1, 1), (0.1, math.nan, 1), (0.1, 0.1, 0)],
)
def test_bad_criterion(values):
    bad = next(v for v in values if not v > 0)
    with pytest.raises(ValueError, match=str(bad).replace(".", r"\.")):
        Stability(*values)


@pytest.mark.parametrize("bad", [-0.5, math.nan])
def test_bad_criterion_per_head(bad):
    with pytest.raises(ValueError, match=str(bad)):
        Stability(torch.tensor([0.1, bad]), 0.1, 1)


@pytest.mark.parametrize("patience", [True, 1.0, "2", None])
def test_patience_is_an_int(patience):
    with pytest.raises(TypeError, match="patience"):
        Stability(0.1, 0.1, patience)


@pytest.mark.parametrize(
    "changes",
    [
        {"criterion": 1, "patience": 0},
        {"criterion": 1, "d_scale": -1.0},
        {"criterion": 1, "d_direction": math.nan},
        {"criterion": 1, "thresholds": torch.full((HKV, 2), -1.0)},
        {"criterion": 1, "thresholds": torch.full((HKV, 2), math.nan)},
        {"criterion": 1, "thresholds": torch.zeros(HKV)},
        {"criterion": 1, "thresholds": torch.zeros(HKV, 2).double()},
        *({"criterion": bits} for bits in (-1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 64)),
        {"residual_mass": 1.0},
        {"residual_mass": -0.1},
        {"residual_mass": math.nan},
        {"criterion": 2, "log_rest": torch.zeros(BATCH, HQ, 2)},
        explicit(GOOD_WALK, criterion=2),
        explicit(GOOD_WALK, criterion=1, log_rest=torch.zeros(BATCH, HQ, 2)),
        explicit(GOOD_WALK, criterion=2, log_rest=torch.zeros(BATCH, HQ, 2).double()),
        explicit(GOOD_WALK, criterion=3, log_rest=torch.zeros(BATCH, HQ, 4)[..., ::2]),
        {"num_pinned": 1, "num_pinned_per_head": int32([0, 0], [0, 0])},
        {"sliding_window": -1},
        {"attn_sinks": torch.zeros(HQ).double()},
        {"alibi_slopes": torch.zeros(HQ).half()},
        {"walk_order": ""},
        {"block_table": int32([3, 77, 2], [4, 5, 0])},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_the_bare_operator_raises_runtime_error(changes, device):
    given = arguments(device) | moved(changes, device)
    with pytest.raises(RuntimeError, match="decode_attention: "):
        torch.ops.art.decode_attention(**given)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("decode_attention: patience must be at least 1, got 0", ValueError),
        ("guided_walk: dtype of key_codes must be uint8, got int8", TypeError),
        ("art_torch: decode_attention: CUDA kernel launch failed: out of memory", RuntimeError),
        ("art_torch: append_kv: built without kernels for this GPU", RuntimeError),
        ("ART_CUDA must be sm90, sm80 or portable, got sm70", RuntimeError),
        ("", RuntimeError),
    ],
)
def test_only_errors_of_an_argument_change_their_kind(message, kind):
    def fail():
        raise RuntimeError(message)

    with pytest.raises(Exception, match=re.escape(message)) as caught:
        _operators.call(fail)
    assert caught.type is kind


@pytest.mark.parametrize("name", ["query", "key_cache", "value_cache"])
def test_inputs_that_require_grad(name, device):
    given = arguments(device)
    expected = call(decode_attention, given).out
    given[name].requires_grad_()
    assert_refused(decode_attention, given, ValueError, "grad")
    with torch.no_grad():
        assert torch.equal(call(decode_attention, given).out, expected)
    with torch.inference_mode():
        assert torch.equal(call(decode_attention, given).out, expected)
    # Nobody gets a silent zero gradient from the bare operator either.
    with pytest.raises(RuntimeError, match="has no backward"):
        torch.ops.art.decode_attention(**given)


def test_empty_batch(device):
    inputs = build(Case("empty", (40, 20)), torch.float32, device)
    for function in (decode_attention, reference.decode_attention):
        result = inputs.select([]).call(function, criterion=Stability())
        assert [tuple(t.shape) for t in result[:4]] == [(0, 4, 64), (0, 4), (0, 2), (0, 2)]


def test_empty_table_and_pool(device):
    given = arguments(device) | {
        "key_cache": torch.zeros(0, PAGE, HKV, DIM, device=device),
        "value_cache": torch.zeros(0, PAGE, HKV, DIM, device=device),
        "block_table": torch.zeros(BATCH, 0, dtype=torch.int32, device=device),
        "seq_lens": torch.zeros(BATCH, dtype=torch.int32, device=device),
    }
    for function in (decode_attention, reference.decode_attention):
        result = call(function, given)
        assert (result.out == 0).all()
        assert (result.lse == -math.inf).all()
    given["seq_lens"] = given["seq_lens"] + 1
    assert_refused(decode_attention, given, ValueError, "seq_lens")


@pytest.mark.parametrize("field", DecodeResult._fields)
def test_bad_out(field, device):
    given = arguments(device)
    good = call(decode_attention, given)
    tensor = getattr(good, field)
    for bad, kind in (
        (tensor[:1], ValueError),
        (tensor.repeat_interleave(2, -1)[..., ::2], ValueError),
        (tensor.double(), TypeError),
    ):
        given["out"] = good._replace(**{field: bad})
        assert_refused(decode_attention, given, kind, field)


def test_no_result_is_left_behind_by_a_refused_call(device):
    """A refused call writes nothing, and the next one is right."""
    given = arguments(device)
    good = call(decode_attention, given)
    out = DecodeResult(*(torch.full_like(t, 7) for t in good))
    bad = given | {"block_table": int32([3, 1, 2], [4, -9, 0]).to(device), "out": out}
    assert_refused(decode_attention, bad, ValueError, "-9")
    assert all((t == 7).all() for t in out)
    for a, b in zip(call(decode_attention, given), good, strict=True):
        assert torch.equal(a, b)
