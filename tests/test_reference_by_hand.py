"""The reference against numbers found by hand: orders, blocks, changes of the output and stops."""

import math

import pytest
import torch
from cases import PLANE, plane_cache

from art_torch import Stability, reference


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
