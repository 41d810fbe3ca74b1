"""Attention Run-time Termination: decode attention that stops reading once its output settles."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from art_torch import reference
from art_torch._info import info
from art_torch.criteria_file import load_criteria, save_criteria
from art_torch.criterion import PRESETS, CombinedCriterion, ResidualMass, Stability
from art_torch.guided import (
    KEY_CODES_VERSION,
    GuidedWalk,
    encode_keys,
    guided_walk,
    key_code_bytes,
)
from art_torch.ops import DecodeResult, append_kv, decode_attention

if TYPE_CHECKING:
    from art_torch.integrations.transformers import ARTCache, GraphedDecoder
    from art_torch.patching import patch

__version__ = "0.1.0"

__all__ = [
    "KEY_CODES_VERSION",
    "PRESETS",
    "ARTCache",
    "CombinedCriterion",
    "DecodeResult",
    "GraphedDecoder",
    "GuidedWalk",
    "ResidualMass",
    "Stability",
    "append_kv",
    "decode_attention",
    "encode_keys",
    "guided_walk",
    "info",
    "key_code_bytes",
    "load_criteria",
    "patch",
    "reference",
    "save_criteria",
]

# transformers is imported only when one of these is used.
_LAZY = {
    "ARTCache": "art_torch.integrations.transformers",
    "GraphedDecoder": "art_torch.integrations.transformers",
    "patch": "art_torch.patching",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
