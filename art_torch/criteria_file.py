"""Criteria of single layers in a JSON file, for ``patch(..., per_layer=...)``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from art_torch.criterion import (
    PRESETS,
    CombinedCriterion,
    Criterion,
    ResidualMass,
    Stability,
    rules_of,
)

__all__ = ["load_criteria", "save_criteria"]

_FORMAT, _VERSION = "art_torch.criteria", 1
_RULES: dict[str, type] = {"stability": Stability, "residual_mass": ResidualMass}


def save_criteria(
    criteria: Mapping[int, Criterion | str | None], path: str | PathLike[str]
) -> None:
    """Writes criteria of single layers to a JSON file; docs/safety.md shows one.

    Thresholds per KV head are stored as lists, with the precision of float32.

    Args:
        criteria: By layer: a criterion, the name of a preset, or None for exact attention.
        path: The file; one that is there is replaced.

    Raises:
        TypeError: A layer is no int, or a criterion is none.
        ValueError: A layer is negative, there is no preset of that name, or a threshold is
            infinite, which JSON cannot say.
    """
    layers = {}
    for layer, criterion in criteria.items():
        if not isinstance(layer, int) or isinstance(layer, bool):
            raise TypeError(f"a layer must be an int, got {layer!r}")
        if layer < 0:
            raise ValueError(f"a layer must not be negative, got {layer}")
        layers[layer] = _to_json(f"layer {layer}", criterion)
    content = {"format": _FORMAT, "version": _VERSION, "layers": dict(sorted(layers.items()))}
    Path(path).write_text(json.dumps(content, indent=2) + "\n")


def load_criteria(path: str | PathLike[str]) -> dict[int, Criterion | str | None]:
    """Reads a file of :func:`save_criteria`, for ``patch(..., per_layer=load_criteria(path))``.

    Args:
        path: The file.

    Returns:
        By layer: a criterion, the name of a preset, or None for exact attention. Thresholds per KV
        head are float32 ``[num_kv_heads]``.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not of this format or version, or something in it is missing, unknown or
            out of range; the message names the file and the layer.
    """
    try:
        text = Path(path).read_text()
        content = json.loads(
            text, object_pairs_hook=_without_doubles, parse_constant=_no_json, parse_float=_finite
        )
        return _from_json(content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is there twice")
        found[name] = value
    return found


def _no_json(text: str) -> float:
    raise ValueError(f"numbers must be finite, got {text}")


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _no_json(text)


def _from_json(content: Any) -> dict[int, Criterion | str | None]:
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f'this is no file of criteria: it needs "format": "{_FORMAT}"')
    version = content.get("version")
    if isinstance(version, bool) or version != _VERSION:  # True == 1
        raise ValueError(f"version must be {_VERSION}, got {version!r}")
    _check_names("the file", content, {"format", "version", "layers"})
    if not isinstance(content.get("layers"), dict):
        raise ValueError('"layers" must be an object with a criterion for each layer')
    criteria = {}
    for name, value in content["layers"].items():
        if not name.isdecimal() or name != str(int(name)):
            raise ValueError(f"a layer must be a number from 0 on, got {name!r}")
        try:
            criteria[int(name)] = _criterion_of(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"layer {name}: {error}") from None
    return criteria


def _criterion_of(value: Any) -> Criterion | str | None:
    if value is None:
        return None
    if isinstance(value, str):
        return _preset(value)
    if not isinstance(value, dict) or not set(value) & set(_RULES):
        raise ValueError(
            f"a criterion must be null, the name of a preset, or have {' or '.join(_RULES)}, "
            f"got {value!r}"
        )
    both = set(value) >= set(_RULES)
    _check_names("a criterion", value, {*_RULES, "all_agree"} if both else set(_RULES))
    rules = {name: _rule_of(name, value[name]) for name in _RULES if name in value}
    if not both:
        return next(iter(rules.values()))  # type: ignore[no-any-return]
    if "all_agree" not in value:
        raise ValueError("two rules need all_agree: true (&) or false (|)")
    return CombinedCriterion(**rules, all_agree=value["all_agree"])


def _rule_of(name: str, value: Any) -> Any:
    names = {field.name for field in fields(_RULES[name])}
    if not isinstance(value, dict) or set(value) != names:
        got = sorted(value) if isinstance(value, dict) else repr(value)
        raise ValueError(f"{name} needs {', '.join(sorted(names))}, got {got}")
    return _RULES[name](**{field: _number(field, given) for field, given in value.items()})


def _number(name: str, value: Any) -> Any:
    if not isinstance(value, list):
        return value
    if not value:
        raise ValueError(f"{name} must be a number or a list of numbers, got an empty list")
    for entry in value:
        if isinstance(entry, bool) or not isinstance(entry, (int, float)):
            raise ValueError(f"{name} must be a number or a list of numbers, got {value}")
    thresholds = torch.tensor(value, dtype=torch.float32)
    if not thresholds.isfinite().all():
        raise ValueError(f"{name} must be numbers of float32, got {value}")
    return thresholds


def _to_json(name: str, criterion: Criterion | str | None) -> Any:
    if isinstance(criterion, str):
        return _preset(criterion)
    try:
        rules = rules_of(criterion)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None
    found: dict[str, Any] = {
        rule: {field.name: _plain(name, field.name, given) for field in fields(given)}
        for rule, given in zip(_RULES, rules[:2], strict=True)
        if given is not None
    }
    if len(found) == 2:
        found["all_agree"] = rules.all_agree
    return found or None


def _plain(layer: str, name: str, rule: Any) -> Any:
    value = getattr(rule, name)
    plain = value.float().tolist() if isinstance(value, Tensor) else value
    if not all(map(math.isfinite, plain if isinstance(plain, list) else [plain])):
        raise ValueError(f"{layer}: {name} must be finite to be saved, got {plain}")
    return plain


def _preset(name: str) -> str:
    if name not in PRESETS:
        raise ValueError(f"a preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return name


def _check_names(what: str, value: dict[str, Any], known: set[str]) -> None:
    if unknown := sorted(set(value) - known):
        raise ValueError(f"{what} has {unknown}, and may have {sorted(known)} only")
