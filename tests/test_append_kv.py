"""Writing new tokens into pages."""

import pytest
import torch
from cases import DTYPES, empty_caches
from contract import assert_refused

from art_torch import append_kv, decode_attention, reference

LAYOUTS = [
    "nhd",
    "hnd",
    "interleaved_tokens",
    "interleaved_pages",
    "padded",
    "tokens_last",
    "head_pool",
]
by_dtype = {"ids": lambda dtype: str(dtype).removeprefix("torch.")}


def same_bits(a, b):
    return torch.equal(a.nan_to_num(nan=7e3), b.nan_to_num(nan=7e3))


def inputs(tokens, num_kv_heads, dims, dtype, device):
    g = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(tokens, num_kv_heads, d, generator=g).to(device=device, dtype=dtype)
        for d in dims
    ]


@pytest.mark.parametrize("tokens", [0, 1, 7, 100])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, **by_dtype)
def test_same_as_the_reference(dtype, layout, tokens, device):
    pages, page, heads, dims = 9, 16, 3, (64, 64)
    g = torch.Generator().manual_seed(1)
    key, value = inputs(tokens, heads, dims, dtype, device)
    per_head = torch.stack([torch.randperm(pages * page, generator=g) for _ in range(heads)], 1)
    if layout == "head_pool":  # every head has slots of its own
        per_head = torch.randperm(pages * page, generator=g)[: pages * page // 3 * 3].view(-1, 3)
        per_head = torch.cat([per_head, torch.full((100, 3), -1)])
    per_head[torch.rand(per_head.shape, generator=g) < 0.2] = -1
    mappings = [per_head[:tokens]] + [per_head[:tokens, 0]] * (layout != "head_pool")
    for slots in mappings:
        ours, theirs = (
            empty_caches(layout, pages, page, heads, *dims, dtype=dtype, device=device)
            for _ in range(2)
        )
        append_kv(key, value, *ours, slots.to(device))
        reference.append_kv(key, value, *theirs, slots.to(device))
        for a, b in zip(ours, theirs, strict=True):
            assert same_bits(a, b)
            written = heads * (slots >= 0).sum() if slots.ndim == 1 else (slots >= 0).sum()
            rows = a[:, :, :1] if layout == "head_pool" else a
            assert (~rows.isnan()).all(-1).sum() == written


@pytest.mark.parametrize("dtype", DTYPES, **by_dtype)
def test_new_tokens_of_any_strides(dtype, device):
    """Slices of a fused projection, and tensors whose last dimension is not contiguous."""
    pages, page, heads, dims = 4, 8, 2, (40, 64)
    slots = torch.tensor([3, 31, -1, 8], device=device)
    fused = torch.randn(4, heads, sum(dims) + 8).to(device=device, dtype=dtype)
    slices = fused.split([*dims, 8], dim=-1)[:2]
    transposed = [t.permute(2, 0, 1).contiguous().permute(1, 2, 0) for t in slices]
    for key, value in (slices, transposed):
        ours, theirs = (
            empty_caches("nhd", pages, page, heads, *dims, dtype=dtype, device=device)
            for _ in range(2)
        )
        append_kv(key, value, *ours, slots)
        reference.append_kv(key, value, *theirs, slots)
        assert all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))


def test_every_bit_pattern_survives(device):
    key = torch.tensor([float("nan"), float("-inf"), -0.0, 1e-40]).repeat(8)[None, None].to(device)
    cache = [torch.zeros(1, 8, 1, 32, device=device) for _ in range(2)]
    append_kv(key, key, *cache, torch.tensor([2], device=device))
    for written in cache:
        assert torch.equal(written[0, 2].view(torch.int32), key[0].view(torch.int32))
        assert written[0, 3:].count_nonzero() == 0


def test_nothing_outside_a_refused_call_is_written(device):
    """All slots are checked before the first is written."""
    key, value = inputs(3, 1, (32, 32), torch.float32, device)
    cache = [torch.zeros(2, 8, 1, 32, device=device) for _ in range(2)]
    with pytest.raises(ValueError, match="16"):
        append_kv(key, value, *cache, torch.tensor([0, 1, 16], device=device))
    assert all(t.count_nonzero() == 0 for t in cache)


