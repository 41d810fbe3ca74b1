"""The stopping rules and the margin of their decisions; re-exported by `art_torch.reference`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from art_torch._reference_checks import thresholds_of
from art_torch.criterion import rules_of

if TYPE_CHECKING:
    from art_torch.criterion import Criterion
    from art_torch.reference import ReferenceResult

MARGIN = 16.0  # k of the error band
PROBABILITY_ROUNDING = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


class BlockChange(NamedTuple):
    """What one block j >= 1 changed, for each of the G query heads of its group.

    All tensors are float64 `[G]`.

    Attributes:
        d_scale: `| |o_j| - |o_{j-1}| | / |o_{j-1}|`.
        d_direction: `1 - cos(o_j, o_{j-1})`.
        weight: w, the share of the block in the softmax denominator after it (sinks included), in
            [0, 1].
        spread: r, mean |v| over |o_{j-1}|, with the larger of the means of |v| over the block and
            over everything before it, both weighted by probability: how strongly the values cancel
            in the output. 0 while every value read before the block is exactly zero.
        max_logit: max |x| over all tokens read up to and including the block.
    """

    d_scale: Tensor
    d_direction: Tensor
    weight: Tensor
    spread: Tensor
    max_logit: Tensor


class BlockRest(NamedTuple):
    """What block j >= 0 left to read, for each of the G query heads of its group.

    All tensors are float64 `[G]`.

    Attributes:
        log_rest: log(R), R the sum of exp(logit) over the rest of the walk, as the caller gave it.
        log_read: log(T), T the softmax denominator of all that was read (sinks included).
        max_logit: max |x| over all tokens read up to and including the block.
    """

    log_rest: Tensor
    log_read: Tensor
    max_logit: Tensor


@dataclass(frozen=True)
class StoppingRules:
    """What one KV head stops by; None stands for a rule that there is not.

    Attributes:
        thresholds: (d_scale, d_direction, patience) of `Stability`.
        rest_limit: the largest log(R) - log(T) of `ResidualMass`: R / (T + R) <= eps just when
            R / T <= eps / (1 - eps). -inf when eps is 0.
        all_agree: both rules have to agree, else one is enough.
    """

    thresholds: Tensor | None
    rest_limit: float | None
    all_agree: bool

    def is_stable(self, change: BlockChange) -> bool:
        """Tell whether all heads of the group changed little enough."""
        assert self.thresholds is not None
        stable = change.d_scale <= self.thresholds[0]
        return bool((stable & (change.d_direction <= self.thresholds[1])).all())

    def is_covered(self, rest: BlockRest) -> bool:
        """Tell whether little enough is left for all heads. NaN, 0 / 0 and inf / inf never are."""
        assert self.rest_limit is not None
        covered = rest.log_rest - rest.log_read <= self.rest_limit
        return bool((covered & (rest.log_read < math.inf)).all())


class StopCounter:
    """Decides after each block, in order, whether to stop."""

    def __init__(self, rules: StoppingRules) -> None:
        self.rules = rules
        self.stable_blocks = 0

    def stops(self, stable: bool, covered: bool) -> bool:
        """Tell whether to stop after the next block. Block 0 and a rule that is not there: False.

        Without `all_agree` reading stops when the patience is completed the first time. With it the
        count goes on until the block is covered, too.
        """
        self.stable_blocks = self.stable_blocks + 1 if stable else 0
        thresholds = self.rules.thresholds
        settled = thresholds is not None and self.stable_blocks >= thresholds[2]
        return bool(settled and covered if self.rules.all_agree else settled or covered)


def stopping_rules(criterion: Criterion | None, num_kv_heads: int) -> list[StoppingRules]:
    """Return the rules of every KV head."""
    stability, residual_mass, all_agree = rules_of(criterion)
    limits = thresholds_of(stability, num_kv_heads)
    rest_limit = None
    if residual_mass is not None:
        eps = residual_mass.eps
        rest_limit = math.log(eps / (1 - eps)) if eps > 0 else -math.inf
    return [
        StoppingRules(None if limits is None else limits[h], rest_limit, all_agree)
        for h in range(num_kv_heads)
    ]


def output_change(previous: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    """Return (d_scale, d_direction), each `[G]`, between two outputs `[G, Dv]`.

    This is what `Stability` compares. Both are 0 when the outputs are equal, infinite when only the
    previous one is zero, and 1 when only the current one is zero. The half squared distance of the
    unit vectors is 1 - cos without its cancellation.
    """
    before, after = previous.norm(dim=-1), current.norm(dim=-1)
    d_scale = (after - before).abs() / before
    unit_before, unit_after = previous / before[:, None], current / after[:, None]
    d_direction = (unit_after - unit_before).square().sum(-1) / 2
    equal = (previous == current).all(-1)
    d_direction = d_direction.where(before != 0, math.inf).where(after != 0, 1.0)
    d_scale = d_scale.where(before != 0, math.inf)
    return d_scale.where(~equal, 0.0), d_direction.where(~equal, 0.0)


def decision_margin(
    result: ReferenceResult, criterion: Criterion | None, dtype: torch.dtype
) -> Tensor:
    """Tell for which heads rounding may have decided when to stop.

    A kernel works in float32 (and, for half types, with rounded probabilities), so its d_scale and
    d_direction lie in a band around those of float64. With eta = 2^-24 (1 + max |x|), plus 2^-9 for
    bfloat16 or 2^-12 for float16, the output after a block is uncertain by delta = eta w r + 2^-50,
    relative to |o_{j-1}|, and

        d_scale      lies within  k delta,
        d_direction  lies within  k (delta sqrt(2 d_direction) + delta^2
                                     + eta d_direction + eta d_scale^2),

    with k = 16 and x, w, r from `BlockChange`. (2^-50 stands for the rounding of float64 itself; it
    only matters for thresholds near 0.) Whether a block is stable is uncertain when moving both
    changes of every head of the group freely within their bands can turn it into an unstable one or
    back. So one head that is clearly unstable settles the block, whatever the other heads do.

    What `ResidualMass` compares, log(R) - log(T) with its limit, lies

        within  k 2^-24 (1 + max |x| + |log(T)| + |limit|)

    plus the 2^-9 or 2^-12 by which rounded probabilities change their sum at most. (No k there: it
    stands for errors that add up, and this one is a mean.) Log(R) is the caller's number, exact;
    if it is -inf, so is the comparison.

    A stop never comes later for a block that is stable or covered and was not. So a head is inside
    the margin when the stop with all uncertain blocks stable and covered is another one than with
    none of them.

    Args:
        result: what `decode_attention` returned.
        criterion: the criterion it was called with.
        dtype: dtype of the query and the caches.

    Returns:
        bool `[B, Hkv]`: True where uncertain decisions may move the stop. Where it is False, every
        kernel stops at `result.stop_block`; where it is True it may be right to stop elsewhere.
    """
    inside = torch.zeros(result.stop_block.shape, dtype=torch.bool)
    for h, rules in enumerate(stopping_rules(criterion, inside.shape[1])):
        for b in range(inside.shape[0]):
            changes = [] if rules.thresholds is None else result.trace[b][h]
            rests = [] if rules.rest_limit is None else result.rests[b][h]
            # Each verdict as (for certain, possibly). Block 0 changes nothing.
            stable = [(False, False), *(_is_stable(c, rules.thresholds, dtype) for c in changes)]
            covered = [_is_covered(rest, rules.rest_limit, dtype) for rest in rests]
            num_blocks = max(len(stable), len(covered))
            stable += [(False, False)] * (num_blocks - len(stable))
            covered += [(False, False)] * (num_blocks - len(covered))
            latest, earliest = (
                _first_stop(rules, [s[i] for s in stable], [c[i] for c in covered]) for i in (0, 1)
            )
            inside[b, h] = latest != earliest
    return inside


def _first_stop(rules: StoppingRules, stable: Sequence[bool], covered: Sequence[bool]) -> int:
    counter = StopCounter(rules)
    verdicts = (counter.stops(*verdict) for verdict in zip(stable, covered, strict=True))
    return next((j for j, stops in enumerate(verdicts) if stops), -1)


def _is_stable(change: BlockChange, limits: Tensor | None, dtype: torch.dtype) -> tuple[bool, bool]:
    """Tell whether a block is stable for certain, and whether possibly."""
    assert limits is not None
    eta = 2.0**-24 * (1.0 + change.max_logit) + PROBABILITY_ROUNDING.get(dtype, 0.0)
    scale, direction = change.d_scale, change.d_direction
    delta = eta * change.weight * change.spread + 2.0**-50
    scale_band = MARGIN * delta
    direction_band = MARGIN * (
        delta * (2.0 * direction).sqrt() + delta**2 + eta * direction + eta * scale**2
    )
    # Infinite as all values before the block are zero, or NaN: neither is a matter of rounding.
    exact = ~scale.isfinite() & (change.spread == 0) | scale.isnan()
    scale_band, direction_band = scale_band.where(~exact, 0.0), direction_band.where(~exact, 0.0)
    stable = (scale + scale_band <= limits[0]) & (direction + direction_band <= limits[1])
    unstable = (scale - scale_band > limits[0]) | (direction - direction_band > limits[1])
    unstable |= scale.isnan()
    return bool(stable.all()), not bool(unstable.any())


def _is_covered(rest: BlockRest, rest_limit: float | None, dtype: torch.dtype) -> tuple[bool, bool]:
    """Tell whether a block is covered for certain, and whether possibly."""
    assert rest_limit is not None
    size = 1.0 + rest.max_logit + rest.log_read.abs()
    size = size + (abs(rest_limit) if math.isfinite(rest_limit) else 0.0)
    band = MARGIN * 2.0**-24 * size + PROBABILITY_ROUNDING.get(dtype, 0.0)
    # NaN is never covered; an infinite band belongs to a comparison with nothing or everything.
    ratio = (rest.log_rest - rest.log_read).where(rest.log_read < math.inf, math.nan)
    covered, possibly = ratio + band <= rest_limit, ratio - band <= rest_limit
    return bool(covered.all()), bool(possibly.all())
