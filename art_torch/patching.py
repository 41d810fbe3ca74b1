"""``art_torch.patch``: HuggingFace models that decode with run-time termination."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from art_torch.criterion import PRESETS, Criterion, rules_of
from art_torch.guided import UNIT_TOKENS
from art_torch.ops import DecodeResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from art_torch.integrations.transformers.patching import PatchHandle

__all__ = ["patch"]

logger = logging.getLogger("art_torch")

# What stopping early loses in this order: the design of the walk decides it, not the thresholds.
WALKS = {
    "oldest_first": "recent tokens may never be read, which costs most quality (the paper's order)",
    "recent_first": "facts far back may be missed, and the sink tokens at the start are read last",
    "sink_recent": "facts far back may be missed: only the first and the newest tokens are certain",
    "guided": "tokens are skipped by an estimate from two-bit codes of their keys, so one that is "
    "underestimated can be missed",
}


def patch(
    model: PreTrainedModel,
    criterion: Criterion | str | None,
    walk: str = "sink_recent",
    *,
    skip_layers: Iterable[int] = (),
    per_layer: Mapping[int, Criterion | str | None] | None = None,
    dense_every: int | None = None,
    num_pinned: int | None = None,
    block_size: int = 64,
    unit_size: int = 16,
    on_call: Callable[[int, dict[str, Any], DecodeResult], None] | None = None,
    measure_mass: bool = False,
    exact_where_faster: bool = True,
) -> PatchHandle:
    """Lets a HuggingFace model stop reading its KV cache once the attention output has settled.

    Only decode steps change (one new token per sequence); prefill, speculative verification,
    training, ``output_attentions`` and ``torch.autocast`` (where it gives query, key and value
    different dtypes) use the model's own exact attention. Settings belong to this model alone. Use
    it as a context manager, or keep the handle and call ``unpatch()``::

        cache = art_torch.ARTCache(model.config)
        with art_torch.patch(model, "balanced", walk="guided") as handle:
            model.generate(**inputs, past_key_values=cache)
        handle.stats.summary()

    Meanwhile the model can neither be copied nor pickled, and ``save_pretrained`` also saves the
    ``disable_compile=True`` that keeps ``generate`` from compiling steps of other caches.

    An :class:`~art_torch.ARTCache` is fastest; the guided walk needs one, the others work with any
    cache. All of them work in continuous batching (``docs/continuous_batching.md``).

    ``"quality"``, ``"balanced"`` and ``"fast"`` are rules for the guided walk: those of
    ``art_torch.PRESETS``. They were chosen to keep the mean KL divergence from exact attention near
    .003, .01 and .03, and read about 24, 15 and 10 % of 4,096 tokens, and half of that of 8,192
    (SmolLM2-135M on texts of many kinds, by benchmarks/bench_guided.py; the README has the table).

    Args:
        model: A causal language model of transformers, or one of peft around it.
        criterion: When to stop: the name of a preset (with ``walk="guided"``), a
            :class:`~art_torch.Stability`, a :class:`~art_torch.ResidualMass` (with
            ``walk="guided"``), or both of them joined by ``|`` or ``&``; None for exact attention
            by the same operator.
        walk: Order of reading: ``"sink_recent"``, ``"recent_first"``, ``"oldest_first"``, or
            ``"guided"``: from the heaviest units down, by the key codes of an ``ARTCache``, which
            it switches on. Layers with a sliding window then read all of their window.
        skip_layers: Layers that stay exact.
        per_layer: Other criteria for some layers: as ``criterion``, None is exact.
            :func:`art_torch.load_criteria` reads them from a file.
        dense_every: Every so many decode steps one is exact in all layers: those after which the
            cache holds a multiple of this many tokens, pads counted. 1 makes all steps exact; None
            adds no exact steps.
        num_pinned: Units read before anything is decided; see :func:`art_torch.decode_attention`.
        block_size: Tokens between two decisions.
        unit_size: Tokens a unit of the walk.
        on_call: Called after every call of the operator with the layer, its arguments and its
            result, for recording.
        measure_mass: Also measures which share of the softmax mass each call has read, for
            ``stats.mass_read()``. Every step then reads the whole cache once more.
        exact_where_faster: Whether ``walk="guided"`` reads everything while a layer has so little
            to read that looking for what matters takes longer: on a GPU, less than 1 MB of keys
            and values for each multiprocessor (about 32k tokens of 8 KV heads of 128 on an H100, in
            all sequences together; of a preallocated cache, what it has room for). Codes are kept
            all the same; ``stats`` counts such calls as fallbacks. False guides always, to see
            what is lost.

    Returns:
        The handle: a context manager with ``stats``, ``active`` and ``unpatch()``.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: The model cannot be patched (the message says why), a layer or a size does not
            fit, there is no preset of that name, or a criterion needs another walk.
        RuntimeError: The model is patched already.
        ModuleNotFoundError: transformers is not installed.
        NotImplementedError: ``walk="guided"`` for a model that is neither on the CPU nor on an
            NVIDIA GPU.
    """
    if walk not in WALKS:
        raise ValueError(f"walk must be one of {', '.join(WALKS)}, got {walk!r}")
    if not isinstance(skip_layers, Iterable):
        raise TypeError(
            f"skip_layers must be an iterable of layers, got {type(skip_layers).__name__}"
        )
    if per_layer is not None and not isinstance(per_layer, Mapping):
        raise TypeError(
            f"per_layer must be a mapping from layers to criteria, got {type(per_layer).__name__}"
        )
    rule = _criterion_for(walk, "criterion", criterion)
    others = {
        layer: _criterion_for(walk, f"per_layer[{layer}]", other)
        for layer, other in (per_layer or {}).items()
    }
    _check_sizes(walk, block_size, unit_size, num_pinned)
    if dense_every is not None:
        _check_int("dense_every", dense_every, "an int or None")
        if dense_every < 1:
            raise ValueError(f"dense_every must be at least 1, got {dense_every}")

    from art_torch.integrations.transformers import patch_model

    options = {"walk": walk, "block_size": block_size, "unit_size": unit_size}
    if num_pinned is not None:
        options["num_pinned"] = num_pinned
    handle = patch_model(
        model,
        rule,
        options,
        skip_layers,
        others,
        on_call,
        measure_mass,
        exact_where_faster,
        dense_every,
    )
    if rule is not None or any(other is not None for other in others.values()):
        logger.warning("walk %r with a stopping rule: %s", walk, WALKS[walk])
    return handle


def _check_int(name: str, value: object, expected: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")


def _check_sizes(walk: str, block_size: int, unit_size: int, num_pinned: int | None) -> None:
    _check_int("block_size", block_size, "an int")
    _check_int("unit_size", unit_size, "an int")
    if unit_size < 1 or block_size < unit_size or block_size % unit_size:
        raise ValueError(
            f"block_size must be a positive multiple of unit_size, got {block_size} and {unit_size}"
        )
    if num_pinned is not None:
        _check_int("num_pinned", num_pinned, "an int or None")
        if num_pinned < 0:
            raise ValueError(f"num_pinned must not be negative, got {num_pinned}")
    if walk == "guided" and num_pinned is not None:
        raise ValueError(
            f'num_pinned must not be given with walk="guided", which brings its own, '
            f"got {num_pinned}"
        )
    if walk == "guided" and unit_size != UNIT_TOKENS:
        raise ValueError(f'unit_size must be {UNIT_TOKENS} with walk="guided", got {unit_size}')


def _criterion_for(walk: str, name: str, value: Criterion | str | None) -> Criterion | None:
    """Looks a preset up, and refuses what does not fit the walk."""
    if isinstance(value, str):
        if value not in PRESETS:
            raise ValueError(
                f"{name} must be one of the presets {', '.join(PRESETS)}, got {value!r}"
            )
        if walk != "guided":
            raise ValueError(
                f'{name}: preset {value!r} was chosen for walk="guided", got walk={walk!r}; pass '
                f"art_torch.PRESETS[{value!r}] to use its rule with another walk"
            )
        return PRESETS[value]
    try:
        rules = rules_of(value)
    except TypeError:
        raise TypeError(
            f"{name} must be a Stability, a ResidualMass, both of them joined by | or &, the name "
            f"of a preset, or None, got {type(value).__name__}"
        ) from None
    if rules.residual_mass is not None and walk != "guided":
        raise ValueError(
            f'{name}: ResidualMass needs walk="guided", which estimates what is left to read, '
            f"got walk={walk!r}"
        )
    return value
