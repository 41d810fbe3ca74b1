"""The operators as citizens of PyTorch: schemas, fake kernels, torch.compile."""

import pytest
import torch
from cases import CACHE_DTYPES, CASES, LOOSE, Case, build
from coded import call_guided, guided_inputs, with_codes
from rests import bare_arguments as arguments_of

from art_torch import (
    DecodeResult,
    ResidualMass,
    Stability,
    append_kv,
    decode_attention,
    encode_keys,
    guided_walk,
    key_code_bytes,
    ops,
)
from art_torch.guided import LOGIT_ARGUMENTS

by_dtype = {"ids": lambda dtype: str(dtype).removeprefix("torch.")}
NAMES = ("everything", "explicit_per_head", "per_head_lens", "layout_dense", "layout_hnd", "ragged")
OPCHECK_CASES = [case for case in CASES if case.name in NAMES]
BIG = Case("big", (700, 90), num_q_heads=6, head_dim=64, value_dim=32, sinks=True)


def bare_arguments(inputs, **more):
    """Arguments of torch.ops.art.decode_attention, from those of the wrapper."""
    options = {k: v for k, v in inputs.options.items() if v is not None}
    if isinstance(options["walk"], str):
        options["walk_order"] = options.pop("walk")
    if isinstance(options.get("num_pinned"), torch.Tensor):
        options["num_pinned_per_head"] = options.pop("num_pinned")
    limits = {"criterion": 1, "d_scale": 0.1, "d_direction": 5e-3, "patience": 2}
    return inputs.tensors, options | limits | more


@pytest.mark.parametrize("dtype", CACHE_DTYPES, **by_dtype)
@pytest.mark.parametrize("case", OPCHECK_CASES, ids=lambda case: case.name)
def test_opcheck_decode_attention(case, dtype, device):
    args, kwargs = bare_arguments(build(case, dtype, device))
    torch.library.opcheck(torch.ops.art.decode_attention.default, args, kwargs)


def test_opcheck_variants(device):
    inputs = build(BIG, torch.float32, device)
    thresholds = torch.tensor([[0.1, 5e-3], [0.2, 2e-2]], device=device)
    args, kwargs = bare_arguments(inputs, thresholds=thresholds)
    torch.library.opcheck(torch.ops.art.decode_attention.default, args, kwargs)
    torch.library.opcheck(
        torch.ops.art._decode_attention_split.default, args, kwargs | {"num_splits": 3}
    )
    results = inputs.call(decode_attention)
    out = {k: torch.zeros_like(v) for k, v in results._asdict().items()}
    torch.library.opcheck(torch.ops.art.decode_attention.out, args, kwargs | out)


@pytest.mark.parametrize(
    "criterion",
    [ResidualMass(0.1), Stability() | ResidualMass(0.1), Stability() & ResidualMass(0.1)],
    ids=["alone", "either", "both"],
)
def test_opcheck_residual_mass(criterion, device):
    inputs = build(BIG, torch.float32, device)
    inputs = guided_inputs(inputs, call_guided(guided_walk, inputs, with_codes(inputs), rest=True))
    args, kwargs = inputs.tensors, arguments_of(inputs, criterion)
    torch.library.opcheck(torch.ops.art.decode_attention.default, args, kwargs)
    out = {
        k: torch.zeros_like(v)
        for k, v in inputs.call(decode_attention, criterion=criterion)._asdict().items()
    }
    torch.library.opcheck(torch.ops.art.decode_attention.out, args, kwargs | out)


def test_opcheck_append_kv(device):
    caches = [torch.zeros(4, 8, 2, d, device=device) for d in (32, 64)]
    new = [torch.randn(5, 2, d, device=device) for d in (32, 64)]
    for slots in (torch.tensor([0, 9, -1, 31, 4]), torch.arange(10).view(5, 2)):
        torch.library.opcheck(torch.ops.art.append_kv.default, (*new, *caches, slots.to(device)))


def guided_arguments(case, dtype, device):
    inputs = build(case, dtype, device)
    options = {k: v for k, v in inputs.options.items() if k in LOGIT_ARGUMENTS}
    query, keys, _, table, lens = inputs.tensors
    return (query, keys, table, lens, *with_codes(inputs)), options


@pytest.mark.parametrize("dtype", CACHE_DTYPES, **by_dtype)
@pytest.mark.parametrize("name", ["everything", "per_head_lens", "layout_dense", "layout_hnd"])
def test_opcheck_guided_walk(name, dtype, device):
    (case,) = (case for case in CASES if case.name == name)
    args, kwargs = guided_arguments(case, dtype, device)
    torch.library.opcheck(torch.ops.art.guided_walk.default, args, kwargs)
    torch.library.opcheck(torch.ops.art.guided_walk.default, args, kwargs | {"rest": True})
    split = torch.ops.art._guided_walk_split.default
    torch.library.opcheck(split, args, kwargs | {"rest": True, "num_splits": 3})


