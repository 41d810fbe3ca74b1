"""Key codes and guided walks: the bits of the CPU, the same ones always, long sequences."""

import pytest
import torch
from cases import Case, Inputs, build
from coded import STEPS_PER_NAT, check, code_arguments, visible_of, with_codes
from gpu_helpers import (
    RAGGED,
    RUNS,
    Large,
    bits,
    by_dtype,
    encoded,
    same_bits,
    soil,
    walk_of,
)

from art_torch import (
    encode_keys,
)
from art_torch._reference_guided import order_units

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

pytestmark = pytest.mark.cuda

SHAPES = [
    Large("B1", (100_003,)),
    Large("B4", (16_000, 9_001, 0, 15_999), spare_pages=500),
    Large("B64", RAGGED, num_q_heads=64),
    Large("B4_D64", (8_000, 7_001, 1, 5_555), num_kv_heads=32, head_dim=64),
    Large("B2_D256", (9_000, 3_333), num_q_heads=16, num_kv_heads=1, head_dim=256),
    Large("B2_plain", (9_000, 3_333), num_q_heads=6, num_kv_heads=2, head_dim=80),
    Large("B1_wide", (5_000,), num_q_heads=40, num_kv_heads=2),
]
by_name = {"ids": lambda shape: shape.name}


def on_cpu(inputs):
    """The same inputs, but for the values, which nobody asks for."""
    query, keys, _, table, lens = inputs.tensors
    options = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in inputs.options.items()}
    return Inputs((query.cpu(), keys.cpu(), None, table.cpu(), lens.cpu()), options)


def steps_by_unit(result, b, h):
    n = int(result.walk_lens[b, h])
    units = result.walk[b, h, :n].long().cpu()
    steps = torch.empty(n, dtype=torch.int64)
    mass = result.log_mass[b, h, :n].double().cpu()
    steps[units - units.min()] = (mass * STEPS_PER_NAT).round().long()
    return steps


def assert_like_the_cpu(inputs, codes, result):
    """Shares of the CPU but for a rounding here and there, and the order that they give."""
    expected = walk_of(on_cpu(inputs), [t.cpu() for t in codes])
    assert torch.equal(result.walk_lens.cpu(), expected.walk_lens)
    assert torch.equal(result.num_pinned.cpu(), expected.num_pinned)
    total = different = 0
    for b, h in [(b, h) for b in range(len(result.walk)) for h in range(result.walk.shape[1])]:
        n = int(result.walk_lens[b, h])
        assert (result.walk[b, h, n:] == -1).all()
        if n == 0:
            continue
        steps, wanted = (steps_by_unit(r, b, h) for r in (result, expected))
        away = steps - wanted
        assert away.abs().max() <= 2
        # Where the total of a query head is rounded the other way, so are all shares it decides.
        total, different = total + n, different + min((away > 0).sum(), (away < 0).sum())
        order, _ = order_units(steps, visible_of(inputs, b, h))
        assert result.walk[b, h, :n].tolist() == order
    assert different <= 5 + 0.02 * total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], **by_dtype)
@pytest.mark.parametrize("shape", SHAPES, **by_name)
def test_like_the_cpu(shape, dtype, gpu):
    inputs = shape.build(dtype, gpu)
    pool, code_table = encoded(inputs)
    host = on_cpu(inputs)
    expected = torch.full_like(pool, 0xFF, device="cpu")
    _, keys, _, table, lens = host.tensors
    encode_keys(keys, table, lens, expected, code_table.cpu())
    assert torch.equal(pool.cpu(), expected)
    codes = pool, code_table
    assert_like_the_cpu(inputs, codes, walk_of(inputs, codes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], **by_dtype)
@pytest.mark.parametrize("shape", SHAPES, **by_name)
def test_fifty_runs(shape, dtype, gpu):
    inputs = shape.build(dtype, gpu)
    codes = encoded(inputs)
    expected, same = walk_of(inputs, codes), []
    for run in range(RUNS):
        soil(gpu, (0xFF, 0x00, 0x7F)[run % 3])
        again = encoded(inputs)
        same.append(torch.equal(again[0], codes[0]))
        same.append(bool(same_bits(walk_of(inputs, again), expected)))
    assert all(same), f"differ: {[i for i, s in enumerate(same) if not s]}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], **by_dtype)
@pytest.mark.parametrize("shape", SHAPES[1:6], **by_name)
def test_any_batch(shape, dtype, gpu):
    """Whoever else is in the batch, and however much of the GPU that leaves to a sequence."""
    inputs = shape.build(dtype, gpu)
    pool, table = encoded(inputs)
    expected, size = walk_of(inputs, (pool, table)), len(shape.seq_lens)
    many = [i % size for i in range(300)]
    for rows in ([0], [size - 1], list(range(size))[::-1], [0, size - 1, 0], many):
        some = walk_of(select(inputs, rows), (pool, table[rows]))
        for a, b in zip(some, expected, strict=True):
            assert torch.equal(bits(a), bits(b[rows]))


