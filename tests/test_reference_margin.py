"""The band around a decision within which rounding may decide."""

import math

import pytest
import torch
from cases import PLANE, plane_cache

from art_torch import ResidualMass, Stability, reference

# Outputs (2, 0), (1, 1/2), (1/2, 1/4); all logits are 0.
POINTS = [(2, 0), (0, 1), (-0.5, -0.25)]


def test_margin_contains_thresholds_next_to_a_change():
    result = reference.decode_attention(*plane_cache(POINTS), **PLANE)
    change = result.trace[0][0][0]
    d_scale, weight, spread = (t.item() for t in (change.d_scale, change.weight, change.spread))
    assert weight == 0.5
    assert spread == 1.0  # mean |v| = 2 before, |o| = 2
    for dtype, rounding in (
        (torch.float32, 0.0),
        (torch.float16, 2.0**-12),
        (torch.bfloat16, 2.0**-9),
    ):
        band = 16 * (2.0**-24 + rounding) * weight * spread
        for factor, inside in ((-1.1, False), (-0.9, True), (0.0, True), (0.9, True), (1.1, False)):
            criterion = Stability(d_scale + factor * band, 1.0, 1)
            result = reference.decode_attention(*plane_cache(POINTS), **PLANE, criterion=criterion)
            margin = reference.decision_margin(result, criterion, dtype)
            assert margin.tolist() == [[inside]], (dtype, factor)


def test_margin_of_the_direction():
    change = reference.decode_attention(*plane_cache(POINTS), **PLANE).trace[0][0][0]
    d_scale, d_direction = change.d_scale.item(), change.d_direction.item()
    eta = 2.0**-24
    delta = eta * change.weight.item() * change.spread.item()
    band = 16 * (
        delta * math.sqrt(2 * d_direction) + delta**2 + eta * d_direction + eta * d_scale**2
    )
    for factor, inside in ((-1.1, False), (-0.9, True), (0.9, True), (1.1, False)):
        criterion = Stability(1.0, d_direction + factor * band, 1)
        result = reference.decode_attention(*plane_cache(POINTS), **PLANE, criterion=criterion)
        assert reference.decision_margin(result, criterion, torch.float32).item() == inside


def test_the_margin_grows_with_the_largest_logit_so_far():
    query, keys, values, *tables = plane_cache([(1, 0), (1, 0), (1, 0)])
    query[0, 0, 0] = 1.0
    keys[0, :, 0, 0] = torch.tensor([2.0, -50.0, 8.0])
    changes = reference.decode_attention(query, keys, values, *tables, **PLANE, scale=1.0).trace
    assert [change.max_logit.item() for change in changes[0][0]] == [50.0, 50.0]


def rest_of(log_rest, criterion, **more):
    """Three tokens with logits 0; the first is block 0. `log_rest`: after each of them."""
    tokens = {"walk": torch.tensor([[[0, 1, 2]]]).int(), "walk_lens": torch.tensor([[3]]).int()}
    return reference.decode_attention(
        *plane_cache(POINTS), **{**PLANE, **tokens, **more}, criterion=criterion,
        log_rest=torch.tensor([[log_rest]], dtype=torch.float64),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float32, 0.0), (torch.float16, 2.0**-12), (torch.bfloat16, 2.0**-9)],
)
@pytest.mark.parametrize("sink", [None, 3.0])
def test_margin_of_the_rest(dtype, rounding, sink):
    criterion = ResidualMass(0.2)
    limit, log_read = math.log(0.25), 0.0 if sink is None else math.log(1 + math.exp(sink))
    band = 16 * 2.0**-24 * (1 + log_read - limit) + rounding
    more = {} if sink is None else {"attn_sinks": torch.tensor([sink]).double()}
    for factor, inside in ((-1.1, False), (-0.9, True), (0.0, True), (0.9, True), (1.1, False)):
        rest = [log_read + limit + factor * band, 9.0, 9.0]
        result = rest_of(rest, criterion, **more)
        assert result.stop_block.item() == (0 if factor < 0 else -1) or factor == 0.0
        assert reference.decision_margin(result, criterion, dtype).item() == inside


def test_nothing_left_is_never_inside():
    for rest, stop in (([0.0, -math.inf, 0.0], 1), ([math.nan, math.inf, -700.0], -1)):
        result = rest_of(rest, ResidualMass(0.0))
        assert result.stop_block.item() == stop
        assert not reference.decision_margin(result, ResidualMass(0.0), torch.bfloat16).item()


def test_only_what_moves_the_stop_is_inside():
    """Block 1 is just covered; whether that matters is up to the other rule."""
    change = reference.decode_attention(*plane_cache(POINTS), **PLANE).trace[0][0][0]
    residual, just = ResidualMass(0.2), math.log(2) + math.log(0.25)
    stable, unstable = Stability(1.0, 1.0, 1), Stability(change.d_scale.item() / 2, 1.0, 1)
    on_the_edge = Stability(change.d_scale.item(), 1.0, 1)
    for criterion, first, inside in (
        (residual, 9.0, True),
        (residual, -9.0, False),  # covered before
        (stable | residual, 9.0, False),  # stops there anyway
        (unstable | residual, 9.0, True),
        (stable & residual, 9.0, True),
        (unstable & residual, 9.0, False),  # goes on anyway
        (on_the_edge & residual, 9.0, True),
        (on_the_edge | residual, 9.0, True),
        (on_the_edge | residual, -9.0, False),
    ):
        result = rest_of([first, just, 9.0], criterion)
        got = reference.decision_margin(result, criterion, torch.float32).item()
        assert got == inside, (criterion, first)


def test_a_clear_change_settles_the_block():
    d_scale = reference.decode_attention(*plane_cache(POINTS), **PLANE).trace[0][0][0].d_scale
    # d_scale is on the edge, but the direction is clearly above: unstable either way.
    criterion = Stability(d_scale.item(), 1e-4, 1)
    result = reference.decode_attention(*plane_cache(POINTS), **PLANE, criterion=criterion)
    assert not reference.decision_margin(result, criterion, torch.float32).item()


def test_only_decisions_up_to_the_stop_count():
    points = [(1, 0), (1, 0), (0, 1)]
    d_scale = reference.decode_attention(*plane_cache(points), **PLANE).trace[0][0][1].d_scale
    on_the_edge = Stability(d_scale.item(), 1.0, 2)
    result = reference.decode_attention(*plane_cache(points), **PLANE, criterion=on_the_edge)
    assert reference.decision_margin(result, on_the_edge, torch.float32).item()
    stops_before = Stability(d_scale.item(), 1.0, 1)
    result = reference.decode_attention(*plane_cache(points), **PLANE, criterion=stops_before)
    assert result.stop_block.item() == 1
    assert not reference.decision_margin(result, stops_before, torch.float32).item()


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_zeros_and_nan_are_never_inside(value):
    points = [(value, value), (value, value), (1, 0), (1, 1)]
    criterion = Stability(0.01, 0.01, 3)
    result = reference.decode_attention(*plane_cache(points), **PLANE, criterion=criterion)
    assert result.stop_block.item() == -1
    assert not reference.decision_margin(result, criterion, torch.float32).item()


def test_without_criterion_nothing_is_inside():
    result = reference.decode_attention(*plane_cache(POINTS), **PLANE)
    assert not reference.decision_margin(result, None, torch.bfloat16).any()