@pytest.mark.parametrize("dtype", DTYPES, **by_dtype)
def test_a_cache_built_token_by_token(dtype, device):
    """Appending one token at a time gives the cache, and the attention, of all at once."""
    tokens, heads, dims = 50, 2, (32, 48)
    key, value = inputs(tokens, heads, dims, dtype, device)
    table = torch.tensor([[2, 0, 3, 1]], dtype=torch.int32, device=device)
    positions = torch.arange(tokens, device=device)
    slots = table[0, positions // 16].long() * 16 + positions % 16
    at_once, one_by_one = (
        empty_caches("hnd", 4, 16, heads, *dims, dtype=dtype, device=device) for _ in range(2)
    )
    append_kv(key, value, *at_once, slots)
    query = torch.randn(1, 4, 32).to(device=device, dtype=dtype)
    for t in range(tokens):
        append_kv(key[t : t + 1], value[t : t + 1], *one_by_one, slots[t : t + 1])
        lens = torch.tensor([t + 1], dtype=torch.int32, device=device)
        result = decode_attention(query, *one_by_one, table, lens)
        expected = decode_attention(query, *at_once, table, lens)
        assert torch.equal(result.out, expected.out)
        assert (result.tokens_read == t + 1).all()
    assert all(same_bits(a, b) for a, b in zip(one_by_one, at_once, strict=True))


def append_arguments(device):
    return {
        "key": torch.zeros(3, 2, 32, device=device),
        "value": torch.zeros(3, 2, 40, device=device),
        "key_cache": torch.ones(9, 16, 2, 32, device=device),
        "value_cache": torch.ones(9, 16, 2, 40, device=device),
        "slot_mapping": torch.tensor([5, -1, 143], device=device),
    }


# name: (changed arguments, exception, the argument, what came)
BAD_APPEND = {
    "slot_too_large": (
        {"slot_mapping": torch.tensor([5, 144, 0])}, ValueError, "slot_mapping must", "got 144",
    ),
    "slot_negative": (
        {"slot_mapping": torch.tensor([5, -2, 0])}, ValueError, "slot_mapping must", "got -2",
    ),
    "slots_per_head_too_large": (
        {"slot_mapping": torch.tensor([[5, 6], [-1, 999], [1, 2]])},
        ValueError,
        "slot_mapping must",
        "got 999",
    ),
    "slots_int32": (
        {"slot_mapping": torch.tensor([5, 6, 7]).int()}, TypeError, "slot_mapping must", "int32",
    ),
    "slots_length": (
        {"slot_mapping": torch.tensor([5, 6])}, ValueError, "key must", "got [3, 2, 32]",
    ),
    "slots_heads": (
        {"slot_mapping": torch.tensor([[5], [6], [7]])},
        ValueError,
        "slot_mapping must",
        "got [3, 1]",
    ),
    "slots_rank": (
        {"slot_mapping": torch.zeros(3, 2, 1).long()},
        ValueError,
        "slot_mapping must",
        "got [3, 2, 1]",
    ),
    "slots_scalar": (
        {"slot_mapping": torch.tensor(3)}, ValueError, "slot_mapping must", "got []",
    ),
    "key_dtype": ({"key": torch.zeros(3, 2, 32).half()}, TypeError, "key must", "float16"),
    "value_dtype": ({"value": torch.zeros(3, 2, 40).half()}, TypeError, "value must", "float16"),
    "key_rank": ({"key": torch.zeros(3, 32)}, ValueError, "key must", "got [3, 32]"),
    "key_heads": ({"key": torch.zeros(3, 3, 32)}, ValueError, "key must", "got [3, 3, 32]"),
    "value_dim": ({"value": torch.zeros(3, 2, 32)}, ValueError, "value must", "got [3, 2, 32]"),
    "value_tokens": ({"value": torch.zeros(4, 2, 40)}, ValueError, "value must", "got [4, 2, 40]"),
    "cache_rank": (
        {"key_cache": torch.zeros(9, 16, 32)}, ValueError, "key_cache must", "got [9, 16, 32]",
    ),
    "cache_pages": (
        {"value_cache": torch.zeros(2, 16, 2, 40)},
        ValueError,
        "value_cache must",
        "got [2, 16, 2, 40]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_APPEND)
def test_bad_append(name, device):
    changes, kind, *words = BAD_APPEND[name]
    given = append_arguments(device) | {k: v.to(device) for k, v in changes.items()}
    assert_refused(append_kv, given, kind, *words)
    assert_refused(reference.append_kv, given, kind, *words)
    assert (given["value_cache"] == (0 if "value_cache" in changes else 1)).all()


def test_where_it_was_found():
    """A KV head is named where each has slots of its own."""
    given = append_arguments("cpu")
    for name, end in (
        ("slot_too_large", "got 144 for token 1"),
        ("slots_per_head_too_large", "got 999 for token 1, KV head 1"),
        ("key_dtype", "must be float32 like that of key_cache, got float16"),
    ):
        changes, kind, *_ = BAD_APPEND[name]
        with pytest.raises(kind, match=f"{end}$"):
            append_kv(**{**given, **changes})


@pytest.mark.parametrize("name", ["key", "value", "key_cache", "value_cache"])
def test_append_of_what_requires_grad(name, device):
    given = append_arguments(device)
    given[name].requires_grad_()
    assert_refused(append_kv, given, ValueError, "grad")
    with torch.no_grad():
        append_kv(**given)
    assert (given["key_cache"][0, 5] == 0).all()


@pytest.mark.parametrize("name", append_arguments("cpu"))
def test_append_on_the_wrong_device(name, device):
    given = append_arguments(device)
    given[name] = given[name].to("meta")
    assert_refused(append_kv, given, (TypeError, ValueError, RuntimeError), name)
