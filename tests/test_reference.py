"""The reference against attention written in another way, and against numbers found by hand."""

import math

import pytest
import torch
from cases import PLANE, plane_cache

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


@pytest.mark.parametrize(
    ("name", "visible", "unit", "expected"),
    [
        ("oldest_first", range(0, 70), 16, [0, 1, 2, 3, 4]),
        ("oldest_first", range(33, 65), 16, [2, 3, 4]),
        ("recent_first", range(33, 65), 16, [4, 3, 2]),
        ("sink_recent", range(0, 120), 16, [0, 1, 2, 3, 7, 6, 5, 4]),
        ("sink_recent", range(40, 120), 16, [2, 3, 4, 5, 7, 6]),
        ("sink_recent", range(0, 40), 16, [0, 1, 2]),
        ("sink_recent", range(0, 200), 48, [0, 1, 4, 3, 2]),
        ("sink_recent", range(0, 200), 64, [0, 3, 2, 1]),
        ("sink_recent", range(0, 0), 16, []),
        ("sink_recent", range(50, 50), 16, []),
    ],
)
def test_order_of_the_built_in_walks(name, visible, unit, expected):
    assert reference.walk_order(name, visible, unit) == expected


@pytest.mark.parametrize(
    ("order", "pinned", "visible", "block", "expected"),
    [
        # Without pinned units the first block is block 0; the last may be short.
        ([0, 1, 2, 3, 4], 0, range(0, 40), 16, [[0, 1], [2, 3], [4]]),
        # All pinned units are block 0.
        ([4, 0, 1, 2, 3], 3, range(0, 40), 16, [[4, 0, 1], [2, 3]]),
        ([0, 1], 9, range(0, 16), 16, [[0, 1]]),
        # Units 0 and 1 have no visible token: dropped after the pinned positions were counted, and
        # before blocks are formed.
        ([0, 3, 1, 2, 4], 2, range(16, 40), 16, [[3], [2, 4]]),
        ([0, 1, 3, 2, 4], 2, range(16, 40), 16, [[3, 2], [4]]),
    ],
)
def test_blocks(order, pinned, visible, block, expected):
    blocks = reference.cut_blocks(order, pinned, visible, block, unit_size=8)
    assert [sorted({t // 8 for t in b.tolist()}) for b in blocks] == [sorted(b) for b in expected]
    assert sum(len(b) for b in blocks) == sum(8 for b in expected for _ in b)


def test_blocks_hold_visible_tokens_only():
    blocks = reference.cut_blocks([0, 1, 2], 0, range(5, 20), 8, unit_size=8)
    assert [b.tolist() for b in blocks] == [[5, 6, 7], list(range(8, 16)), [16, 17, 18, 19]]


@pytest.mark.parametrize("name", ["guided", "gided", ""])
def test_other_names_of_walks(name):
    words = rf"'oldest_first', 'recent_first', 'sink_recent', .*guided_walk.*encode_keys.*'{name}'"
    with pytest.raises(ValueError, match=words):
        reference.walk_order(name, range(100), 16)


def test_default_of_num_pinned_is_64_tokens_at_either_end():
    assert reference.default_pinned("sink_recent", 16) == 8
    assert reference.default_pinned("sink_recent", 48) == 4
    assert reference.default_pinned("recent_first", 16) == 0
    assert reference.default_pinned(torch.zeros(1, 1, 1), 16) == 0


ROOT5 = math.sqrt(5.0)


def test_changes_found_by_hand():
    # Means: (1,0), (1,0), (2/3,1/3), (1/2,1/4), (0,0), (0,0), (1/7,0)
    points = [(1, 0), (1, 0), (0, 1), (0, 0), (-2, -1), (0, 0), (1, 0)]
    result = reference.decode_attention(*plane_cache(points), **PLANE)
    changes = result.trace[0][0]
    d_scale = [0, 1 - ROOT5 / 3, 0.25, 1, 0, math.inf]
    d_direction = [0, 1 - 2 / ROOT5, 0, 1, 0, math.inf]
    assert [c.d_scale.item() for c in changes] == pytest.approx(d_scale)
    assert [c.d_direction.item() for c in changes] == pytest.approx(d_direction, abs=1e-15)
    weights = [1 / n for n in range(2, 8)]
    assert [c.weight.item() for c in changes] == pytest.approx(weights)
    # The means of |v|: 1, 1, 1, 3/4, ... before the block, and 1, 1, 0, sqrt 5, ... over it.
    spread = [1, 1, 3 / ROOT5, ROOT5 / (ROOT5 / 4), math.inf, math.inf]
    assert [c.spread.item() for c in changes] == pytest.approx(spread)


def test_sinks_count_in_both_changes():
    # One sink with logit 0: outputs (1/2,0), (2/3,0), (2/4,1/4).
    changes = reference.decode_attention(
        *plane_cache([(1, 0), (1, 0), (0, 1)]), **PLANE, attn_sinks=torch.zeros(1)
    ).trace[0][0]
    assert changes[0].d_scale.item() == pytest.approx(1 / 3)
    assert changes[0].d_direction.item() == pytest.approx(0, abs=1e-15)
    assert changes[1].d_scale.item() == pytest.approx(1 - ROOT5 / 4 * 3 / 2)
    assert changes[1].d_direction.item() == pytest.approx(1 - 2 / ROOT5)


@pytest.mark.parametrize(
    ("criterion", "stop"),
    [
        (Stability(0.0, 0.0, 1), 1),
        (Stability(0.0, 0.0, 2), -1),
        (Stability(0.3, 0.2, 1), 1),
        (Stability(0.3, 0.2, 2), 2),
        (Stability(0.3, 0.2, 3), 3),  # completed by the last block
        (Stability(0.3, 0.2, 4), -1),
        (Stability(0.3, 0.1, 2), -1),  # direction breaks the row at j = 2
        (Stability(0.2, 0.2, 2), -1),  # scale breaks it
        (Stability(math.inf, math.inf, 3), 3),
    ],
)
def test_stops_found_by_hand(criterion, stop):
    points = [(1, 0), (1, 0), (0, 1), (0, 0)]  # changes (0, 0), (.2546, .1056), (.25, 0)
    result = reference.decode_attention(*plane_cache(points), **PLANE, criterion=criterion)
    assert result.stop_block.item() == stop
    read = len(points) if stop < 0 else stop + 1
    assert result.tokens_read.item() == read
    expected = torch.tensor(points[:read], dtype=torch.float64).mean(0)
    torch.testing.assert_close(result.out[0, 0, :2], expected)
    assert result.lse.item() == pytest.approx(math.log(read))


def test_pinned_blocks_are_block_zero():
    points = [(1, 0), (0, 1), (0, 0), (1, 1), (1, 1)]
    result = reference.decode_attention(
        *plane_cache(points), **PLANE, num_pinned=3, criterion=Stability(2.0, 2.0, 1)
    )
    assert result.stop_block.item() == 1
    assert result.tokens_read.item() == 4


def test_num_pinned_replaces_the_default():
    points = [(1, 1)] * 200
    criterion, cache = Stability(0.1, 0.1, 1), plane_cache(points)
    options = {"unit_size": 1, "block_size": 4, "criterion": criterion}
    for num_pinned, read in (
        (None, 132),
        (0, 8),
        (10, 14),
        (torch.tensor([[7]], dtype=torch.int32), 11),
    ):
        result = reference.decode_attention(*cache, **options, num_pinned=num_pinned)
        assert result.tokens_read.item() == read
        assert result.stop_block.item() == 1


def test_all_heads_of_a_group_must_be_stable_and_all_read_on():
    # Head 0 sees only token 0 and stays; head 1 sees the tokens alike and does not settle.
    query, keys, values, *tables = plane_cache([(1, 0), (0, 3), (0, -3), (5, 0)])
    keys[0, 0, 0, 0] = 1.0
    query = torch.zeros(1, 2, 32)
    query[0, 0, 0] = 1000.0
    both = {"criterion": Stability(1e-3, 1e-3, 1), **PLANE}
    alone = reference.decode_attention(query[:, :1], keys, values, *tables, **both)
    assert alone.stop_block.item() == 1
    group = reference.decode_attention(query, keys, values, *tables, **both)
    assert group.stop_block.item() == -1
    assert group.tokens_read.item() == 4


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
