"""Bad input ends in a Python exception that says what was expected and what came."""

import math
import re

import pytest
import torch
from bad_calls import (
    BAD,
    BAD_FOR_OPERATORS,
    BATCH,
    DIM,
    GOOD_WALK,
    HKV,
    HQ,
    PAGE,
    PAGES,
    REFUSED,
    arguments,
    explicit,
    int32,
    moved,
)
from cases import Case, build
from contract import assert_refused, call

from art_torch import DecodeResult, Stability, _operators, decode_attention, reference


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name, device):
    changes, kind, *words = BAD[name]
    given = arguments(device) | moved(changes, device)
    assert_refused(decode_attention, given, kind, *words)
    assert_refused(reference.decode_attention, given, kind, *words)


@pytest.mark.parametrize("name", BAD_FOR_OPERATORS)
def test_bad_argument_of_the_operator(name, device):
    changes, kind, *words = BAD_FOR_OPERATORS[name]
    given = arguments(device) | moved(changes, device)
    assert_refused(decode_attention, given, kind, *words)


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
    assert_refused(decode_attention, given, REFUSED, name)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("d_scale", (-0.1, 0.1, 1)),
        ("d_direction", (0.1, -0.1, 1)),
        ("d_scale", (math.nan, 0.1, 1)),
        ("d_direction", (0.1, math.nan, 1)),
        ("patience", (0.1, 0.1, 0)),
    ],
)
def test_bad_criterion(name, values):
    bad = next(v for v in values if not v > 0)
    with pytest.raises(ValueError, match=rf"{name} must .*, got {bad}"):
        Stability(*values)


@pytest.mark.parametrize("bad", [-0.5, math.nan])
def test_bad_criterion_per_head(bad):
    with pytest.raises(ValueError, match=rf"d_scale must .*, got \[.*, {bad}\]"):
        Stability(torch.tensor([0.1, bad]), 0.1, 1)


@pytest.mark.parametrize("patience", [True, 1.0, "2", None])
def test_patience_is_an_int(patience):
    with pytest.raises(TypeError, match=f"patience must be an int, got {type(patience).__name__}"):
        Stability(0.1, 0.1, patience)


REST, WALKED = torch.zeros(BATCH, HQ, 2), explicit(GOOD_WALK)
# (arguments of the operator, words of its message)
BAD_BARE = [
    ({"criterion": 1, "patience": 0}, "patience must be at least 1, got 0"),
    ({"criterion": 1, "d_scale": -1.0}, "d_scale must not be negative or NaN, got -1"),
    ({"criterion": 1, "d_direction": math.nan}, "d_direction must not be negative or NaN, got nan"),
    (
        {"criterion": 1, "thresholds": torch.full((HKV, 2), -1.0)},
        "thresholds must not be negative or NaN, got -1",
    ),
    (
        {"criterion": 1, "thresholds": torch.full((HKV, 2), math.nan)},
        "thresholds must not be negative or NaN, got nan",
    ),
    ({"criterion": 1, "thresholds": torch.zeros(HKV)}, "thresholds must have shape"),
    (
        {"criterion": 1, "thresholds": torch.zeros(HKV, 2).double()},
        "dtype of thresholds must be float32, got float64",
    ),
    *(({"criterion": bits}, f"or 11 (both), got {bits}") for bits in (-1, 4, 5, 8, 9, 10, 12, 64)),
    *(({"criterion": bits}, "ResidualMass needs an explicit walk") for bits in (2, 3, 11)),
    ({"residual_mass": 1.0}, "residual_mass must be at least 0 and less than 1, got 1"),
    ({"residual_mass": -0.1}, "residual_mass must be at least 0 and less than 1, got -0.1"),
    ({"residual_mass": math.nan}, "residual_mass must be at least 0 and less than 1, got nan"),
    ({"criterion": 2, "log_rest": REST}, "needs an explicit walk and its log_rest, got no walk"),
    (WALKED | {"criterion": 2}, "needs an explicit walk and its log_rest, got no log_rest"),
    (WALKED | {"criterion": 1, "log_rest": REST}, "log_rest must not be given without"),
    (
        WALKED | {"criterion": 2, "log_rest": REST.double()},
        "dtype of log_rest must be float32, got float64",
    ),
    (
        WALKED | {"criterion": 3, "log_rest": torch.zeros(BATCH, HQ, 4)[..., ::2]},
        "log_rest must be contiguous",
    ),
    (
        {"num_pinned": 1, "num_pinned_per_head": int32([0, 0], [0, 0])},
        "num_pinned and num_pinned_per_head must not both be given",
    ),
    ({"sliding_window": -1}, "sliding_window must be positive, or 0 for none, got -1"),
    ({"attn_sinks": torch.zeros(HQ).double()}, "dtype of attn_sinks must be float32, got float64"),
    (
        {"alibi_slopes": torch.zeros(HQ).half()},
        "dtype of alibi_slopes must be float32, got float16",
    ),
    ({"walk_order": ""}, "walk_order must be"),
    ({"block_table": int32([3, 77, 2], [4, 5, 0])}, "block_table must be from 0 to 8, got 77"),
]


@pytest.mark.parametrize(
    ("changes", "words"), BAD_BARE, ids=["-".join(changes) for changes, _ in BAD_BARE]
)
def test_the_bare_operator_raises_runtime_error(changes, words, device):
    given = arguments(device) | moved(changes, device)
    with pytest.raises(RuntimeError, match="decode_attention: .*" + re.escape(words)):
        torch.ops.art.decode_attention(**given)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("decode_attention: patience must be at least 1, got 0", ValueError),
        ("guided_walk: dtype of key_codes must be uint8, got int8", TypeError),
        ("art_torch: decode_attention: CUDA kernel launch failed: out of memory", RuntimeError),
        ("art_torch: append_kv: built without kernels for this GPU", RuntimeError),
        ("ART_CUDA must be sm90, sm80 or portable, got sm70", RuntimeError),
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
