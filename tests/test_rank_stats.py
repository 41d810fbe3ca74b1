"""Statistics of several ranks, put together: what is refused, and how heads are joined."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from art_torch.rank_stats import all_shares, join_shares
from art_torch.stats import ReadStats


def counted(read: list[list[int]], present: int = 10) -> ReadStats:
    """Steps of layer 3, of one row; ``read`` is ``[steps][num_kv_heads]``."""
    stats = ReadStats()
    for of_step in read:
        stats.add(3, torch.tensor([of_step], dtype=torch.int32), present)
    return stats


def join(ranks: list[ReadStats], num_kv_heads: int) -> ReadStats:
    return ReadStats.of_shares(join_shares([s.shares() for s in ranks], {3: num_kv_heads}), 0)


def test_heads_follow_one_another_in_the_order_of_the_ranks():
    joined = join([counted([[1, 2], [3, 4]]), counted([[5, 6], [7, 8]])], 4)
    assert joined.tokens_read().tolist() == [[4, 6, 12, 14]]
    assert joined.tokens_present().tolist() == [20]
    assert joined.steps == 2
    read, present = joined.per_step(3)
    assert read.tolist() == [[1, 2, 5, 6], [3, 4, 7, 8]]
    assert present.tolist() == [10, 10]
    assert joined.read_fraction() == pytest.approx(36 / 80)


def test_heads_of_a_rank_may_hold_more_tokens():
    """As after a press with a budget for each head."""
    joined = join([counted([[1, 2, 3]], present=10), counted([[4]], present=30)], 4)
    assert joined.fractions().tolist() == [[0.1, 0.2, 0.3, 4 / 30]]
    assert joined.tokens_present().tolist() == [15]
    assert joined.per_step(3)[1].tolist() == [15]


def test_ranks_that_have_all_heads_are_counted_once():
    joined = join([counted([[1, 2]]), counted([[1, 2]])], 2)
    assert joined.tokens_read().tolist() == [[1, 2]]


def test_steps_counted_on_the_device_are_joined():
    ranks = []
    for read in ([1, 2], [3, 4]):
        stats = ReadStats()
        lens = torch.tensor([9], dtype=torch.int32)
        stats.add_on_device(3, torch.tensor([read], dtype=torch.int32), lens, None)
        ranks.append(stats)
    joined = join(ranks, 4)
    assert joined.tokens_read().tolist() == [[1, 2, 3, 4]]
    assert joined.tokens_present().tolist() == [9]
    assert joined.steps == 1


def test_mass_is_a_mean_over_all_heads():
    first, second = counted([[1, 2, 3]]), counted([[4]])
    first.add_mass(3, torch.tensor([[0.9, 0.8, 0.7]]), torch.tensor([[0.5, 0.5, 0.5]]))
    second.add_mass(3, torch.tensor([[0.6]]), torch.tensor([[0.1]]))
    mass = join([first, second], 4).mass_read()
    assert float(mass.true) == pytest.approx(0.75)
    assert float(mass.lowest) == pytest.approx(0.6)
    assert float(mass.estimated) == pytest.approx(0.4)


def test_mass_where_one_rank_has_too_little_to_be_guided():
    """As after a press with a budget for each head."""
    first, second = counted([[1, 2, 3], [1, 2, 3]]), counted([[4], [4]])
    for stats, heads, estimates in ((first, 3, [0.5, 0.7]), (second, 1, [None, 0.3])):
        for estimate in estimates:
            of_step = None if estimate is None else torch.full((1, heads), estimate)
            stats.add_mass(3, torch.full((1, heads), 0.9), of_step)
    assert float(join([first, second], 4).mass_read().estimated) == pytest.approx(0.55)
    assert float(join([second, first], 4).mass_read().estimated) == pytest.approx(0.55)


def test_mass_that_no_rank_has_estimated():
    ranks = [counted([[1]]), counted([[2]])]
    for stats in ranks:
        stats.add_mass(3, torch.tensor([[0.9]]), None)
    mass = join(ranks, 2).mass_read()
    assert float(mass.true) == pytest.approx(0.9)
    assert mass.estimated.isnan().all()


def test_mass_that_one_rank_has_not_measured():
    first, second = counted([[1]]), counted([[2]])
    first.add_mass(3, torch.tensor([[0.9]]), None)
    with pytest.raises(ValueError, match=r"got \[1, 0\] steps of layer 3: patch with the same"):
        join([first, second], 2)


def test_no_step_of_any_rank():
    joined = join([ReadStats(), ReadStats()], 4)
    with pytest.raises(ValueError, match="no decode step has run"):
        joined.read_fraction()


@pytest.mark.parametrize(
    ("ranks", "num_kv_heads", "message"),
    [
        ([counted([[1]]), ReadStats()], 2, r"same layers, got \[3\] on rank 0 and \[\] on rank 1"),
        (
            [counted([[1]]), counted([[1], [2]])],
            2,
            "same steps, got 1 of layer 3 on rank 0 and 2 on rank 1",
        ),
        ([counted([[1]]), counted([[1]])], 4, r"has 4 KV heads, the ranks have counted \[1, 1\]"),
    ],
)
def test_ranks_that_do_not_fit_together(ranks, num_kv_heads, message):
    with pytest.raises(ValueError, match=message):
        join(ranks, num_kv_heads)


def test_gathering_needs_torch_distributed():
    assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match="start the script with torchrun"):
        all_shares({}, None)
