"""Bad input to the guided walk and its codes: what was expected and what came."""

import pytest
import torch
from contract import assert_refused

from art_torch import (
    ResidualMass,
    Stability,
    decode_attention,
    encode_keys,
    guided_walk,
    key_code_bytes,
    reference,
)

BATCH, HQ, HKV, DIM, PAGES, PAGE = 2, 4, 2, 32, 9, 64
RECORD = key_code_bytes(DIM)
ENCODERS = [encode_keys, reference.encode_keys]
GUIDES = [guided_walk, reference.guided_walk]
which = {"ids": ["operator", "reference"]}


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def cache():
    g = torch.Generator().manual_seed(0)
    return {
        "key_cache": torch.randn(PAGES, PAGE, HKV, DIM, generator=g),
        "block_table": int32([3, 1, 2], [4, 5, 0]),
        "seq_lens": int32(140, 70),
        "key_codes": torch.zeros(7, HKV, RECORD, dtype=torch.uint8),
        "code_table": int32([6, 0, 1], [2, 3, 4]),
    }


def query():
    return {"query": torch.ones(BATCH, HQ, DIM)}


def pool(*shape, dtype=torch.uint8):
    return {"key_codes": torch.zeros(shape, dtype=dtype)}


# Both operators refuse these, and so does the reference. Name: (changes, exception, words)
OF_THE_CACHE = {
    "key_rank": ({"key_cache": torch.zeros(PAGES, PAGE, DIM)}, ValueError, "key_cache"),
    "head_dim": (
        {"key_cache": torch.zeros(PAGES, PAGE, HKV, 100)}, ValueError, "from 32 to 256, got 100",
    ),
    "table_rank": ({"block_table": int32(3, 1, 2)}, ValueError, "block_table"),
    "table_int64": (
        {"block_table": torch.zeros(BATCH, 3).long()}, TypeError, "block_table must", "int64",
    ),
    "lens_heads": ({"seq_lens": int32([140] * 3, [70] * 3)}, ValueError, "seq_lens"),
    "lens_int64": ({"seq_lens": torch.tensor([140, 70])}, TypeError, "seq_lens must", "int64"),
    "lens_too_long": ({"seq_lens": int32(193, 1)}, ValueError, "seq_lens must", "got 193"),
    "lens_negative": ({"seq_lens": int32(-1, 1)}, ValueError, "seq_lens must", "got -1"),
    "codes_dtype": (
        pool(7, HKV, RECORD, dtype=torch.float32), TypeError, "key_codes must", "float32",
    ),
    "codes_rank": (pool(7, RECORD), ValueError, "key_codes"),
    "codes_heads": (pool(7, HKV + 1, RECORD), ValueError, f"[7, 3, {RECORD}]"),
    "codes_record": (pool(7, HKV, RECORD + 16), ValueError, f"[7, 2, {RECORD + 16}]"),
    "code_table_rank": ({"code_table": int32(6, 0, 1)}, ValueError, "code_table"),
    "code_table_batch": ({"code_table": int32([6, 0, 1])}, ValueError, "code_table"),
    "code_table_heads": (
        {"code_table": torch.zeros(BATCH, 3, 3, dtype=torch.int32)}, ValueError, "code_table",
    ),
    "code_table_width": (
        {"code_table": int32([6, 0], [2, 3])}, ValueError, "code_table must", "got 2",
    ),
    "code_table_int64": (
        {"code_table": torch.zeros(BATCH, 3).long()}, TypeError, "code_table must", "int64",
    ),
    "code_id_too_large": ({"code_table": int32([6, 7, 1], [2, 3, 4])}, ValueError, "got 7"),
    "code_id_negative": ({"code_table": int32([6, 0, 1], [-3, 3, 4])}, ValueError, "got -3"),
}  # fmt: skip

OF_ENCODE = {
    "coded_shape": ({"coded_lens": int32(0)}, ValueError, "coded_lens"),
    "coded_int64": ({"coded_lens": torch.tensor([0, 0])}, TypeError, "coded_lens must", "int64"),
    "coded_negative": ({"coded_lens": int32(0, -64)}, ValueError, "coded_lens must", "got -64"),
    "page_id": (
        {"block_table": int32([3, 1, 2], [9, 5, 0])}, ValueError, "block_table must", "got 9",
    ),
    "key_integer": (
        {"key_cache": torch.zeros(PAGES, PAGE, HKV, DIM).int()},
        TypeError,
        "key_cache must",
        "int32",
    ),
}  # fmt: skip

