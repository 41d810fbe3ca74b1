"""Continuous batching of HuggingFace transformers (``model.generate_batch``) with ART.

::

    from art_torch.integrations import continuous_batching

    with art_torch.patch(model, criterion) as handle, continuous_batching.enable(handle):
        model.generate_batch(prompts, generation_config=...)
    handle.stats.summary()
"""

from __future__ import annotations

import copy
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.generation.continuous_batching import PagedAttentionCache

from art_torch.integrations.transformers.attention import settings_of
from art_torch.integrations.transformers.paged_attention import STEP, paged_attention
from art_torch.integrations.transformers.paged_codes import PagedCodes
from art_torch.integrations.transformers.paged_step import PagedStep
from art_torch.integrations.transformers.patching import PatchHandle

__all__ = ["ContinuousBatching", "enable"]

# Versions whose cache and arguments were read and run; they differ, and are internal.
_OLDEST, _NEWEST = (5, 17), (5, 24)
_LAYER_TYPES = ("full_attention", "sliding_attention")


def enable(handle: PatchHandle) -> ContinuousBatching:
    """Lets ``generate_batch`` of a patched model decode with the settings of the patch.

    Rows with one new token read the pages of transformers' own cache, where they are, and stop by
    the criterion of the patch; ``handle.stats`` counts them. Rows with more (prompts) use the
    model's own attention. Layers with a sliding window read all of their window. While it is
    enabled, ``generate`` and plain calls of the model are exact.

    Args:
        handle: What :func:`art_torch.patch` returned, still active.

    Returns:
        A context manager with ``active`` and ``disable()``.

    Raises:
        TypeError: ``handle`` is no handle of :func:`art_torch.patch`.
        ValueError: ``dense_every`` was given, or the model has no continuous batching, or one that
            computes something else than the model.
        RuntimeError: This version of transformers is not supported; the model is not patched any
            more, is enabled already, has a manager that was kept from before, or shares its config
            with another patched model.
    """
    if not isinstance(handle, PatchHandle):
        raise TypeError(
            f"handle must be what art_torch.patch(model, ...) returned, got {type(handle).__name__}"
        )
    _check_version(transformers.__version__)
    _check_handle(handle)
    return ContinuousBatching(handle)


class ContinuousBatching:
    """Continuous batching with ART. Leaving the ``with`` block, or :meth:`disable`, ends it.

    Attributes:
        handle: Of the patched model.
        active: Whether it is still enabled.
    """

    def __init__(self, handle: PatchHandle) -> None:
        self.handle = handle
        self._modules = handle.modules
        self._configs = handle.return_configs()
        try:
            _check_configs(handle, self._configs)
        except BaseException:
            handle.take_configs(self._configs)
            raise
        AttentionInterface.register("art_paged", paged_attention)
        copies: dict[int, PreTrainedConfig] = {}
        for module in self._modules:
            own = module.config
            if id(own) not in copies:
                # transformers asks the config of the model, which stays as it is.
                copies[id(own)] = copy.copy(own)
                copies[id(own)]._attn_implementation_internal = "art_paged"
            module._art_own_config = own
            module.config = copies[id(own)]
        self._codes: WeakKeyDictionary[PagedAttentionCache, PagedCodes] = WeakKeyDictionary()
        self._hook = handle.model.register_forward_pre_hook(self._begin_step, with_kwargs=True)
        handle.before_unpatch.append(self.disable)
        self.active = True

    def disable(self) -> None:
        """Restores what the patch had set up; a second call does nothing.

        Unpatching the model does it as well.
        """
        if not self.active:
            return
        self.active = False
        self.handle.before_unpatch.remove(self.disable)
        try:
            # A manager that is kept has tokens of ART in its cache, and it may be in CUDA graphs.
            self.handle.model.destroy_cached_continuous_batching_manager()
        finally:
            self._hook.remove()
            for module in self._modules:
                module.config = module._art_own_config
                del module._art_own_config
            self.handle.take_configs(self._configs)

    @torch.compiler.disable
    def _begin_step(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before each forward pass of the model: gives a pass of continuous batching its step."""
        cache = kwargs.get("cache")
        if not isinstance(cache, PagedAttentionCache):
            return None
        step = PagedStep(kwargs, self._codes.setdefault(cache, PagedCodes()))
        return args, kwargs | {"cache": step, STEP: step}

    def __enter__(self) -> ContinuousBatching:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.disable()


def _check_version(version: str) -> None:
    major, minor = (int(part) for part in version.split(".")[:2])
    if not _OLDEST <= (major, minor) <= _NEWEST:
        oldest, newest = (".".join(map(str, part)) for part in (_OLDEST, _NEWEST))
        raise RuntimeError(
            f"continuous batching with art_torch needs transformers {oldest} to {newest}, got "
            f"{version}: install one of these, or use generate()"
        )


def _check_handle(handle: PatchHandle) -> None:
    name, model = type(handle.model).__name__, handle.model
    handle.check_active()
    if any(hasattr(module, "_art_own_config") for module in handle.modules):
        raise RuntimeError(f"continuous batching is enabled already for this {name}")
    if not hasattr(model, "generate_batch"):
        raise ValueError(
            f"{name} has no generate_batch: continuous batching needs a model that generates, such "
            "as one of AutoModelForCausalLM"
        )
    types = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if unknown := sorted(types - set(_LAYER_TYPES)):
        raise ValueError(
            f"{name} has no continuous batching in transformers: layers must be of "
            f"{', '.join(_LAYER_TYPES)}, got {', '.join(unknown)}"
        )
    patched = [settings for settings in map(settings_of, handle.modules) if settings]
    if any(settings.dense_every is not None for settings in patched):
        raise ValueError(
            "dense_every counts the tokens of a batch, and sequences of continuous batching have "
            "lengths of their own: patch without it"
        )
    if getattr(model, "_cached_continuous_batching_manager", None) is not None:
        raise RuntimeError(
            f"this {name} has a continuous batching manager from before: call "
            "model.destroy_cached_continuous_batching_manager() first"
        )


def _check_configs(handle: PatchHandle, configs: list[PreTrainedConfig]) -> None:
    name = type(handle.model).__name__
    for config in configs:
        if config._attn_implementation == "art":
            raise RuntimeError(
                f"this {name} shares its config with another patched model: unpatch() that one "
                "first, or load the model with a config of its own"
            )
        softcap = getattr(config, "attn_logit_softcapping", None)
        if softcap is not None and "flash" not in config._attn_implementation:
            raise ValueError(
                f"{name} caps its logits at {softcap}, and continuous batching of transformers "
                f"leaves that out with {config._attn_implementation!r}: load the model with "
                'attn_implementation="flash_attention_2", or use generate()'
            )