def test_opcheck_encode_keys(device):
    keys = torch.randn(8, 16, 2, 40, device=device)
    pool = torch.zeros(4, 2, key_code_bytes(40), dtype=torch.uint8, device=device)
    indices = (torch.arange(8).view(2, 4), [64, 10], [3, 0], [[2], [0]])
    table, lens, coded, codes = (
        torch.as_tensor(t, dtype=torch.int32, device=device) for t in indices
    )
    for kwargs in ({}, {"coded_lens": coded}):
        args = (keys, table, lens, pool, codes)
        torch.library.opcheck(torch.ops.art.encode_keys.default, args, kwargs)


@pytest.mark.parametrize("criterion", [LOOSE, LOOSE | ResidualMass(0.2)], ids=["art", "either"])
def test_compile_a_guided_step(criterion, device):
    """Encoding, ordering and attention in one graph; the codes are written."""
    args, _ = guided_arguments(BIG, torch.float32, device)
    query, keys, table, lens, pool, codes = args

    def step(query, pool):
        encode_keys(keys, table, lens, pool, codes.clamp(max=pool.shape[0] - 1))
        return decode_attention(
            query, keys, keys, table, lens, walk="guided", key_codes=pool, code_table=codes,
            criterion=criterion,
        ).out + 1  # fmt: skip

    pools = [torch.zeros_like(pool) for _ in range(2)]
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(query, pools[0])
        torch.testing.assert_close(compiled, step(query, pools[1]))
    assert torch.equal(*pools)
    assert pools[0].any()


def decode_step(query, key, value, key_cache, value_cache, slots, table, lens, **options):
    """Append a token and attend, with other operations around it."""
    append_kv(key * 2, value, key_cache, value_cache, slots)
    result = decode_attention(query.relu(), key_cache, value_cache, table, lens, **options)
    return result.out.sigmoid(), result.lse + 1, result.tokens_read, result.stop_block


def step_arguments(batch, tokens, device):
    g = torch.Generator().manual_seed(tokens)
    pages = 40
    caches = [torch.randn(pages, 16, 2, d, generator=g) for d in (32, 40)]
    table = torch.randperm(pages, generator=g)[: batch * 10].view(batch, 10).int()
    lens = torch.full((batch,), tokens, dtype=torch.int32)
    last = tokens - 1
    slots = table[:, last // 16].long() * 16 + last % 16
    query = torch.randn(batch, 4, 32, generator=g)
    new = [torch.randn(batch, 2, d, generator=g) for d in (32, 40)]
    return [t.to(device) for t in (query, *new, *caches, slots, table, lens)]


OPTIONS = [
    {},
    {"criterion": Stability(0.2, 0.02, 1), "walk": "recent_first", "sliding_window": 140},
    {"criterion": Stability(torch.tensor([0.2, 0.1]), 0.02, 1), "softcap": 30.0, "num_pinned": 2},
]


@pytest.mark.parametrize(
    ("backend", "options"),
    [*(("aot_eager", options) for options in OPTIONS), ("inductor", OPTIONS[1])],
    ids=["exact", "art", "per_head", "art_inductor"],
)
def test_compile_fullgraph(backend, options, device):
    torch._dynamo.reset()
    compiled = torch.compile(decode_step, fullgraph=True, backend=backend)
    with torch.no_grad():
        for batch, tokens in ((2, 150), (2, 151), (3, 150)):
            eager_args = step_arguments(batch, tokens, device)
            args = [t.clone() for t in eager_args]
            expected = decode_step(*eager_args, **options)
            for a, b in zip(compiled(*args, **options), expected, strict=True):
                torch.testing.assert_close(a, b)
            for a, b in zip(args, eager_args, strict=True):  # the caches were written
                assert torch.equal(a, b)


def test_compile_does_not_recompile_for_lengths(device):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(decode_step, fullgraph=True, backend=counter)
    with torch.no_grad():
        for tokens in range(120, 128):
            compiled(*step_arguments(2, tokens, device))
    assert counter.frame_count == 1


def test_compile_the_out_variant(device):
    inputs = build(BIG, torch.float32, device)

    def function(out):
        decode_attention(*inputs.tensors, **inputs.options, criterion=LOOSE, out=DecodeResult(*out))
        return out[0] + 1

    expected = inputs.call(decode_attention, criterion=LOOSE)
    torch._dynamo.reset()
    out = [torch.zeros_like(t) for t in expected]
    with torch.no_grad():
        added = torch.compile(function, fullgraph=True, backend="aot_eager")(out)
    assert torch.equal(added, expected.out + 1)
    for a, b in zip(out, expected, strict=True):
        assert torch.equal(a, b)


def test_fake_tensors_have_the_shapes_of_results(device):
    for case in (BIG, Case("empty", (0,), num_q_heads=3, num_kv_heads=1)):
        inputs = build(case, torch.bfloat16, device)
        args, kwargs = bare_arguments(inputs)
        real = torch.ops.art.decode_attention(*args, **kwargs)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            fake = torch.ops.art.decode_attention(*args, **kwargs)
        for a, b in zip(fake, real, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_arguments_left_out_have_the_value_that_the_operator_assumes():
    for op in (torch.ops.art.decode_attention.default, torch.ops.art.decode_attention.out):
        assumed = {argument.name: argument.default_value for argument in op._schema.arguments}
        for name, value in ops._DEFAULTS.items():
            assert assumed[name] == value, f"{name}: expected {value}, got {assumed[name]}"