OF_GUIDE = {
    "query_rank": ({"query": torch.zeros(BATCH, DIM)}, ValueError, "query"),
    "query_dtype": (
        {"query": torch.zeros(BATCH, HQ, DIM).half()}, TypeError, "key_cache must", "float32",
    ),
    "query_heads": (
        {"query": torch.zeros(BATCH, 5, DIM)}, ValueError, "multiple of", "got 5 and 2",
    ),
    "query_dim": ({"query": torch.zeros(BATCH, HQ, 40)}, ValueError, "key_cache must", "40"),
    "tail_page_id": (
        {"block_table": int32([3, 1, 9], [4, 5, 0])}, ValueError, "block_table must", "got 9",
    ),
    "scale": ({"scale": float("nan")}, ValueError, "scale must", "got nan"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap must", "got -1"),
    "window": ({"sliding_window": 0}, ValueError, "sliding_window must", "got 0"),
    "sinks": ({"attn_sinks": torch.zeros(3)}, ValueError, "attn_sinks"),
    "starts_negative": ({"seq_starts": int32(-1, 0)}, ValueError, "seq_starts must", "got -1"),
    "alibi_per_head_lens": (
        {"alibi_slopes": torch.ones(HQ), "seq_lens": int32([140, 3], [70, 0])},
        ValueError,
        "alibi_slopes",
        "seq_lens",
    ),
}  # fmt: skip


# Also where: the group, the sequence and, where each has its own, the KV head.
FOUND_AT = {
    "lens": ({"seq_lens": int32([1, 1], [1, 193])}, "got 193 for sequence 1, KV head 1"),
    "codes": ({"code_table": int32([6, 0, 1], [7, 3, 4])}, "got 7 at group 0 of sequence 1"),
    "codes_per_head": (
        {"code_table": int32([[6, 0, 1], [6, -2, 1]], [[2, 3, 4], [2, 3, 4]])},
        "got -2 at group 1 of sequence 0, KV head 1",
    ),
    "coded_lens": ({"coded_lens": int32(0, -64)}, "got -64 for sequence 1"),
    "coded_lens_per_head": (
        {"coded_lens": int32([0, -64], [0, 0])}, "got -64 for sequence 0, KV head 1",
    ),
}  # fmt: skip


def on(device, given):
    """Arguments where the kernels are."""
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}


@pytest.mark.parametrize("function", ENCODERS, **which)
@pytest.mark.parametrize("name", [*OF_THE_CACHE, *OF_ENCODE])
def test_encode_keys_refuses(name, function, device):
    changes, kind, *words = {**OF_THE_CACHE, **OF_ENCODE}[name]
    given = on(device, {**cache(), **changes})
    before = given["key_codes"].clone()
    assert_refused(function, given, kind, *words)
    if function is encode_keys:  # before anything was written
        assert torch.equal(given["key_codes"], before)


@pytest.mark.parametrize("function", GUIDES, **which)
@pytest.mark.parametrize("name", [*OF_THE_CACHE, *OF_GUIDE])
def test_guided_walk_refuses(name, function, device):
    changes, kind, *words = {**OF_THE_CACHE, **OF_GUIDE}[name]
    if name == "head_dim":
        changes = {**changes, "query": torch.zeros(BATCH, HQ, 100)}
    given = on(device, {**query(), **cache(), **changes})
    assert_refused(function, given, kind, *words)


@pytest.mark.parametrize("name", FOUND_AT)
def test_where_it_was_found(name):
    changes, end = FOUND_AT[name]
    with pytest.raises(ValueError, match=r"encode_keys: ") as caught:
        encode_keys(**{**cache(), **changes})
    assert str(caught.value).endswith(end)
    if "coded_lens" not in changes:
        with pytest.raises(ValueError, match=r"guided_walk: ") as caught:
            guided_walk(**{**query(), **cache(), **changes})
        assert str(caught.value).endswith(end)


def test_page_size_of_a_guided_walk():
    changes = {
        "key_cache": torch.zeros(PAGES, 24, HKV, DIM),
        "code_table": torch.zeros(BATCH, 1, dtype=torch.int32),
        "seq_lens": int32(10, 10),
    }
    for function in GUIDES:
        assert_refused(
            function,
            {**query(), **cache(), **changes},
            ValueError,
            "page_size must be a multiple of 16",
            "got 24",
        )


def test_strides_of_records():
    for codes in (
        torch.zeros(7, HKV, RECORD + 8, dtype=torch.uint8)[..., :RECORD],
        torch.zeros(7, HKV, 2 * RECORD, dtype=torch.uint8)[..., ::2],
        torch.zeros(7, HKV, RECORD + 16, dtype=torch.uint8)[..., 8 : 8 + RECORD],
    ):
        given = {**cache(), "key_codes": codes}
        assert_refused(encode_keys, given, ValueError, "16")
        assert_refused(guided_walk, {**query(), **given}, ValueError, "16")


