"""Orders of reading for the measurement of the guided walk, in vectorised PyTorch.

A maker turns a :class:`~forcing.Step` into a :class:`Walk`: pinned units first, then the others in
descending score. The score of a unit is its share of the softmax mass as estimated from what the
maker remembers of the keys, in logarithms, and the largest over the query heads of a KV head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from forcing import GROUP, UNIT, Step
from torch import Tensor

NEVER = -1e30


@dataclass
class Walk:
    units: Tensor  # int32 [rows, num_kv_heads, units]
    lens: Tensor  # int32 [rows, num_kv_heads]
    num_pinned: Tensor  # int32 [rows, num_kv_heads]
    log_mass: Tensor | None = None  # [rows, num_kv_heads, heads of a group, units], not normalised


Maker = Callable[[Step], Walk]
# Approximate keys [num_kv_heads, tokens, head_dim] from the keys of whole groups, same shape.
Estimator = Callable[[Tensor], Tensor]


# ---------------------------------------------------------------- what is remembered of the keys


def coded(bits: int, levels: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Estimator:
    """Codes of ``bits`` bits; ``levels`` gives the lowest and highest level per group and channel.

    ``levels`` takes ``[..., 64, head_dim]`` and returns two ``[..., 1, head_dim]``.
    """
    top = 2**bits - 1

    def estimate(keys: Tensor) -> Tensor:
        groups = keys.unflatten(1, (-1, GROUP))
        low, high = levels(groups)
        scale = ((high - low) / top).half().float()
        zero = low.half().float()
        codes = ((groups - zero) / scale.clamp(min=1e-8)).round().clamp(0, top)
        return (codes * scale + zero).flatten(1, 2)

    return estimate


def min_max(shrink: float = 1.0) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Levels from the smallest to the largest value, drawn towards their middle by ``shrink``."""

    def levels(groups: Tensor) -> tuple[Tensor, Tensor]:
        low, high = groups.amin(-2, True), groups.amax(-2, True)
        middle, half = (low + high) / 2, (high - low) / 2 * shrink
        return middle - half, middle + half

    return levels


def spread(factor: float) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Levels within ``factor`` standard deviations of the mean."""

    def levels(groups: Tensor) -> tuple[Tensor, Tensor]:
        mean, half = groups.mean(-2, True), groups.std(-2, keepdim=True, correction=0) * factor
        return mean - half, mean + half

    return levels


def percentile(share: float) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Levels between the values at ``share`` and ``1 - share``."""

    def levels(groups: Tensor) -> tuple[Tensor, Tensor]:
        ordered = groups.sort(-2).values
        at = round(share * (GROUP - 1))
        return ordered[..., at, None, :], ordered[..., GROUP - 1 - at, None, :]

    return levels


def outliers(share: float) -> Estimator:
    """Codes of 2 bits, and of 3 for the ``share`` of the channels that vary most in a group."""
    two, three = coded(2, min_max()), coded(3, min_max())

    def estimate(keys: Tensor) -> Tensor:
        groups = keys.unflatten(1, (-1, GROUP))
        widths = groups.amax(-2) - groups.amin(-2)
        widest = widths.topk(round(share * keys.shape[-1]), -1).indices
        is_outlier = torch.zeros_like(widths, dtype=torch.bool).scatter_(-1, widest, True)
        return torch.where(is_outlier.repeat_interleave(GROUP, 1), three(keys), two(keys))

    return estimate


def exact_keys(keys: Tensor) -> Tensor:
    return keys


# ---------------------------------------------------------------- from scores to a walk


def scaled_queries(step: Step) -> Tensor:
    """``[num_kv_heads, rows * heads of a group, head_dim]``, to be multiplied with keys."""
    rows, _, head_dim = step.query.shape
    query = step.query.view(rows, len(step.keys), -1, head_dim) * step.scale
    return query.permute(1, 0, 2, 3).flatten(1, 2)


def unit_log_mass(step: Step, approximate: Tensor) -> Tensor:
    """Log-sum-exp of approximate logits in every unit, ``[rows, Hkv, heads of a group, units]``."""
    rows, (num_kv_heads, tokens, _) = len(step.query), approximate.shape
    query = scaled_queries(step)
    logits = (query @ approximate.transpose(1, 2)).view(num_kv_heads, rows, -1, tokens)
    fresh = logits[..., step.present :]
    invisible = torch.arange(step.present, tokens)[None] >= step.seq_lens[:, None]
    fresh.masked_fill_(invisible[None, :, None], NEVER)
    if tokens % UNIT:
        logits = torch.nn.functional.pad(logits, (0, -tokens % UNIT), value=NEVER)
    units = logits.unflatten(-1, (-1, UNIT))
    largest = units.amax(-1, True)
    return ((units - largest).exp_().sum(-1).log_() + largest[..., 0]).permute(1, 0, 2, 3)


def log_length_of_values(step: Step) -> Tensor:
    """Of every unit, ``[num_kv_heads, units]``."""
    squares = step.values.square().sum(-1)
    padding = -squares.shape[1] % UNIT
    units = torch.nn.functional.pad(squares, (0, padding)).unflatten(1, (-1, UNIT))
    return units.mean(-1).clamp(min=1e-20).log() / 2


