"""Which walk a decode step of one layer takes, and by which rule it stops."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from art_torch.criterion import rules_of
from art_torch.guided import GROUP_TOKENS, UNIT_TOKENS

if TYPE_CHECKING:
    from art_torch.integrations.transformers.attention import LayerSettings
    from art_torch.integrations.transformers.layer import ARTLayer

__all__ = ["plan_dense", "plan_paged"]

logger = logging.getLogger("art_torch")

# In fewer tokens than these the guided walk pins every unit: the first four, the last complete
# group and what follows it. Pinned units come in ascending order, so this walk has the same bits.
_PINNED_TOKENS = 3 * GROUP_TOKENS
_ALL_PINNED = {"walk": "oldest_first", "num_pinned": _PINNED_TOKENS // UNIT_TOKENS}

# A window is small, and loses the start of its groups: codes for it do not pay.
_WINDOW_NOTE = "walk 'guided': layers with a sliding window read all of their window"


def plan_paged(settings: LayerSettings, layer: ARTLayer) -> dict[str, Any]:
    """The step of a layer on an ``ARTCache``.

    Args:
        settings: Of the layer.
        layer: Its cache, with the new tokens in it.

    Returns:
        Arguments of :func:`art_torch.decode_attention`: criterion, walk and sizes.
    """
    plan = dict(settings.options, criterion=settings.criterion)
    if not settings.guided:
        return plan
    if layer.is_sliding:
        _note_windows(settings)
        return plan | {"criterion": None, "walk": "sink_recent"}
    if not layer.table.static_len and layer.table.longest < _PINNED_TOKENS:
        # Nobody estimates what is left of this walk: ResidualMass has nothing to go by, or to do.
        return plan | _ALL_PINNED | {"criterion": rules_of(settings.criterion).stability}
    return plan | layer.guided_arguments()


def plan_dense(settings: LayerSettings) -> dict[str, Any]:
    """The step of a layer on any other cache.

    Raises:
        RuntimeError: The guided walk is asked for.
    """
    if settings.guided:
        # Its keys are new tensors at every step: nothing tells whether codes still belong to them.
        raise RuntimeError(
            'walk="guided" needs the codes of an ARTCache: pass '
            "past_key_values=art_torch.ARTCache(model.config), or choose another walk"
        )
    return dict(settings.options, criterion=settings.criterion)


def _note_windows(settings: LayerSettings) -> None:
    if torch.compiler.is_compiling() or _WINDOW_NOTE in settings.noted:
        return
    settings.noted.add(_WINDOW_NOTE)
    logger.warning(_WINDOW_NOTE)
