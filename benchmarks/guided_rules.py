"""Settings of bench_guided.py: which walk, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import walk_makers
from forcing import GROUP, UNIT, Rule, Step
from torch import Tensor
from walk_makers import Maker, Walk, coded, exact_keys, guided, min_max

import art_torch
from art_torch import Stability

BLOCK = GROUP // UNIT  # units

# Orders of the comparison. The strings are orders of the operator itself.
WALKS: dict[str, Maker | str] = {
    "guided": guided("2 bits", coded(2, min_max())),
    "guided_shrunk": guided("2 bits, shrunk", coded(2, min_max(0.8))),
    "codes4": guided("4 bits", coded(4, min_max())),
    "quest": walk_makers.quest(),
    "oracle": guided("exact", exact_keys),
    "sink_recent": "sink_recent",
    "recent_first": "recent_first",
}


def matching(d_scale: float, patience: int) -> Stability:
    """Thresholds that allow the same change across the output as along it."""
    return Stability(d_scale, float(f"{d_scale**2 / 2:.3g}"), patience)


@dataclass(frozen=True)
class Setting:
    """A walk, and when it stops.

    Attributes:
        walk: Key of ``WALKS``; None for exact attention.
        criterion: The rule on the output's changes, None for none.
        mass: Stop when the estimated share of the softmax mass not yet read is at most this for
            every head, None for no such rule.
        join: With both: "and" where both must say so, "or" where one is enough.
        corrected: Whether the mass that was read is known exactly, and only the rest estimated.
    """

    walk: str | None = None
    criterion: Stability | None = None
    mass: float | None = None
    join: str = "and"
    corrected: bool = True

    @property
    def rule_name(self) -> str:
        parts = []
        if (rule := self.criterion) is not None:
            parts.append(f"({rule.d_scale:g}, {rule.d_direction:g}, {rule.patience})")
        if self.mass is not None:
            parts.append(f"mass {self.mass:g}{'' if self.corrected else ' estimated'}")
        return f" {self.join} ".join(parts)

    @property
    def name(self) -> str:
        return "exact" if self.walk is None else f"{self.walk} {self.rule_name}"


def rule_of(setting: Setting) -> Rule:
    if setting.walk is None:
        return partial(_decode, criterion=None, walk="sink_recent")
    order = WALKS[setting.walk]
    if isinstance(order, str):
        return partial(_decode, criterion=setting.criterion, walk=order)

    def run(step: Step) -> tuple[Tensor, Tensor]:
        walk = order(step)
        if setting.mass is not None:
            blocks = _blocks_for_mass(step, walk, setting.mass, setting.corrected)
            walk = _with_mass_rule(walk, blocks, setting)
        return _decode(
            step,
            criterion=setting.criterion,
            walk=walk.units,
            walk_lens=walk.lens,
            num_pinned=walk.num_pinned,
        )

    return run


def _decode(step: Step, **arguments: object) -> tuple[Tensor, Tensor]:
    """The operator on a cache that is one page, the same for every row."""
    result = art_torch.decode_attention(
        step.query,
        step.keys.transpose(0, 1)[None],
        step.values.transpose(0, 1)[None],
        torch.zeros(len(step.query), 1, dtype=torch.int32),
        step.seq_lens,
        scale=step.scale,
        block_size=GROUP,
        unit_size=UNIT,
        **arguments,  # type: ignore[arg-type]
    )
    return result.out, result.tokens_read


def _blocks_for_mass(step: Step, walk: Walk, eps: float, corrected: bool) -> Tensor:
    """Blocks after which at most ``eps`` of the mass is missing, ``[rows, num_kv_heads]``."""
    assert walk.log_mass is not None
    order = walk.units.long()[:, :, None].expand_as(walk.log_mass)
    estimate = walk.log_mass.gather(-1, order)
    read = walk_makers.unit_log_mass(step, step.keys).gather(-1, order) if corrected else estimate
    largest = torch.maximum(estimate.amax(-1, True), read.amax(-1, True))
    estimate, read = (estimate - largest).exp(), (read - largest).exp()
    after = estimate.flip(-1).cumsum(-1).flip(-1) - estimate  # of the units behind this one
    enough = (after <= eps * (read.cumsum(-1) + after)).all(2)
    index = torch.arange(enough.shape[-1])
    # Only the last unit of the pinned ones, or of a block, can be the last that is read.
    places = (index + 1 - walk.num_pinned[..., None]) % BLOCK == 0
    enough &= places & (index + 1 >= walk.num_pinned[..., None])
    first = torch.where(enough, index, enough.shape[-1]).amin(-1)
    return (first + 1 - walk.num_pinned).clamp(min=0).div(BLOCK, rounding_mode="floor").int()


def _with_mass_rule(walk: Walk, blocks: Tensor, setting: Setting) -> Walk:
    last = walk.num_pinned + blocks * BLOCK
    if setting.criterion is None or setting.join == "or":
        return Walk(walk.units, torch.minimum(walk.lens, last), walk.num_pinned)
    # What is read before the changes begin to count makes both rules agree at the same block: the
    # changes of the last `patience` blocks up to the one where the mass suffices count.
    uncounted = (blocks - setting.criterion.patience).clamp(min=0) * BLOCK
    return Walk(walk.units, walk.lens, walk.num_pinned + uncounted)
