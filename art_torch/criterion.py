"""When to stop reading the KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stability:
    """Stops once the attention output has stayed nearly the same for a few blocks.

    The rule of Attention Run-time Termination (arXiv 2606.00024). After each block of the walk the
    normalised output ``o_j`` is compared with ``o_{j-1}``; the block is stable when both
    ``| |o_j| - |o_{j-1}| | / |o_{j-1}| <= d_scale`` and ``1 - cos(o_j, o_{j-1}) <= d_direction``
    hold for every query head that shares the KV head. Reading stops after the block that completes
    ``patience`` stable blocks in a row.

    Args:
        d_scale: Largest relative change of the output's length: a number, or a tensor
            ``[num_kv_heads]`` with one threshold per KV head. Smaller reads more.
        d_direction: Largest value of one minus the cosine: a number, or a tensor
            ``[num_kv_heads]``. ``d_scale ** 2 / 2`` is the threshold that matches ``d_scale``.
        patience: Number of consecutive stable blocks, at least 1.

    Raises:
        ValueError: A threshold is negative or NaN, a tensor has the wrong rank, or ``patience`` is
            below 1.
        TypeError: An argument is of another type.
    """

    d_scale: float | Tensor = 0.03
    d_direction: float | Tensor = 4.5e-4
    patience: int = 2

    def __post_init__(self) -> None:
        for name in ("d_scale", "d_direction"):
            _check_threshold(name, getattr(self, name))
        if not isinstance(self.patience, int) or isinstance(self.patience, bool):
            raise TypeError(f"patience must be an int, got {type(self.patience).__name__}")
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1, got {self.patience}")

    @classmethod
    def paper(cls) -> Stability:
        """The settings reported for the paper: (1e-7, 1e-3, 5)."""
        return cls(d_scale=1e-7, d_direction=1e-3, patience=5)

    @property
    def per_head(self) -> bool:
        """Whether any threshold is a tensor."""
        return isinstance(self.d_scale, Tensor) or isinstance(self.d_direction, Tensor)

    def thresholds(self, num_kv_heads: int, device: torch.device) -> Tensor:
        """Both thresholds as one float32 tensor ``[num_kv_heads, 2]`` on ``device``."""
        columns = []
        for name in ("d_scale", "d_direction"):
            value = torch.as_tensor(getattr(self, name), dtype=torch.float32, device=device)
            if value.dim() == 1 and value.shape[0] != num_kv_heads:
                raise ValueError(
                    f"{name} must have one threshold per KV head, [{num_kv_heads}], "
                    f"got {list(value.shape)}"
                )
            columns.append(value.expand(num_kv_heads))
        return torch.stack(columns, dim=1)

    def __or__(self, other: ResidualMass) -> CombinedCriterion:
        if not isinstance(other, ResidualMass):
            return NotImplemented
        return CombinedCriterion(self, other, all_agree=False)

    def __and__(self, other: ResidualMass) -> CombinedCriterion:
        if not isinstance(other, ResidualMass):
            return NotImplemented
        return CombinedCriterion(self, other, all_agree=True)


@dataclass(frozen=True)
class ResidualMass:
    """Stops once little of the softmax mass is left to read.

    After each block of a walk, with T the softmax denominator of what was read (attention sinks
    included) and R that of the rest of the walk, the block is *covered* when ``R / (T + R) <= eps``
    for every query head that shares the KV head. Reading stops after the first block that is
    covered, which may be the starting output. T is exact; log(R) comes with the walk: the guided
    walk estimates it from key codes, and any explicit walk may bring its own (``log_rest`` of
    :func:`~art_torch.decode_attention`). Were R exact, at most the share ``eps`` would be missing.

    ``Stability(...) | ResidualMass(...)`` stops when either rule does, and
    ``Stability(...) & ResidualMass(...)`` when both do, see :class:`CombinedCriterion`.

    Args:
        eps: Largest share of the softmax mass that may be left, at least 0 and less than 1. With 0
            reading stops where nothing is left: mostly after the last block.

    Raises:
        ValueError: ``eps`` is out of range or NaN.
        TypeError: ``eps`` is no number.
    """

    eps: float = 0.05

    def __post_init__(self) -> None:
        if isinstance(self.eps, bool) or not isinstance(self.eps, (int, float)):
            raise TypeError(f"eps must be a number, got {type(self.eps).__name__}")
        if not 0 <= self.eps < 1:
            raise ValueError(f"eps must be at least 0 and less than 1, got {self.eps}")

    def __or__(self, other: Stability) -> CombinedCriterion:
        if not isinstance(other, Stability):
            return NotImplemented
        return CombinedCriterion(other, self, all_agree=False)

    def __and__(self, other: Stability) -> CombinedCriterion:
        if not isinstance(other, Stability):
            return NotImplemented
        return CombinedCriterion(other, self, all_agree=True)


@dataclass(frozen=True)
class CombinedCriterion:
    """Two rules: what ``|`` and ``&`` make of a :class:`Stability` and a :class:`ResidualMass`.

    ``|`` stops after the first block that completes the patience or is covered. ``&`` stops after
    the first block j >= 1 that ends at least ``patience`` stable blocks in a row and is covered;
    stable blocks count on while too much is left to read.

    Args:
        stability: One rule.
        residual_mass: The other.
        all_agree: Whether both have to agree (``&``), or one is enough (``|``).

    Raises:
        TypeError: An argument is of another type.
    """

    stability: Stability
    residual_mass: ResidualMass
    all_agree: bool = False

    def __post_init__(self) -> None:
        for name, kind in (
            ("stability", Stability), ("residual_mass", ResidualMass), ("all_agree", bool),
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")


Criterion: TypeAlias = "Stability | ResidualMass | CombinedCriterion"


class Rules(NamedTuple):
    """A criterion taken apart; None where it has no such rule."""

    stability: Stability | None
    residual_mass: ResidualMass | None
    all_agree: bool


def rules_of(criterion: Criterion | None) -> Rules:
    """Takes a criterion apart.

    Raises:
        TypeError: It is none.
    """
    if isinstance(criterion, CombinedCriterion):
        return Rules(criterion.stability, criterion.residual_mass, criterion.all_agree)
    if criterion is None or isinstance(criterion, Stability):
        return Rules(criterion, None, False)
    if isinstance(criterion, ResidualMass):
        return Rules(None, criterion, False)
    raise TypeError(
        "criterion must be a Stability, a ResidualMass, both of them joined by | or &, or None, "
        f"got {type(criterion).__name__}"
    )


def _check_threshold(name: str, value: float | Tensor) -> None:
    if isinstance(value, Tensor):
        if value.dim() != 1:
            raise ValueError(
                f"{name} must be a number or a tensor [num_kv_heads], got shape {list(value.shape)}"
            )
        # Looking at the values would wait for the device; a CPU tensor is checked at once.
        if value.device.type == "cpu" and not bool((value >= 0).all()):
            raise ValueError(f"{name} must not be negative or NaN, got {value.tolist()}")
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
    if not value >= 0:
        raise ValueError(f"{name} must not be negative or NaN, got {value}")


# Rules for the guided walk by name, for the block size of `art_torch.patch`. They were chosen to
# keep the mean KL divergence from exact attention near .003, .01 and .03 on three texts of 4k and
# 8k tokens, with codes over the whole range of the keys (`codes2` of benchmarks/guided_rules.py);
# benchmarks/bench_guided.py measures what they read and lose on other texts as the package is now.
PRESETS: Mapping[str, Stability] = MappingProxyType(
    {
        "quality": Stability(d_scale=0.01, d_direction=5e-5, patience=2),
        "balanced": Stability(d_scale=0.03, d_direction=4.5e-4, patience=2),
        "fast": Stability(d_scale=0.09, d_direction=0.00405, patience=2),
    }
)
