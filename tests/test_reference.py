"""The reference against attention written in another way."""

import math

import pytest
import torch

from art_torch import Stability, reference

PAGE = 16


def make_cache(seq_lens, num_kv_heads=2, head_dim=32, value_dim=40, seed=0):
    """Dense keys and values, and the same in shuffled pages with NaN in every unused slot."""
    g = torch.Generator().manual_seed(seed)
    batch, longest = len(seq_lens), max(seq_lens)
    max_pages = -(-longest // PAGE)
    keys = torch.randn(batch, num_kv_heads, longest, head_dim, generator=g, dtype=torch.float64)
    # Values with a common part, as in a model: so outputs settle.
    values = 1 + torch.randn(batch, num_kv_heads, longest, value_dim, generator=g).double()
    num_pages = batch * max_pages + 3
    table = torch.randperm(num_pages, generator=g)[: batch * max_pages].view(batch, max_pages).int()
    key_cache = torch.full((num_pages, PAGE, num_kv_heads, head_dim), math.nan, dtype=torch.float64)
    value_cache = torch.full((num_pages, PAGE, num_kv_heads, value_dim), math.nan).double()
    for b, seq_len in enumerate(seq_lens):
        for t in range(seq_len):
            key_cache[table[b, t // PAGE], t % PAGE] = keys[b, :, t]
            value_cache[table[b, t // PAGE], t % PAGE] = values[b, :, t]
    return keys, values, key_cache, value_cache, table, torch.tensor(seq_lens, dtype=torch.int32)


def make_query(batch, num_q_heads=6, head_dim=32, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, num_q_heads, head_dim, generator=g, dtype=torch.float64)


def naive(query, keys, values, tokens, bias=None, softcap=0.0, sink=None):
    """Softmax attention of one query head `[D]` over the listed tokens of one KV head."""
    logits = keys[tokens] @ query / math.sqrt(len(query))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits if bias is None else logits + bias
    lse = torch.logsumexp(logits, 0)
    if sink is not None:
        logits = torch.cat([logits, sink[None]])
    return torch.softmax(logits, 0)[: len(tokens)] @ values[tokens], lse


def assert_naive(result, query, keys, values, tokens_of, num_kv_heads=2, **options):
    """Compare every query head with `naive` over tokens_of(b, h); options may be callables."""
    for b in range(query.shape[0]):
        for q in range(query.shape[1]):
            h = q // (query.shape[1] // num_kv_heads)
            tokens = tokens_of(b, h)
            extra = {k: f(b, q, tokens) if callable(f) else f for k, f in options.items()}
            out, lse = naive(query[b, q], keys[b, h], values[b, h], tokens, **extra)
            torch.testing.assert_close(result.out[b, q], out, rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(result.lse[b, q], lse, rtol=1e-11, atol=1e-12)
            assert result.tokens_read[b, h] == len(tokens)


@pytest.mark.parametrize("walk", ["oldest_first", "recent_first", "sink_recent"])
def test_without_criterion_it_is_softmax_attention(walk):
    lens = [1, 15, 16, 17, 65, 300]
    keys, values, *cache = make_cache(lens)
    query = make_query(len(lens))
    result = reference.decode_attention(query, *cache, walk=walk)
    assert_naive(result, query, keys, values, lambda b, h: torch.arange(lens[b]))
    assert (result.stop_block == -1).all()


def test_nothing_visible():
    _, _, *cache, table, lens = make_cache([40, 40])
    query = make_query(2)
    sinks = torch.zeros(6)
    lens = torch.tensor([0, 40], dtype=torch.int32)
    starts = torch.tensor([0, 40], dtype=torch.int32)
    result = reference.decode_attention(
        query, *cache, table, lens, seq_starts=starts, attn_sinks=sinks, criterion=Stability()
    )
    assert (result.out == 0).all()
    assert (result.lse == -math.inf).all()
    assert (result.tokens_read == 0).all()
    assert (result.stop_block == -1).all()


def test_empty_batch():
    _, _, key_cache, value_cache, table, lens = make_cache([40])
    result = reference.decode_attention(
        make_query(0), key_cache, value_cache, table[:0], lens[:0], criterion=Stability()
    )
    assert [list(t.shape) for t in result[:4]] == [[0, 6, 40], [0, 6], [0, 2], [0, 2]]


def test_softcap_alibi_window_starts_and_sinks():
    lens, starts, window = [200, 90], [7, 60], 100
    keys, values, *cache = make_cache(lens)
    query = 4 * make_query(2)
    slopes, sinks = torch.linspace(0.01, 0.3, 6), torch.linspace(-3, 3, 6)
    result = reference.decode_attention(
        query,
        *cache,
        softcap=2.5,
        alibi_slopes=slopes,
        attn_sinks=sinks,
        sliding_window=window,
        seq_starts=torch.tensor(starts, dtype=torch.int32),
    )
    assert_naive(
        result,
        query,
        keys,
        values,
        lambda b, h: torch.arange(max(starts[b], lens[b] - window), lens[b]),
        softcap=2.5,
        bias=lambda b, q, tokens: slopes[q].double() * (tokens - (lens[b] - 1)),
        sink=lambda b, q, tokens: sinks[q].double(),
    )


def test_per_head_tables_and_lengths():
    lens = torch.tensor([[130, 20], [5, 0]], dtype=torch.int32)
    keys, values, key_cache, value_cache, table, _ = make_cache([144, 144])
    # Head 1 of a sequence reads the pages of the other sequence.
    table = torch.stack([table, table.flip(0)], dim=1)
    query = make_query(2)
    result = reference.decode_attention(query, key_cache, value_cache, table, lens)
    keys = torch.stack([keys[:, 0], keys.flip(0)[:, 1]], dim=1)
    values = torch.stack([values[:, 0], values.flip(0)[:, 1]], dim=1)
    assert (result.out[1, 3:] == 0).all()
    lens[1, 1] = 1  # naive attention needs a token; that head is checked above
    result.tokens_read[1, 1] = 1
    out, lse = naive(query[1, 3], keys[1, 1], values[1, 1], torch.arange(1))
    result.out[1, 3:], result.lse[1, 3:] = out, lse
    for q in (4, 5):
        result.lse[1, q] = naive(query[1, q], keys[1, 1], values[1, 1], torch.arange(1))[1]
    assert_naive(result, query, keys, values, lambda b, h: torch.arange(int(lens[b, h])))


def test_explicit_walk_attends_to_the_listed_units_only():
    keys, values, *cache = make_cache([100, 37])
    query = make_query(2)
    walk = torch.tensor([[[5, 0, 3, -7], [6, 1, 9999, 9999]], [[2, 1, 0, 5], [4, 0, 0, 0]]])
    walk_lens = torch.tensor([[3, 2], [4, 1]])
    result = reference.decode_attention(
        query, *cache, walk=walk.int(), walk_lens=walk_lens.int(), num_pinned=1
    )
    units = {(0, 0): [5, 0, 3], (0, 1): [6, 1], (1, 0): [2, 1, 0], (1, 1): []}
    assert (result.out[1, 3:] == 0).all()
    assert result.tokens_read.tolist() == [[48, 20], [37, 0]]
    for b, h in ((0, 0), (0, 1), (1, 0)):
        tokens = [t for u in units[b, h] for t in range(16 * u, min(16 * u + 16, [100, 37][b]))]
        for q in range(3 * h, 3 * h + 3):
            out, _ = naive(query[b, q], keys[b, h], values[b, h], torch.tensor(tokens))
            torch.testing.assert_close(result.out[b, q], out, rtol=1e-11, atol=1e-12)


def test_thresholds_per_head():
    _, _, *cache = make_cache([400])
    limits = Stability(torch.tensor([0.5, 1e-9]), torch.tensor([0.2, 1e-9]), 1)
    result = reference.decode_attention(make_query(1), *cache, criterion=limits)
    loose = reference.decode_attention(make_query(1), *cache, criterion=Stability(0.5, 0.2, 1))
    assert result.stop_block[0].tolist() == [loose.stop_block[0, 0].item(), -1]
    assert result.stop_block[0, 0] > 0


@pytest.mark.parametrize("walk", ["oldest_first", "recent_first", "sink_recent"])
def test_a_stopped_head_is_exact_over_what_it_read(walk):
    keys, values, *cache = make_cache([600, 333])
    query = 2 * make_query(2)
    never = reference.decode_attention(query, *cache, walk=walk, criterion=Stability(0.0, 0.0, 1))
    exact = reference.decode_attention(query, *cache, walk=walk)
    assert torch.equal(never.out, exact.out)
    assert (never.stop_block == -1).all()

    result = reference.decode_attention(query, *cache, walk=walk, criterion=Stability(0.2, 0.05, 2))
    assert (result.stop_block > 0).all()
    assert (result.tokens_read < cache[3][:, None]).all()

    def tokens_of(b, h):
        length = [600, 333][b]
        order = reference.walk_order(walk, range(length), 16)
        pinned = reference.default_pinned(walk, 16)
        blocks = reference.cut_blocks(order, pinned, range(length), 64, 16)
        return torch.cat(blocks[: result.stop_block[b, h] + 1])

    assert_naive(result, query, keys, values, tokens_of)


def test_disjoint_walks_merge_by_lse():
    _, _, *cache = make_cache([333])
    query, sinks = make_query(1), torch.linspace(-2, 2, 6)
    whole = reference.decode_attention(query, *cache, attn_sinks=sinks)
    units = torch.randperm(21, generator=torch.Generator().manual_seed(3)).int()
    parts = [
        reference.decode_attention(
            query,
            *cache,
            walk=part.expand(1, 2, -1),
            walk_lens=torch.full((1, 2), len(part), dtype=torch.int32),
        )
        for part in (units[:8], units[8:])
    ]
    lse = torch.logaddexp(parts[0].lse, parts[1].lse)
    out = sum(p.out * (p.lse - lse).exp()[..., None] for p in parts)
    out = out * torch.sigmoid(lse - sinks.double())[..., None]
    torch.testing.assert_close(out, whole.out, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(lse, whole.lse)


def test_pages_and_masked_tokens_do_not_matter():
    _, _, key_cache, value_cache, table, lens = make_cache([200, 90])
    options = {
        "criterion": Stability(0.2, 0.05, 2),
        "seq_starts": torch.tensor([9, 40], dtype=torch.int32),
        "sliding_window": 150,
    }
    query = make_query(2)
    first = reference.decode_attention(query, key_cache, value_cache, table, lens, **options)
    for b, start in ((0, 50), (1, 40)):  # 50 = 200 - window
        for t in range(start):
            key_cache[table[b, t // PAGE], t % PAGE] = math.inf
            value_cache[table[b, t // PAGE], t % PAGE] = math.nan
        table[b, : start // PAGE] = -1
    assert_same(
        first, reference.decode_attention(query, key_cache, value_cache, table, lens, **options)
    )
    moved = torch.randperm(len(key_cache), generator=torch.Generator().manual_seed(5))
    table = torch.where(table >= 0, moved.argsort()[table.clamp(min=0).long()], -1).int()
    assert_same(
        first,
        reference.decode_attention(
            query, key_cache[moved], value_cache[moved], table, lens, **options
        ),
    )


def assert_same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))


def test_append_kv():
    g = torch.Generator().manual_seed(0)
    key_cache, value_cache = torch.zeros(3, 4, 2, 32), torch.zeros(3, 4, 2, 40)
    key, value = (torch.randn(3, 2, dim, generator=g) for dim in (32, 40))
    reference.append_kv(key, value, key_cache, value_cache, torch.tensor([9, -1, 3]))
    assert torch.equal(key_cache[2, 1], key[0])
    assert torch.equal(value_cache[0, 3], value[2])
    assert key_cache.count_nonzero(-1).count_nonzero() == 4
    slots = torch.tensor([[0, 5], [-1, 6], [7, -1]])
    reference.append_kv(key, value, key_cache, value_cache, slots)
    assert torch.equal(key_cache[0, 0, 0], key[0, 0])
    assert torch.equal(value_cache[1, 1, 1], value[0, 1])
    assert torch.equal(key_cache[1, 2, 1], key[1, 1])
    assert torch.equal(key_cache[1, 3, 0], key[2, 0])
    assert key_cache.count_nonzero(-1).count_nonzero() == 8
