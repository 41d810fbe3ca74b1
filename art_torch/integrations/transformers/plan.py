"""Which walk a decode step of one layer takes, and by which rule it stops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from art_torch.criterion import rules_of
from art_torch.guided import (
    GROUP_TOKENS,
    GUIDED_TENSORS,
    LOGIT_ARGUMENTS,
    UNIT_TOKENS,
    guided_walk,
)
from art_torch.reference import default_pinned

if TYPE_CHECKING:
    from art_torch.integrations.transformers.attention import LayerSettings
    from art_torch.integrations.transformers.layer import ARTLayer

__all__ = [
    "READ_ALL",
    "least_guided_bytes",
    "note_unguided",
    "pin_all_where",
    "plan_dense",
    "plan_paged",
]

READ_ALL: dict[str, Any] = {"criterion": None, "walk": "sink_recent"}

# In fewer tokens than these the guided walk pins every unit: the first four, the last complete
# group and what follows it. Pinned units come in ascending order, so this walk has the same bits.
_PINNED_TOKENS = 3 * GROUP_TOKENS
_ALL_PINNED = {"walk": "oldest_first", "num_pinned": _PINNED_TOKENS // UNIT_TOKENS}

# A window is small, and loses the start of its groups: codes for it do not pay.
_WINDOW_NOTE = "walk 'guided': layers with a sliding window read all of their window"

# Where scores, order and their launches take as long as what they save: with less to read than this
# for each multiprocessor of an H100 (`make gpu-bench`: a guided step that reads 15 to 25 %).
_GUIDED_BYTES_PER_MULTIPROCESSOR = 1_000_000
_EXACT_NOTE = (
    "walk 'guided': layers are exact while they have less than %.0f MB of keys and values, where "
    "reading everything is faster on this GPU; exact_where_faster=False guides always"
)


def least_guided_bytes(device: torch.device) -> int:
    """Keys and values of a layer from which on the guided walk is faster than reading them all."""
    if device.type != "cuda":
        # Scores and order take 0.1 to 0.3 of the time of reading everything in float32, 0.2 to 0.5
        # in bfloat16 (benchmarks/bench_guided_decode.py): what a preset leaves out is mostly more.
        return 0
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return _GUIDED_BYTES_PER_MULTIPROCESSOR * multiprocessors


def plan_paged(settings: LayerSettings, layer: ARTLayer) -> dict[str, Any]:
    """The step of a layer on an ``ARTCache``.

    Args:
        settings: Of the layer.
        layer: Its cache, with the new tokens in it.

    Returns:
        Arguments of :func:`art_torch.decode_attention`: criterion, walk and sizes.
    """
    plan = dict(settings.options, criterion=settings.criterion)
    if not layer.table.static_len and settings.is_dense_step(layer.table.padded_len):
        return plan | READ_ALL
    if not settings.guided:
        return plan
    if layer.is_sliding:
        settings.note_once(_WINDOW_NOTE)
        return plan | READ_ALL
    if _kv_bytes(layer) < settings.least_guided_bytes:
        note_unguided(settings)
        return plan | READ_ALL
    if not layer.table.static_len and layer.table.counts.longest < _PINNED_TOKENS:
        # Nobody estimates what is left of this walk: ResidualMass has nothing to go by, or to do.
        return plan | _ALL_PINNED | {"criterion": rules_of(settings.criterion).stability}
    return plan | layer.guided_arguments()


def note_unguided(settings: LayerSettings) -> None:
    """Logs and counts a call that reads everything because that is faster."""
    settings.note_exact(_EXACT_NOTE % (settings.least_guided_bytes / 1e6))


def pin_all_where(dense: Tensor, most: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """Reads everything where a tensor says so: all units come before the first decision.

    Args:
        dense: Bool ``[]``, on the device.
        most: More units than any row has.
        arguments: Of :func:`art_torch.decode_attention`, with a rule and a named walk.

    Returns:
        The arguments with ``num_pinned`` per row and KV head; of the guided walk, with the walk
        itself.
    """
    arguments = dict(arguments)
    shape = arguments["query"].shape[0], arguments["key_cache"].shape[2]
    if arguments["walk"] == "guided":
        rest = rules_of(arguments["criterion"]).residual_mass is not None
        names = (*GUIDED_TENSORS, *LOGIT_ARGUMENTS)
        given = {name: arguments[name] for name in names if name in arguments}
        walk = guided_walk(**given, rest=rest)
        del arguments["key_codes"], arguments["code_table"]
        arguments.update(walk=walk.walk, walk_lens=walk.walk_lens)
        if rest:
            arguments["log_rest"] = walk.log_rest
        pinned = walk.num_pinned
    else:
        units = arguments.get("num_pinned")
        if units is None:
            units = default_pinned(arguments["walk"], arguments["unit_size"])
        pinned = torch.full(shape, units, dtype=torch.int32, device=dense.device)
    arguments["num_pinned"] = torch.where(dense, torch.full_like(pinned, most), pinned)
    return arguments


def plan_dense(settings: LayerSettings, tokens: int) -> dict[str, Any]:
    """The step of a layer on any other cache.

    Args:
        settings: Of the layer.
        tokens: Tokens a row, the new one and pads included.

    Returns:
        Arguments of :func:`art_torch.decode_attention`: criterion, walk and sizes.

    Raises:
        RuntimeError: The guided walk is asked for.
    """
    if settings.guided:
        # Its keys are new tensors at every step: nothing tells whether codes still belong to them.
        raise RuntimeError(
            'walk="guided" needs the codes of an ARTCache: pass '
            "past_key_values=art_torch.ARTCache(model.config), or choose another walk, which takes "
            "any cache. Where transformers makes a cache of its own (an assistant model, "
            "assistant_early_exit, guidance_scale), only another walk will do"
        )
    plan = dict(settings.options, criterion=settings.criterion)
    return plan | READ_ALL if settings.is_dense_step(tokens) else plan


def _kv_bytes(layer: ARTLayer) -> int:
    """Bytes of the keys and values that a step may read, by what the host knows."""
    table, storage = layer.table, layer.storage
    assert storage is not None  # the new tokens are in it
    tokens = table.batch * (table.static_len or table.counts.longest)
    return tokens * storage.page_bytes // storage.page_size
