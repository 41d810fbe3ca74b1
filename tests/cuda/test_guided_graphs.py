"""Key codes and guided walks in graphs and on streams: nothing waits, nothing comes too early."""

import pytest
import torch
from cases import Inputs
from coded import call_guided, code_arguments
from gpu_helpers import (
    EARLY,
    RAGGED,
    RUNS,
    Large,
    assert_nothing_waits,
    capture,
    encoded,
    same_bits,
    walk_of,
)

from art_torch import (
    ResidualMass,
    append_kv,
    decode_attention,
    encode_keys,
    guided_walk,
    key_code_bytes,
)

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("head_dim", [128, 40])
@pytest.mark.parametrize("batch", [1, 5, 90])
def test_a_replay_follows_the_lengths(batch, head_dim, gpu):
    """Encoding, ordering and attention in one graph."""
    g = torch.Generator().manual_seed(batch)
    shape = Large("graph", (3000,) * batch, num_q_heads=8, num_kv_heads=2, head_dim=head_dim)
    inputs = shape.build(torch.bfloat16, gpu)
    query, keys, values, table, lens = inputs.tensors
    pool, code_table = code_arguments(inputs)
    starts, coded = torch.zeros_like(lens), torch.zeros_like(lens)

    def step():
        encode_keys(keys, table, lens, pool, code_table, coded_lens=coded)
        walk = guided_walk(query, keys, table, lens, pool, code_table, seq_starts=starts)
        result = decode_attention(
            query, keys, values, table, lens, walk=walk.walk, walk_lens=walk.walk_lens,
            num_pinned=walk.num_pinned, seq_starts=starts, criterion=EARLY,
        )  # fmt: skip
        return [*walk, *result]

    graph, outputs = capture(step)
    for length in (3000, 1, 64, 0, 700, 2999, 3000):
        some = torch.randint(0, length + 1, (batch,), generator=g).int()
        some[0] = length
        lens.copy_(some)
        starts.copy_(some // 3)
        coded.zero_()
        pool.fill_(0xFF)
        for tensor in outputs:
            tensor.fill_(7)
        graph.replay()
        got, codes = [t.clone() for t in outputs], pool.clone()
        pool.fill_(0xFF)
        assert same_bits(step(), got)
        assert torch.equal(pool, codes)
        coded.copy_(lens)  # nothing is new: nothing may be written
        pool.fill_(0xFF)
        graph.replay()
        assert (pool == 0xFF).all()


@pytest.mark.parametrize("per_head", [False, True])
def test_decode_steps_in_one_graph(per_head, gpu):
    """A step that appends a token and encodes what became complete, replayed 200 times."""
    batch, heads, dim, steps = 3, 2, 64, 200
    g = torch.Generator(gpu).manual_seed(0)
    kind = {"dtype": torch.bfloat16, "device": gpu, "generator": g}
    keys, values = (torch.randn(60, 16, heads, dim, **kind) for _ in range(2))
    table = torch.randperm(60, device=gpu, generator=g).int().view(batch, 20)
    code_table = torch.randperm(15, device=gpu, generator=g).int().view(batch, 5)
    pool = torch.zeros(15, heads, key_code_bytes(dim), dtype=torch.uint8, device=gpu)
    start = torch.tensor([[0, 63], [64, 100], [1, 119]] if per_head else [0, 63, 119], device=gpu)
    lens, new = start.int(), torch.zeros(2, batch, heads, dim, dtype=torch.bfloat16, device=gpu)

    def step():
        before = lens.clone()
        position = lens.long().view(batch, -1).expand(batch, heads)
        slots = table.gather(1, position // 16).long() * 16 + position % 16
        append_kv(*new, keys, values, slots)
        lens.add_(1)
        encode_keys(keys, table, lens, pool, code_table, coded_lens=before)

    kept = keys.clone(), values.clone()
    graph, _ = capture(step)
    keys.copy_(kept[0])
    values.copy_(kept[1])
    lens.copy_(start)
    pool.zero_()
    encode_keys(keys, table, lens, pool, code_table)
    for _ in range(steps):
        new.copy_(torch.randn(new.shape, generator=g, device=gpu))
        graph.replay()
    assert torch.equal(lens.long(), start + steps)
    expected = torch.zeros_like(pool)
    encode_keys(keys, table, lens, expected, code_table)
    assert torch.equal(pool, expected)


@pytest.mark.parametrize("criterion", [None, EARLY, EARLY | ResidualMass(0.1)])
@pytest.mark.parametrize(
    "shape",
    [
        Large("B1", (20_011,)),
        Large("B4", (3000, 1, 0, 2222), num_q_heads=8, num_kv_heads=2, head_dim=64),
        Large("B64", RAGGED, num_q_heads=64),
        Large("plain", (3000, 700), num_q_heads=6, num_kv_heads=2, head_dim=80),
    ],
    ids=lambda shape: shape.name,
)
def test_steps_one_after_the_other(shape, criterion, gpu):
    """Kernels begin while the one before still runs, in memory that calls before them have used."""
    several = [shape.build(torch.bfloat16, gpu, seed) for seed in range(3)]
    codes = [encoded(inputs) for inputs in several]
    rest = criterion not in (None, EARLY)

    def attend(i, **walk):
        return several[i].call(decode_attention, criterion=criterion, **walk)

    def step(i):
        return attend(i, walk="guided", key_codes=codes[i][0], code_table=codes[i][1])

    expected = []
    for i, inputs in enumerate(several):
        walk = call_guided(guided_walk, inputs, codes[i], rest=rest)
        torch.cuda.synchronize()
        explicit = {"walk": walk.walk, "walk_lens": walk.walk_lens, "num_pinned": walk.num_pinned}
        expected.append(attend(i, **explicit, **({"log_rest": walk.log_rest} if rest else {})))
        torch.cuda.synchronize()

    def chain():
        return [step(i % 3) for i in range(12)]

    def is_expected(results):
        return all(same_bits(result, expected[i % 3]) for i, result in enumerate(results))

    assert all(is_expected(chain()) for _ in range(10))
    graph, outputs = capture(chain)
    for _ in range(10):
        for tensor in [t for result in outputs for t in result]:
            tensor.fill_(7)
        graph.replay()
        assert is_expected(outputs)


@pytest.mark.parametrize("head_dim", [128, 72])
def test_calls_wait_for_what_their_stream_produces(head_dim, gpu):
    inputs = Large("side", (3000, 700), num_q_heads=8, head_dim=head_dim).build(torch.bfloat16, gpu)
    codes = encoded(inputs)
    expected = walk_of(inputs, codes)
    late = [torch.zeros_like(t) for t in inputs.tensors[:2]]
    pool, side = torch.zeros_like(codes[0]), torch.cuda.Stream()
    _, _, values, table, lens = inputs.tensors
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        for buffer, ready in zip(late, inputs.tensors, strict=False):
            buffer.copy_(ready)
        encode_keys(late[1], table, lens, pool, codes[1])
        result = walk_of(Inputs((*late, values, table, lens), inputs.options), (pool, codes[1]))
        copies = [t.clone() for t in result]
        for tensor in result:  # nothing of the call may still be under way behind this
            tensor.zero_()
    side.synchronize()
    assert same_bits(copies, expected)
    assert all((t == 0).all() for t in result)


def test_the_host_waits_for_nothing(gpu):
    inputs = Large("wait", (3000, 100)).build(torch.bfloat16, gpu)
    pool, code_table = encoded(inputs)
    _, keys, _, table, lens = inputs.tensors

    def calls():
        encode_keys(keys, table, lens, pool, code_table)
        return walk_of(inputs, (pool, code_table))

    assert_nothing_waits(calls)


def test_two_streams_do_not_disturb_each_other(gpu):
    calls = [
        Large("first", (9000, 300)).build(torch.bfloat16, gpu, 0),
        Large("second", (2000, 7000, 1, 0), head_dim=64).build(torch.bfloat16, gpu, 1),
    ]
    codes = [encoded(inputs) for inputs in calls]
    expected = [walk_of(inputs, c) for inputs, c in zip(calls, codes, strict=True)]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    same = []
    for _ in range(RUNS):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                same.append(same_bits(walk_of(calls[i], codes[i]), expected[i]))
    torch.cuda.synchronize()
    assert all(bool(s) for s in same)