SPLITS = [
    Large("B1_100k", (100_003,)),
    Large("B1_4k", (4_000,), num_q_heads=12, num_kv_heads=4, head_dim=64),
    Large("ragged", (16_000, 9_001, 0, 1, 63, 15_999), spare_pages=500),
    Large("few", (100, 7), num_q_heads=8, num_kv_heads=2),
    Large("64_heads", (20_000,), num_q_heads=64, num_kv_heads=1),
    Large("70_heads", (20_000,), num_q_heads=70, num_kv_heads=1, head_dim=64),
    Large("B1_600k", (600_001,), num_q_heads=4, num_kv_heads=1, head_dim=64),
]


@pytest.mark.parametrize("window", [0, 3333])
@pytest.mark.parametrize("shape", SPLITS, **by_name)
def test_any_number_of_thread_blocks(shape, window, gpu):
    """An item's units are ordered by one thread block, or shared out over 2, 4 or 8 of them."""
    inputs = shape.build(torch.bfloat16, gpu)
    query, keys, _, table, lens = inputs.tensors
    arguments = query, keys, table, lens, *encoded(inputs)
    options = {"rest": True, "sliding_window": window}
    if window:
        options["attn_sinks"] = torch.linspace(-9, 9, query.shape[1], device=gpu)
    split, different = torch.ops.art._guided_walk_split, []
    expected = split(*arguments, **options, num_splits=1)
    assert same_bits(torch.ops.art.guided_walk(*arguments, **options), expected)
    for num_splits in (2, 3, 4, 8):
        for run in range(5):
            soil(gpu, (0xFF, 0x00, 0x7F)[run % 3])
            if not same_bits(split(*arguments, **options, num_splits=num_splits), expected):
                different.append((num_splits, run))
    assert not different


def select(inputs, rows):
    query, keys, values, *tables = inputs.tensors
    return Inputs((query[rows], keys, values, *(t[rows] for t in tables)), inputs.options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], **by_dtype)
@pytest.mark.parametrize(
    "shape",
    [
        Large("128k", (131_072 + 77,), num_q_heads=8, num_kv_heads=2),
        Large("300k", (300_001, 140_000), num_q_heads=4, num_kv_heads=1, head_dim=64),
        Large("plain_200k", (200_000,), num_q_heads=2, num_kv_heads=1, head_dim=72),
    ],
    **by_name,
)
def test_long_sequences(shape, dtype, gpu):
    inputs = shape.build(dtype, gpu)
    codes = encoded(inputs)
    result = walk_of(inputs, codes)
    assert_like_the_cpu(inputs, codes, result)
    for _ in range(5):
        soil(gpu, 0xFF)
        assert same_bits(walk_of(inputs, codes), result)


@pytest.mark.parametrize("head_dim", [128, 40])
def test_ids_out_of_range_are_skipped(head_dim, gpu):
    """Groups without pages or a record are not encoded, and walks over them are walks still."""
    case = Case("skip", (300, 300), 8, 2, head_dim=head_dim)
    inputs = build(case, torch.bfloat16, gpu)
    _, keys, _, table, lens = inputs.tensors
    pool, code_table = code_arguments(inputs)
    beyond = max(pool.shape[0], keys.shape[0])
    for bad in (-1, beyond, 2**31 - 1, -(2**31)):
        wrong = code_table.clone()
        wrong[0, 1] = bad
        pool.fill_(0xFF)
        encode_keys(keys, table, lens, pool, wrong)
        untouched = (pool == 0xFF).all(-1).all(-1)
        written = set(range(len(pool))) - set(untouched.nonzero().flatten().tolist())
        groups = [(b, i) for b in range(2) for i in range(4) if (b, i) != (0, 1)]
        assert written == {int(code_table[b, i]) for b, i in groups}
        result = walk_of(inputs, (pool, wrong))
        assert sorted(result.walk[0, 0, :19].tolist()) == list(range(19))
        pages = table.clone()
        pages[1, 5] = bad  # of group 1
        pool.fill_(0xFF)
        encode_keys(keys, pages, lens, pool, code_table)
        assert (pool[code_table[1, 1].long()] == 0xFF).all()
        assert (pool[code_table[1, 2].long()] != 0xFF).any()


def test_small_cases_under_every_split(gpu):
    """One sequence or hundreds of the same: the schedule changes no bit, and all pass the check."""
    for case in (
        Case("heads", (700, 129), 32, 2, head_dim=128),
        Case("softcap", (900, 65), 8, 1, head_dim=192, options={"softcap": 15.0}, sinks=True),
        Case("window", (2000, 64), 12, 4, head_dim=96, options={"sliding_window": 333}),
    ):
        inputs = build(case, torch.float16, gpu)
        codes = with_codes(inputs)
        check(inputs, codes)
        expected = walk_of(inputs, codes)
        rows = [0, 1] * 200
        many = walk_of(inputs.select(rows), (codes[0], codes[1][rows]))
        for a, b in zip(many, expected, strict=True):
            assert torch.equal(bits(a), bits(b[rows]))