def pinned_units(step: Step, units: int, groups: int = 1, sink: int = GROUP) -> Tensor:
    """Which units are always read, bool ``[rows, units]``: first tokens, last groups, the tail."""
    index = torch.arange(units) * UNIT
    lens = step.seq_lens[:, None]
    tail = (lens // GROUP - groups) * GROUP
    return ((index < sink) | (index >= tail)) & (index < lens)


def by_score(step: Step, score: Tensor, pinned: Tensor) -> Walk:
    """The walk of ``score`` ``[rows, num_kv_heads, units]``: pinned units, then descending."""
    units = score.shape[-1]
    visible = torch.arange(units) * UNIT < step.seq_lens[:, None]
    rank = score.clamp(min=NEVER / 2).masked_fill(pinned[:, None], -NEVER)
    rank = rank.masked_fill(~visible[:, None], NEVER)
    order = torch.argsort(rank, dim=-1, descending=True, stable=True).to(torch.int32)
    heads = score.shape[1]
    lens = visible.sum(-1, dtype=torch.int32)[:, None].expand(-1, heads).contiguous()
    num_pinned = pinned.sum(-1, dtype=torch.int32)[:, None].expand(-1, heads).contiguous()
    return Walk(order, lens, num_pinned)


def guided(
    name: str,
    estimator: Estimator,
    combine: str = "max",
    pinned_groups: int = 1,
    sink: int = GROUP,
    by_values: bool = False,
) -> Maker:
    """The guided walk with keys as ``estimator`` remembers them, under ``name``.

    Args:
        name: Of what is remembered; makers with the same estimator may share it.
        estimator: What is remembered of the keys.
        combine: ``"max"`` or ``"sum"`` over the query heads of a KV head.
        pinned_groups: Groups of the newest tokens that are always read.
        sink: Tokens from the first on that are always read.
        by_values: Multiplies a unit's mass by the root mean square length of its values.
    """

    def make(step: Step) -> Walk:
        complete = step.present // GROUP * GROUP
        slot = (name, step.layer, complete)
        if slot not in step.memory:
            step.memory[slot] = estimator(step.keys[:, :complete])
        approximate = torch.cat((step.memory[slot], step.keys[:, complete:]), 1)
        mass = unit_log_mass(step, approximate)
        share = mass - mass.logsumexp(-1, True)
        score = share.amax(2) if combine == "max" else share.exp().sum(2).log()
        if by_values:
            score = score + log_length_of_values(step)
        pinned = pinned_units(step, mass.shape[-1], pinned_groups, sink)
        walk = by_score(step, score, pinned)
        walk.log_mass = mass
        return walk

    return make


def coarse(name: str, share: float, widths: float = 2.0) -> Maker:
    """The guided walk with 2-bit codes of a ``share`` of the groups, chosen by grids alone.

    A grid, a fifth of a group's record, says where its keys lie and how far they spread. A group is
    as good as a token ``widths`` standard deviations above its middle would be, if codes were
    equally likely. What is not chosen comes last.
    """
    levels = min_max()
    fine = guided("2 bits", coded(2, levels))

    def make(step: Step) -> Walk:
        complete = step.present // GROUP * GROUP
        slot = (name, step.layer, complete)
        if slot not in step.memory:
            low, high = levels(step.keys[:, :complete].unflatten(1, (-1, GROUP)))
            step.memory[slot] = ((low + high) / 2)[:, :, 0], ((high - low) / 3)[:, :, 0]
        middle, scale = step.memory[slot]
        walk = fine(step)
        assert walk.log_mass is not None
        rows, heads, _, units = walk.log_mass.shape
        query = scaled_queries(step)
        variance = query.square() @ (1.25 * scale.square()).transpose(1, 2)
        best = query @ middle.transpose(1, 2) + widths * variance.sqrt()
        best = best.view(heads, rows, -1, complete // GROUP).permute(1, 0, 2, 3)
        score = (best - best.logsumexp(-1, True)).amax(2)
        keep = score.topk(max(1, round(share * score.shape[-1])), -1).indices
        chosen = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, keep, True)
        chosen = chosen.repeat_interleave(GROUP // UNIT, -1)
        chosen = torch.nn.functional.pad(chosen, (0, units - chosen.shape[-1]), value=True)
        mass = walk.log_mass.masked_fill(~chosen[:, :, None], NEVER)
        share_of_units = (mass - mass.logsumexp(-1, True)).amax(2)
        return by_score(step, share_of_units, pinned_units(step, units))

    return make


def quest(name: str = "quest") -> Maker:
    """Upper bounds from the smallest and largest key per unit and channel (arXiv 2406.10774)."""

    def make(step: Step) -> Walk:
        rows, (num_kv_heads, tokens, _) = len(step.query), step.keys.shape
        complete = step.present // UNIT * UNIT
        slot = (name, step.layer, complete)
        if slot not in step.memory:
            units = step.keys[:, :complete].unflatten(1, (-1, UNIT))
            step.memory[slot] = units.amin(2), units.amax(2)
        low, high = step.memory[slot]
        query = scaled_queries(step)
        bound = query.clamp(min=0) @ high.transpose(1, 2) + query.clamp(max=0) @ low.transpose(1, 2)
        bound = bound.view(num_kv_heads, rows, -1, complete // UNIT).permute(1, 0, 2, 3)
        share = bound - bound.logsumexp(-1, True)
        units = -(-tokens // UNIT)
        # Units without bounds are pinned.
        score = torch.nn.functional.pad(share.amax(2), (0, units - complete // UNIT))
        return by_score(step, score, pinned_units(step, units))

    return make
