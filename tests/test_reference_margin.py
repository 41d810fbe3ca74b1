"""The band around a decision within which rounding may decide."""

import math

import pytest
import torch
from cases import PLANE, plane_cache

from art_torch import Stability, reference

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
