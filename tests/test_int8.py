"""int8 caches: what is written, with which queries they are read, and what is refused.

The tables of cases run with them in the tests of each operator.
"""

import math

import pytest
import torch
from cases import CASES, DTYPES, LOOSE, build, empty_caches
from coded import call_guided, with_codes
from contract import assert_refused, check

from art_torch import append_kv, decode_attention, encode_keys, guided_walk, reference

by_dtype = {"ids": lambda dtype: str(dtype).removeprefix("torch.")}
HALVES = (torch.float16, torch.bfloat16)
LAYOUTS = ["nhd", "hnd", "interleaved_tokens", "padded", "tokens_last", "head_pool"]
PAGES, PAGE, HEADS = 9, 16, 3


def empty(layout, dims):
    """Two caches of int8 and their scales, with bytes that a test can tell from what is written."""
    shaped = empty_caches(layout, PAGES, PAGE, HEADS, *dims)
    one_for_all = layout == "head_pool"
    caches = [
        torch.full((cache.untyped_storage().nbytes() // 4,), -128, dtype=torch.int8).as_strided(
            cache.shape, cache.stride(), cache.storage_offset()
        )
        for cache in shaped
    ]
    scales = [torch.full((PAGES, PAGE, 1 if one_for_all else HEADS), -1.0) for _ in caches]
    if layout == "hnd":
        scales = [torch.full((PAGES, HEADS, PAGE), -1.0).transpose(1, 2) for _ in caches]
    return caches, dict(
        zip(("key_scale", "value_scale"), (s.expand(-1, -1, HEADS) for s in scales), strict=True)
    )


def same_bits(a, b):
    return torch.equal(a, b) and a.dtype == b.dtype


def assert_same_bytes(ours, theirs):
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert same_bits(a, b)
    for name in ("key_scale", "value_scale"):
        assert same_bits(ours[1][name].view(torch.int32), theirs[1][name].view(torch.int32))


@pytest.mark.parametrize("dims", [(64, 64), (40, 256)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, **by_dtype)
def test_same_bytes_as_the_reference(dtype, layout, dims):
    g = torch.Generator().manual_seed(1)
    tokens = 45
    new = [
        (torch.randn(tokens, HEADS, d, generator=g) * 10 ** torch.randn(tokens, HEADS, 1)).to(dtype)
        for d in dims
    ]
    per_head = torch.randperm(PAGES * PAGE, generator=g)[: tokens * HEADS].view(tokens, HEADS)
    per_head[torch.rand(per_head.shape, generator=g) < 0.2] = -1
    for slots in [per_head] + [per_head[:, 0]] * (layout != "head_pool"):
        ours, theirs = empty(layout, dims), empty(layout, dims)
        append_kv(*new, *ours[0], slots, **ours[1])
        reference.append_kv(*new, *theirs[0], slots, **theirs[1])
        assert_same_bytes(ours, theirs)
        written = (slots >= 0).sum() * (HEADS if slots.ndim == 1 else 1)
        scale = ours[1]["key_scale"][:, :, :1] if layout == "head_pool" else ours[1]["key_scale"]
        assert (scale >= 0).sum() == written


def rows_of(*pattern):
    return torch.tensor(pattern).repeat(32 // len(pattern))


SPECIAL = {
    "zeros": rows_of(0.0, -0.0),
    "ties": rows_of(127.0, 0.5, 1.5, -0.5, -1.5, 2.5, 126.5, -126.5),
    "one": rows_of(*[0.0] * 31, -3.0),
    "huge": rows_of(3.4e38, -3e38),
    "denormal": rows_of(1e-41, -3e-42),
    "least": rows_of(1e-45, 0.0),  # the scale is 0
    "least_scale": rows_of(190 * 2.0**-149, 2.0**-149),  # and here it is so coarse that codes end
    "infinite": rows_of(math.inf, 1.0),
    "nan": rows_of(math.nan, 1.0),
    "both": rows_of(math.nan, -math.inf),
}


@pytest.mark.parametrize("dtype", DTYPES, **by_dtype)
@pytest.mark.parametrize("name", SPECIAL)
def test_special_rows(name, dtype):
    row = SPECIAL[name].to(dtype)
    new = row.expand(1, HEADS, -1)
    slots = torch.tensor([3])
    ours, theirs = empty("nhd", (32, 32)), empty("nhd", (32, 32))
    append_kv(new, new, *ours[0], slots, **ours[1])
    reference.append_kv(new, new, *theirs[0], slots, **theirs[1])
    assert_same_bytes(ours, theirs)
    codes, scale = ours[0][0][0, 3, 0], ours[1]["key_scale"][0, 3, 0]
    if not row.isfinite().all():
        assert scale.isnan()
        assert (codes == 0).all()
    else:
        # Half a step; below the normal numbers steps are 2^-149, and so may be what is lost.
        error = (reference.dequantize(codes, scale) - row.double()).abs()
        allowed = 0.5 * scale.double() + 2.0**-23 * row.double().abs() + 64 * 2.0**-149
        assert (error <= allowed).all()
        assert (codes.abs().long() <= 127).all()


def test_ties_round_to_even():
    codes, scale = reference.quantize(SPECIAL["ties"])
    assert scale == 1
    assert codes[:8].tolist() == [127, 0, 2, 0, -2, 2, 126, -126]


def test_a_cache_built_token_by_token():
    """Appending one token at a time gives the bytes of all at once: a row depends on no other."""
    g = torch.Generator().manual_seed(0)
    new = [torch.randn(50, HEADS, d, generator=g) for d in (32, 48)]
    slots = torch.randperm(PAGES * PAGE, generator=g)[:50]
    at_once, one_by_one = empty("hnd", (32, 48)), empty("hnd", (32, 48))
    append_kv(*new, *at_once[0], slots, **at_once[1])
    for t in range(50):
        one = [rows[t : t + 1] for rows in new]
        append_kv(*one, *one_by_one[0], slots[t : t + 1], **one_by_one[1])
    assert_same_bytes(one_by_one, at_once)


NAMES = ("everything", "ragged", "gqa_5_1", "tokens_last_dims", "explicit_per_head", "dims_40_40")
SOME = {case.name: case for case in CASES if case.name in NAMES}
EVERYTHING = SOME["everything"]


@pytest.mark.parametrize("query_dtype", HALVES, **by_dtype)
@pytest.mark.parametrize("case", SOME.values(), ids=SOME)
def test_half_queries(case, query_dtype):
    inputs = build(case, torch.int8, query_dtype=query_dtype)
    check(inputs, None)
    check(inputs, LOOSE)


@pytest.mark.parametrize("query_dtype", HALVES, **by_dtype)
def test_guided_walks_of_half_queries(query_dtype):
    inputs = build(EVERYTHING, torch.int8, query_dtype=query_dtype)
    codes = with_codes(inputs)
    half = call_guided(guided_walk, inputs, codes)
    inputs.tensors = (inputs.tensors[0].float(), *inputs.tensors[1:])
    for a, b in zip(half, call_guided(guided_walk, inputs, codes), strict=True):
        assert torch.equal(a, b)


def test_a_row_without_a_scale_makes_the_output_nan():
    inputs = build(EVERYTHING, torch.int8)
    _, _, _, table, lens = inputs.tensors
    token = int(lens[0]) - 1
    inputs.options["value_scale"][int(table[0, token // 16]), token % 16, 1] = math.nan
    out = inputs.call(decode_attention).out
    group = out.shape[1] // 2
    assert out[0, group:].isnan().all()
    assert out[0, :group].isfinite().all()


def test_opcheck():
    caches, scales = empty("hnd", (32, 64))
    new = [torch.randn(5, HEADS, d) for d in (32, 64)]
    slots = torch.tensor([0, 9, -1, 31, 4])
    torch.library.opcheck(torch.ops.art.append_kv.default, (*new, *caches, slots), scales)
    inputs = build(EVERYTHING, torch.int8)
    _, keys, _, table, lens = inputs.tensors
    pool, code_table = with_codes(inputs)
    table = table.clamp(max=keys.shape[0] - 1)
    torch.library.opcheck(
        torch.ops.art.encode_keys.default,
        (keys, table, lens, pool, code_table.clamp(max=len(pool) - 1)),
        {"key_scale": inputs.options["key_scale"]},
    )


def test_compile_a_step():
    """The caches and their scales are written by a compiled step as well."""

    def step(query, new, slots, caches, scales, table, lens):
        append_kv(new[0] * 2, new[1], *caches, slots, **scales)
        return decode_attention(query.relu(), *caches, table, lens, criterion=LOOSE, **scales).out

    g = torch.Generator().manual_seed(0)
    query, new = torch.randn(1, 6, 32, generator=g), torch.randn(2, 60, HEADS, 32, generator=g)
    table, lens = torch.arange(4, dtype=torch.int32)[None], torch.tensor([60], dtype=torch.int32)
    written = [empty("hnd", (32, 32)) for _ in range(2)]
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        outs = [
            function(query, list(new), torch.arange(60), *caches, table, lens)
            for function, caches in zip((step, compiled), written, strict=True)
        ]
    torch.testing.assert_close(*outs)
    assert_same_bytes(*written)


# ---------------------------------------------------------------- what is refused


def decode_arguments():
    inputs = build(EVERYTHING, torch.int8)
    names = ("query", "key_cache", "value_cache", "block_table", "seq_lens")
    return dict(zip(names, inputs.tensors, strict=True)) | inputs.options


def append_arguments():
    caches, scales = empty("nhd", (32, 40))
    names = ("key_cache", "value_cache")
    new = {"key": torch.zeros(3, HEADS, 32), "value": torch.zeros(3, HEADS, 40)}
    slots = {"slot_mapping": torch.tensor([5, -1, 143])}
    return new | dict(zip(names, caches, strict=True)) | scales | slots


def changed(name, function):
    return lambda given: given | {name: function(given[name])}


def floats(name):
    return changed(name, lambda cache: cache.float())


BAD_SCALES = {
    "no_key_scale": (changed("key_scale", lambda _: None), ValueError, "key_scale"),
    "no_value_scale": (changed("value_scale", lambda _: None), ValueError, "value_scale"),
    "scale_float16": (changed("key_scale", lambda s: s.half()), TypeError, "float16"),
    "scale_float64": (changed("value_scale", lambda s: s.double()), TypeError, "float64"),
    "scale_rank": (changed("key_scale", lambda s: s[0]), ValueError, "key_scale"),
    "scale_heads": (changed("value_scale", lambda s: s[:, :, :1]), ValueError, "value_scale"),
    "scale_pages": (changed("key_scale", lambda s: s[1:]), ValueError, "key_scale"),
}
BAD_DECODE = BAD_SCALES | {
    "query_int8": (changed("query", lambda q: q.to(torch.int8)), TypeError, "int8"),
    "query_int64": (changed("query", lambda q: q.long()), TypeError, "int64"),
    "keys_uint8": (changed("key_cache", lambda c: c.view(torch.uint8)), TypeError, "key_cache"),
    "float_keys": (floats("key_cache"), (TypeError, ValueError), "float32"),
    "float_values": (floats("value_cache"), TypeError, "float32"),
    "float_caches": (
        lambda given: floats("value_cache")(floats("key_cache")(given)), ValueError, "key_scale",
    ),
}  # fmt: skip
BAD_APPEND = BAD_SCALES | {
    "key_int8": (changed("key", lambda k: k.to(torch.int8)), TypeError, "int8"),
    "key_int64": (changed("key", lambda k: k.long()), TypeError, "int64"),
    "float_keys": (floats("key_cache"), ValueError, "key_scale"),
    "float_values": (floats("value_cache"), ValueError, "value_scale"),
}


@pytest.mark.parametrize("name", BAD_DECODE)
def test_bad_decode(name):
    change, kind, words = BAD_DECODE[name]
    given = change(decode_arguments())
    assert_refused(decode_attention, given, kind, words)
    assert_refused(reference.decode_attention, given, kind, words)


@pytest.mark.parametrize("name", BAD_APPEND)
def test_bad_append(name):
    change, kind, words = BAD_APPEND[name]
    given = change(append_arguments())
    assert_refused(append_kv, given, kind, words)
    assert_refused(reference.append_kv, given, kind, words)
    assert (given["value_cache"] == -128).all()


def test_a_query_in_float64():
    """The reference takes any floating query, kernels do not."""
    given = changed("query", lambda q: q.double())(decode_arguments())
    assert_refused(decode_attention, given, TypeError, "float64")


def test_rows_that_are_too_long():
    given = append_arguments()
    given["key"] = torch.zeros(3, HEADS, 264)
    given["key_cache"] = torch.zeros(PAGES, PAGE, HEADS, 264, dtype=torch.int8)
    assert_refused(append_kv, given, ValueError, "264")


@pytest.mark.parametrize("scale", [None, "float16", "extra"])
def test_key_codes_need_the_scale_of_an_int8_cache(scale):
    inputs = build(EVERYTHING, torch.int8)
    query, keys, _, table, lens = inputs.tensors
    pool, code_table = with_codes(inputs)
    given = inputs.options["key_scale"]
    if scale == "extra":
        keys = keys.float()
    else:
        given = None if scale is None else given.half()
    kind, words = (TypeError, "float16") if scale == "float16" else (ValueError, "key_scale")
    arguments = {"key_cache": keys, "block_table": table, "seq_lens": lens, "key_codes": pool}
    arguments |= {"code_table": code_table, "key_scale": given}
    for module in (encode_keys, reference.encode_keys):
        assert_refused(module, arguments, kind, words)
    for module in (guided_walk, reference.guided_walk):
        assert_refused(module, {"query": query, **arguments}, kind, words)
