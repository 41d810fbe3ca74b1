"""Settings of bench_guided.py: which walk, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import walk_makers
from forcing import GROUP, UNIT, Rule, Step
from torch import Tensor
from walk_makers import (
    Maker,
    Walk,
    coded,
    exact_keys,
    guided,
    min_max,
    outliers,
    percentile,
    spread,
)

import art_torch
from art_torch import Stability
from art_torch.criterion import Criterion, rules_of

PACKAGE = "guided"  # the package's own codes and walk; all other orders are for comparison

# Orders of the comparison. The strings are orders of the operator itself. The presets were chosen
# with codes2, over the whole range of the keys; those of the package stand for its middle 7/8.
WALKS: dict[str, Maker | str] = {
    PACKAGE: PACKAGE,
    "codes2": guided("2 bits", coded(2, min_max())),
    "codes2_shrunk": guided("2 bits, shrunk", coded(2, min_max(0.8))),
    "coarse4": walk_makers.coarse("a quarter", 1 / 4),
    "coarse8": walk_makers.coarse("an eighth", 1 / 8),
    "codes4": guided("4 bits", coded(4, min_max())),
    "quest": walk_makers.quest(),
    "oracle": guided("exact", exact_keys),
    "sink_recent": "sink_recent",
    "recent_first": "recent_first",
    "oldest_first": "oldest_first",
}
# What else was tried, beside the package's walk. Keys are not centred: a group's grid has a zero of
# its own for each channel, so that would change nothing.
TRIED: dict[str, Maker] = {
    "percentile 3 %": guided("percentile", coded(2, percentile(0.03))),
    "1.5 deviations": guided("1.5 deviations", coded(2, spread(1.5))),
    "2 deviations": guided("2 deviations", coded(2, spread(2.0))),
    "3 bits for an eighth": guided("outliers", outliers(1 / 8)),
    "sum over heads": guided("7/8", coded(2, min_max(0.875)), combine="sum"),
    "mass x length of values": guided("7/8", coded(2, min_max(0.875)), by_values=True),
    "no sink pinned": guided("7/8", coded(2, min_max(0.875)), sink=0),
    "only the tail pinned": guided("7/8", coded(2, min_max(0.875)), pinned_groups=0),
    "4 groups pinned": guided("7/8", coded(2, min_max(0.875)), pinned_groups=4),
}


def matching(d_scale: float, patience: int) -> Stability:
    """Thresholds that allow the same change across the output as along it."""
    return Stability(d_scale, float(f"{d_scale**2 / 2:.3g}"), patience)


@dataclass(frozen=True)
class Setting:
    """A walk, and when it stops.

    Attributes:
        walk: Key of ``WALKS`` or ``TRIED``; None for exact attention.
        criterion: The rule, None for none.
    """

    walk: str | None = None
    criterion: Criterion | None = None

    @property
    def rule_name(self) -> str:
        stability, mass, all_agree = rules_of(self.criterion)
        parts = []
        if stability is not None:
            numbers = f"{stability.d_scale:g}, {stability.d_direction:g}, {stability.patience}"
            parts.append(f"({numbers})")
        if mass is not None:
            parts.append(f"mass {mass.eps:g}")
        return (" and " if all_agree else " or ").join(parts)

    @property
    def name(self) -> str:
        return "exact" if self.walk is None else f"{self.walk} {self.rule_name}"


def rule_of(setting: Setting) -> Rule:
    if setting.walk is None:
        return partial(_decode, criterion=None, walk="sink_recent")
    order, criterion = (WALKS | TRIED)[setting.walk], setting.criterion

    def run(step: Step) -> tuple[Tensor, Tensor]:
        if isinstance(order, str):
            codes = codes_of(step) if order == PACKAGE else {}
            return _decode(step, criterion=criterion, walk=order, **codes)
        walk = order(step)
        return _decode(
            step,
            criterion=criterion,
            walk=walk.units,
            walk_lens=walk.lens,
            num_pinned=walk.num_pinned,
            log_rest=None if rules_of(criterion).residual_mass is None else log_rest_of(walk),
        )

    return run


def codes_of(step: Step) -> dict[str, Tensor]:
    """Key codes of all complete groups; a row looks only at those that are complete for it."""
    num_kv_heads, tokens, head_dim = step.keys.shape
    groups = tokens // GROUP
    record = art_torch.key_code_bytes(head_dim)
    key_codes = torch.zeros(groups, num_kv_heads, record, dtype=torch.uint8)
    code_table = torch.arange(groups, dtype=torch.int32)[None]
    art_torch.encode_keys(
        step.keys.transpose(0, 1)[None],
        torch.zeros(1, 1, dtype=torch.int32),
        torch.tensor([tokens], dtype=torch.int32),
        key_codes,
        code_table,
    )
    return {"key_codes": key_codes, "code_table": code_table.expand(len(step.query), -1)}


def log_rest_of(walk: Walk) -> Tensor:
    """What the estimate says is left after each entry, ``[rows, num_q_heads, units]``."""
    assert walk.log_mass is not None
    order = walk.units.long()[:, :, None].expand_as(walk.log_mass)
    mass = walk.log_mass.gather(-1, order).flatten(1, 2)
    rest = mass.flip(-1).logcumsumexp(-1).flip(-1)  # the entry itself included
    return torch.nn.functional.pad(rest[..., 1:], (0, 1), value=-torch.inf)


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
