"""How much of the softmax mass a decode step has read: measured, and as key codes estimate it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from art_torch.guided import GUIDED_TENSORS, LOGIT_ARGUMENTS, UNIT_TOKENS, guided_walk
from art_torch.ops import DecodeResult, decode_attention

__all__ = ["MassRead", "MassSums", "mass_read"]


class MassRead(NamedTuple):
    """Shares of the softmax mass that was read, of some layers.

    Attributes:
        true: float64 ``[layers]``, mean over steps, rows and query heads.
        lowest: float64 ``[layers]``, of the query head and step that missed most.
        estimated: float64 ``[layers]``, mean over the guided steps, rows and KV heads of what the
            key codes say: the sum of ``exp(log_mass)`` over the units read, divided by that over
            all units. NaN where no step was guided. A step counts for those ranks that were guided.
    """

    true: Tensor
    lowest: Tensor
    estimated: Tensor


class MassSums:
    """Sums of one layer, as tensors, so that counting waits for no device."""

    def __init__(self) -> None:
        self.true: list[Tensor] = []
        self.lowest: list[Tensor] = []
        self.estimated: list[Tensor] = []

    def add(self, true: Tensor, estimated: Tensor | None) -> None:
        """Adds a step: shares ``[rows, num_q_heads]`` and ``[rows, num_kv_heads]``."""
        true = true.double()
        self.true.append(true.mean())
        self.lowest.append(true.min())
        # A step that was not guided is kept as NaN: of several ranks, some may guide it.
        nothing = true.new_full((), torch.nan)
        self.estimated.append(nothing if estimated is None else estimated.double().mean())

    def per_step(self) -> tuple[Tensor, Tensor, Tensor]:
        """True, lowest and estimated share of each step, float64 ``[steps]`` on the CPU.

        The estimate of a step that was not guided is NaN.
        """
        nothing = torch.empty(0, dtype=torch.float64)
        parts = (self.true, self.lowest, self.estimated)
        true, lowest, estimated = (torch.stack(p).cpu() if p else nothing for p in parts)
        return true, lowest, estimated

    @classmethod
    def of_steps(cls, true: Tensor, lowest: Tensor, estimated: Tensor) -> MassSums:
        """Sums with what :meth:`per_step` gives."""
        sums = cls()
        sums.true, sums.lowest, sums.estimated = list(true), list(lowest), list(estimated)
        return sums

    def means(self) -> tuple[float, float, float]:
        """The numbers of :class:`MassRead`."""
        true, lowest = torch.stack(self.true).mean(), torch.stack(self.lowest).min()
        return float(true), float(lowest), float(torch.stack(self.estimated).nanmean())


def mass_read(arguments: dict[str, Any], result: DecodeResult) -> tuple[Tensor, Tensor | None]:
    """Measures one call of :func:`art_torch.decode_attention` by reading everything once more.

    Args:
        arguments: Its arguments by name, those of logits and caches at least.
        result: What it returned.

    Returns:
        True share of the softmax mass of all visible tokens that was read, float32
        ``[batch, num_q_heads]``; and for a guided walk the estimated share, float32
        ``[batch, num_kv_heads]``, else None. Attention sinks are left out. Rows without a visible
        token count as read.
    """
    everything = dict(arguments, criterion=None, walk="oldest_first", num_pinned=None)
    for name in ("key_codes", "code_table"):
        everything.pop(name, None)
    total = decode_attention(**everything).lse
    true = (result.lse - total).exp().masked_fill(total == -torch.inf, 1.0)
    if not (isinstance(arguments["walk"], str) and arguments["walk"] == "guided"):
        return true, None
    logits = {name: arguments[name] for name in LOGIT_ARGUMENTS if name in arguments}
    guided = guided_walk(*(arguments[name] for name in GUIDED_TENSORS), **logits)
    tokens = result.tokens_read.to(torch.int64)
    if (starts := arguments.get("seq_starts")) is not None:
        # The first unit is pinned, and may have fewer visible tokens; so may the last one.
        tokens = tokens + (starts % UNIT_TOKENS)[:, None]
    units = torch.div(tokens + UNIT_TOKENS - 1, UNIT_TOKENS, rounding_mode="floor")
    # Log masses are largest over the query heads, so they add up to more than 1.
    sums = guided.log_mass.exp().cumsum(-1)
    estimated = sums.gather(-1, (units - 1).clamp(min=0)[..., None])[..., 0] / sums[..., -1]
    return true, estimated.masked_fill(result.tokens_read == 0, 1.0)
