"""Presses of kvpress on a patched model: what they keep of a prompt is all that an ARTCache stores.

A press is a forward hook on the attention modules. It expects arguments that transformers no longer
passes, and a cache whose layers have all keys of the prompt, without pads. :func:`serve_presses`, a
hook that runs before those of the presses, gives them both. With an :class:`ARTCache` it runs them
itself, each sequence without its pads, before anything is stored.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, StaticLayer

from art_torch.evicted import Prompt
from art_torch.integrations.transformers.layer import ARTLayer

if TYPE_CHECKING:
    from art_torch.integrations.transformers.attention import LayerSettings

__all__ = [
    "are_pressing",
    "forget_masked_keys",
    "has_presses",
    "serve_presses",
    "wait_for_presses",
]

OLDEST_KVPRESS = "0.5.5"

_WINDOW_NOTE = (
    "layers with a sliding window are not compressed: they keep no more than their window"
)

Hook = Callable[..., Any]


def has_presses(module: nn.Module) -> bool:
    """Whether presses are active on an attention module."""
    return bool(module._forward_hooks) and bool(_hooks_of(module))


def are_pressing(module: nn.Module, settings: LayerSettings) -> bool:
    """Whether presses are active on an attention module of a patched model; makes it serve them.

    Raises:
        RuntimeError: kvpress is too old.
    """
    if torch.compiler.is_compiling() or not has_presses(module):
        return False
    if settings.press_hook is None:
        require_kvpress()
        settings.press_hook = module.register_forward_hook(
            serve_presses, prepend=True, with_kwargs=True
        )
    return True


@cache
def require_kvpress() -> None:
    """Checks the version of kvpress.

    Raises:
        ModuleNotFoundError: It is not installed.
        RuntimeError: It is too old.
    """
    try:
        version = metadata.version("kvpress")
    except metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            "kvpress is not installed: `pip install --no-deps kvpress`; docs/kvpress.md lists what "
            "it needs"
        ) from None
    if Version(version) < Version(OLDEST_KVPRESS):
        raise RuntimeError(
            f"kvpress must be {OLDEST_KVPRESS} or newer, got {version}: upgrade it with "
            "`pip install --no-deps --upgrade kvpress`"
        )


def wait_for_presses(settings: LayerSettings, layer: ARTLayer) -> bool:
    """Whether this pass is a prompt that the presses of its module will compress.

    Raises:
        NotImplementedError: Layers share their keys.
    """
    if layer.padded_len > 0:
        return False
    if layer.is_sliding:
        settings.note_once(_WINDOW_NOTE)
        return False
    if layer.lends:
        raise NotImplementedError(
            "presses cannot compress an ARTCache of a model whose layers share keys: use a "
            "DynamicCache"
        )
    return True


def forget_masked_keys(module: nn.Module, query: Tensor, key: Tensor) -> None:
    """Refuses keys that a press has masked in a dense cache; a new prompt forgets old ones.

    Presses with a budget per head (AdaKVPress) leave all keys in the cache, and list those that
    attention is to leave out.

    Raises:
        RuntimeError: There are such keys.
    """
    if query.shape[2] == key.shape[2]:
        _take_masked_keys(module)
    elif module.__dict__.get("masked_key_indices") is not None:
        raise RuntimeError(
            "a press with a budget per head has masked keys of this cache, and only an ARTCache "
            "leaves them out: pass past_key_values=art_torch.ARTCache(model.config)"
        )


def _take_masked_keys(module: nn.Module) -> Any:
    """Batch, head and token indices of the keys that a press wants left out; None for none."""
    return module.__dict__.pop("masked_key_indices", None)


# ---------------------------------------------------------------- hooks


def _hooks_of(module: nn.Module) -> list[Hook]:
    """Forward hooks of the presses that are active on an attention module."""
    kvpress = sys.modules.get("kvpress")
    if kvpress is None:
        return []
    return [
        hook
        for hook in module._forward_hooks.values()
        if isinstance(getattr(hook, "__self__", None), kvpress.BasePress)
        or getattr(hook, "__module__", "").startswith("kvpress.")
    ]


def serve_presses(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """Forward hook of an attention module that runs before those of presses.

    Args:
        module: The attention module.
        args: Its positional arguments.
        kwargs: Its keyword arguments, which the hooks after this one get as well: completed in
            place by ``past_key_values``, ``cache_position`` and ``hidden_states``.
        output: What it returned.

    Raises:
        RuntimeError: The pass has no cache.
        NotImplementedError: A press does more than to compress the prompt, or the cache is static
            or has a ``max_length``.
    """
    hooks = _hooks_of(module)
    if not hooks:
        return
    cache = kwargs.get("past_key_values", kwargs.get("cache"))
    if cache is None:
        raise RuntimeError("a press compresses a cache, and this forward pass has none")
    if args and "hidden_states" not in kwargs:
        kwargs["hidden_states"] = args[0]
    kwargs["past_key_values"] = cache
    layer = cache.layers[module.layer_idx]
    tokens, end = kwargs["hidden_states"].shape[1], layer.get_seq_length()
    if isinstance(layer, StaticLayer):
        raise NotImplementedError(
            "presses cannot compress a StaticCache: use an ARTCache or a DynamicCache"
        )
    if not isinstance(layer, ARTLayer):
        kwargs["cache_position"] = torch.arange(end - tokens, end)
        return
    for hook in hooks:
        _check_supported(hook)
    if layer.prompt is not None:
        if cache.max_length is not None:
            raise NotImplementedError(
                "an ARTCache with max_length is preallocated, and presses cannot compress one: "
                "make the cache without max_length"
            )
        layer.evict(*_run(hooks, module, args, kwargs, output, layer.prompt))
    # Not the positions of a prompt, whatever this pass was: presses have nothing left to do.
    end = layer.get_seq_length()
    kwargs["cache_position"] = torch.arange(end, end + tokens)


def _check_supported(hook: Hook) -> None:
    """Refuses presses that do more than to compress the prompt.

    Raises:
        NotImplementedError: The press is one of them.
    """
    kvpress = sys.modules["kvpress"]
    press = getattr(hook, "__self__", None)
    plain = (kvpress.BasePress, kvpress.PerLayerCompressionPress, kvpress.ComposedPress)
    parts = press.presses if isinstance(press, kvpress.ComposedPress) else [press]
    if any(
        getattr(type(part), "forward_hook", None) not in [cls.forward_hook for cls in plain]
        for part in [press, *parts]
    ):
        name = type(press).__name__ if press is not None else hook.__module__
        raise NotImplementedError(
            f"{name} has a forward hook of its own, and an ARTCache takes presses that compress "
            "the prompt as BasePress does (such as SnapKVPress or AdaKVPress): use one of them, or "
            "a DynamicCache"
        )


def _run(
    hooks: list[Hook],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
    prompt: Prompt,
) -> tuple[Tensor, Tensor, Tensor]:
    """What presses leave of a prompt.

    Returns:
        Keys ``[batch, num_kv_heads, candidates, head_dim]``, values of the same kind, and which of
        these each head keeps, bool ``[batch, num_kv_heads, candidates]``.
    """
    if prompt.real is None:
        return _press(hooks, module, args, kwargs, output, prompt.keys, prompt.values)
    # A press takes pads for tokens: each sequence is compressed without them, as if it was alone.
    parts = []
    for row, real in enumerate(torch.from_numpy(prompt.real).to(prompt.keys.device)):
        tokens = real.nonzero()[:, 0]
        own = _of_one_row(kwargs, row, tokens)
        weights = output[1]
        if weights is not None:
            weights = weights[row : row + 1][:, :, tokens][..., tokens]
        out = output[0][row : row + 1, tokens], weights
        new = (part[row : row + 1, :, tokens] for part in (prompt.keys, prompt.values))
        parts.append(_press(hooks, module, args, own, out, *new))
    most = max(part[0].shape[2] for part in parts)
    keys, values, kept = zip(*parts, strict=True)
    pad = nn.functional.pad
    return (
        torch.cat([pad(part, (0, 0, 0, most - part.shape[2])) for part in keys]),
        torch.cat([pad(part, (0, 0, 0, most - part.shape[2])) for part in values]),
        torch.cat([pad(part, (0, most - part.shape[2])) for part in kept]),
    )


def _of_one_row(kwargs: dict[str, Any], row: int, tokens: Tensor) -> dict[str, Any]:
    """Arguments of the attention module as they were without the other rows, and without pads."""

    def of_row(tensor: Tensor) -> Tensor:  # [batch or 1, tokens, ...]
        own = tensor if len(tensor) == 1 else tensor[row : row + 1]
        return own[:, tokens]

    own = dict(kwargs, attention_mask=None, hidden_states=of_row(kwargs["hidden_states"]))
    if kwargs.get("position_ids") is not None:
        own["position_ids"] = of_row(kwargs["position_ids"])
    if kwargs.get("position_embeddings") is not None:
        own["position_embeddings"] = tuple(of_row(part) for part in kwargs["position_embeddings"])
    return own


def _press(
    hooks: list[Hook],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
    keys: Tensor,
    values: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs presses on a prompt without pads; returns as :func:`_run` does."""
    layer, tokens = module.layer_idx, keys.shape[2]
    cache = DynamicCache()
    cache.update(keys.detach(), values.detach(), layer)
    own = dict(kwargs, past_key_values=cache, cache_position=torch.arange(tokens))
    _take_masked_keys(module)  # those of an earlier prompt
    for hook in hooks:
        hook(module, args, own, output)
    masked = _take_masked_keys(module)
    left = cache.layers[layer].keys, cache.layers[layer].values
    kept = torch.ones(left[0].shape[:3], dtype=torch.bool, device=keys.device)
    if masked is not None:
        kept[tuple(index.to(keys.device) for index in masked)] = False
    if left[0].shape[2] < tokens:
        left = _in_order(*left, keys)
    return *left, kept


def _in_order(keys: Tensor, values: Tensor, prompt_keys: Tensor) -> tuple[Tensor, Tensor]:
    """Puts what was kept back into the order of the text, for walks that go by it.

    Presses leave tokens in the order of their scores. A key tells which token it is of; if a press
    has changed keys, its order stays.
    """
    original, order = _fingerprints(prompt_keys).sort(dim=-1)
    wanted = _fingerprints(keys)
    place = torch.searchsorted(original, wanted).clamp(max=original.shape[-1] - 1)
    if not torch.equal(original.gather(-1, place), wanted):
        return keys, values
    by_position = order.gather(-1, place).argsort(dim=-1, stable=True)[..., None]
    return (
        keys.gather(2, by_position.expand_as(keys)),
        values.gather(2, by_position.expand_as(values)),
    )


def _fingerprints(keys: Tensor) -> Tensor:
    """An int64 for each key, ``[..., tokens]``, that depends on its bits only."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[keys.element_size()]
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (keys.shape[-1],), generator=generator)
    factors = factors.to(keys.device)
    # Integers wrap around: the sum is exact in any order.
    return (keys.contiguous().view(bits).to(torch.int64) * factors).sum(-1)
