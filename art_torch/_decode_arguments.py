"""From the arguments of `art_torch.decode_attention` to those of the operator."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from art_torch._operators import as_float32
from art_torch._reference_checks import WALKS
from art_torch.criterion import Criterion, Rules, rules_of
from art_torch.guided import UNIT_TOKENS

# Bits of the operator's argument `criterion`.
_STABILITY, _RESIDUAL_MASS, _ALL_AGREE = 1, 2, 8


def guided_codes(
    key_codes: Tensor | None,
    code_table: Tensor | None,
    walk_lens: Tensor | None,
    num_pinned: int | Tensor | None,
    log_rest: Tensor | None,
    unit_size: int,
) -> tuple[Tensor, Tensor]:
    """Returns the codes that ``walk="guided"`` needs; refuses what it brings itself."""
    if key_codes is None or code_table is None:
        missing = "key_codes" if key_codes is None else "code_table"
        raise ValueError(
            f'decode_attention: walk="guided" needs key_codes and code_table, got no {missing}; '
            "art_torch.encode_keys writes the codes of a cache"
        )
    if unit_size != UNIT_TOKENS:
        raise ValueError(
            f'decode_attention: unit_size must be {UNIT_TOKENS} with walk="guided", got {unit_size}'
        )
    own = {"walk_lens": walk_lens, "num_pinned": num_pinned, "log_rest": log_rest}
    for name, given in own.items():
        if given is not None:
            raise ValueError(
                f'decode_attention: {name} must not be given with walk="guided", '
                f"which brings its own, got {given}"
            )
    return key_codes, code_table


def checked_rules(criterion: Criterion | None) -> Rules:
    """Takes a criterion apart."""
    try:
        return rules_of(criterion)
    except TypeError as error:
        raise TypeError(f"decode_attention: {error}") from None


def criterion_arguments(rules: Rules, key_cache: Tensor) -> dict[str, Any]:
    """Returns the arguments that say when to stop."""
    stability, residual_mass, all_agree = rules
    arguments: dict[str, Any] = {"criterion": _ALL_AGREE if all_agree else 0}
    if residual_mass is not None:
        arguments["criterion"] |= _RESIDUAL_MASS
        arguments["residual_mass"] = float(residual_mass.eps)
    if stability is None:
        return arguments
    arguments["criterion"] |= _STABILITY
    arguments["patience"] = stability.patience
    if stability.per_head:
        num_kv_heads = key_cache.shape[2] if key_cache.dim() == 4 else 0
        arguments["thresholds"] = stability.thresholds(num_kv_heads, key_cache.device)
    else:
        arguments["d_scale"] = stability.d_scale
        arguments["d_direction"] = stability.d_direction
    return arguments


def rest_arguments(rules: Rules, walk: str | Tensor, log_rest: Tensor | None) -> dict[str, Any]:
    """Returns the argument that says what is left, where a rule asks for it and only there."""
    if rules.residual_mass is None:
        if log_rest is not None:
            raise ValueError(
                "decode_attention: log_rest must only be given with a criterion that uses it, "
                "ResidualMass"
            )
        return {}
    if isinstance(walk, str):
        raise ValueError(
            'decode_attention: ResidualMass needs to know what is left: use walk="guided", or an '
            f"explicit walk with log_rest, got walk={walk!r}"
        )
    if not isinstance(log_rest, Tensor):
        raise ValueError(
            "decode_attention: ResidualMass with an explicit walk needs log_rest, "
            f"got {type(log_rest).__name__}"
        )
    return {"log_rest": as_float32(log_rest)}


def walk_arguments(
    walk: str | Tensor, num_pinned: int | Tensor | None, is_guided: bool = False
) -> dict[str, Any]:
    """Returns the arguments that say what is read, and what before any decision.

    ``is_guided``: ``guided_walk`` made this walk for this very call, so all of it is visible.
    """
    arguments: dict[str, Any] = {"walk_order": "guided"} if is_guided else {}
    if isinstance(walk, Tensor):
        arguments["walk"] = walk
    elif isinstance(walk, str):
        if walk not in WALKS:
            names = ", ".join(map(repr, (*WALKS, "guided")))
            raise ValueError(
                f"decode_attention: walk must be {names}, or int32 unit numbers, got {walk!r}"
            )
        arguments["walk_order"] = walk
    else:
        raise TypeError(
            f"decode_attention: walk must be a name or an int32 tensor, got {type(walk).__name__}"
        )
    if isinstance(num_pinned, Tensor):
        arguments["num_pinned_per_head"] = num_pinned
    elif num_pinned is not None:
        arguments["num_pinned"] = num_pinned
    return arguments