def test_what_is_not_looked_at_may_be_anything(device):
    garbage = 2**31 - 1
    given = {
        **cache(),
        "block_table": int32([3, 1, garbage], [4, garbage, garbage]),
        "code_table": int32([6, 0, garbage], [2, garbage, garbage]),
    }
    given = on(device, given)
    encode_keys(**given)
    given["block_table"] = int32([garbage, garbage, 2], [garbage, 5, garbage]).to(device)
    given["key_cache"][[3, 1, 4]] = float("nan")
    result = guided_walk(**on(device, query()), **given)
    assert result.walk_lens.tolist() == [[9, 9], [5, 5]]
    assert result.log_mass[0, :, :9].isfinite().all()


def attend(**changes):
    given = {**query(), **cache(), "value_cache": torch.ones(PAGES, PAGE, HKV, DIM)}
    return decode_attention(**{**given, "walk": "guided", "criterion": Stability(), **changes})


def test_decode_attention_with_a_guided_walk():
    assert attend().tokens_read.shape == (BATCH, HKV)
    for missing in ("key_codes", "code_table"):
        with pytest.raises(ValueError, match="encode_keys") as caught:
            attend(**{missing: None})
        assert missing in str(caught.value)
    with pytest.raises(ValueError, match=r"unit_size must be 16.*got 32"):
        attend(unit_size=32)
    with pytest.raises(ValueError, match=r"num_pinned must not be given.*got 3"):
        attend(num_pinned=3)
    with pytest.raises(ValueError, match="walk_lens must not be given"):
        attend(walk_lens=int32([1, 1], [1, 1]))
    with pytest.raises(ValueError, match="log_rest must not be given"):
        attend(log_rest=torch.zeros(BATCH, HQ, 12), criterion=ResidualMass())
    for walk in ("oldest_first", torch.zeros(BATCH, HKV, 1, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r'only be given with walk="guided", got walk='):
            attend(walk=walk)
    with pytest.raises(ValueError, match=r'ResidualMass.*walk="guided"'):
        attend(walk="oldest_first", criterion=ResidualMass(), key_codes=None, code_table=None)
    with pytest.raises(ValueError, match=r"walk must be .*'guided', or int32 .*got 'gided'"):
        attend(walk="gided", key_codes=None, code_table=None)
    assert attend(criterion=ResidualMass()).stop_block.min() >= 0
    with pytest.raises(ValueError, match="guided_walk: key_codes must have shape"):
        attend(**pool(7, HKV, 64))
    with pytest.raises(ValueError, match="block_size"):
        attend(block_size=40)


def test_a_guided_walk_that_is_not_given():
    """The bare operator makes none."""
    given = {**query(), **cache(), "value_cache": cache()["key_cache"]}
    del given["key_codes"], given["code_table"]
    with pytest.raises(RuntimeError, match=r"explicit walk that guided_walk makes.*got 'guided'"):
        torch.ops.art.decode_attention(**given, walk_order="guided")


def test_a_guided_walk_of_other_lengths():
    """The bare operator: units without a visible token are dropped, except from a guided walk."""
    given = {**query(), **cache()}
    walk = guided_walk(**given)
    given["seq_lens"] = int32(140, 17)
    del given["key_codes"], given["code_table"]
    given |= {"value_cache": given["key_cache"], "walk": walk.walk, "walk_lens": walk.walk_lens}
    attended = torch.ops.art.decode_attention
    assert attended(**given)[2].tolist() == [[140, 140], [17, 17]]
    words = "list units with a visible.*got 2 at position 2 of sequence 1, KV head 0, where"
    with pytest.raises(RuntimeError, match=words):
        attended(**given, walk_order="guided")
    given["seq_lens"] = cache()["seq_lens"]
    expected, result = attended(**given), attended(**given, walk_order="guided")
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_no_gradients():
    given = {**query(), **cache()}
    given["query"].requires_grad_()
    with pytest.raises(ValueError, match="must not require grad"):
        guided_walk(**given)
    with pytest.raises(RuntimeError, match="has no backward"):
        torch.ops.art.guided_walk(*given.values())
    given["key_cache"].requires_grad_()
    del given["query"]
    with pytest.raises(ValueError, match="must not require grad"):
        encode_keys(**given)
    with pytest.raises(RuntimeError, match="has no backward"):
        torch.ops.art.encode_keys(*given.values())
    with torch.no_grad():
        encode_keys(**given)


def test_key_code_bytes():
    assert [key_code_bytes(dim) for dim in (32, 40, 128, 256)] == [640, 960, 2560, 5120]
    for dim in (0, 24, 36, 264):
        with pytest.raises(ValueError, match=str(dim)):
            key_code_bytes(dim)
