"""Switching a model's attention to :func:`art_attention`, and back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)

from art_torch.criterion import Criterion
from art_torch.guided import require_guided_device
from art_torch.integrations.transformers.attention import (
    LayerSettings,
    art_attention,
    settings_of,
)
from art_torch.integrations.transformers.cache import shape_of
from art_torch.integrations.transformers.masks import art_mask
from art_torch.integrations.transformers.plan import least_guided_bytes
from art_torch.ops import DecodeResult
from art_torch.rank_stats import all_shares, join_shares
from art_torch.stats import ReadStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["PatchHandle", "attention_modules", "base_model", "patch_model"]

OnCall = Callable[[int, dict[str, Any], DecodeResult], None]


class PatchHandle:
    """A patched model. Leaving the ``with`` block, or :meth:`unpatch`, restores it.

    Attributes:
        model: The model.
        stats: :class:`~art_torch.stats.ReadStats`, what its decode steps have read.
        active: Whether the model is still patched.
    """

    def __init__(self, model: PreTrainedModel, settings: dict[nn.Module, LayerSettings]) -> None:
        self.model = model
        self.stats = next(iter(settings.values())).stats
        self._modules = list(settings)
        self._configs = _configs_of(self._modules)
        for module, layer in settings.items():
            module._art_settings = layer  # type: ignore[assignment]
        for config in self._configs:
            _ATTENTION.acquire(config)
        self._generation = getattr(model, "generation_config", None)
        if self._generation is not None:
            _COMPILING.acquire(self._generation)
        # What has to end before the model is restored.
        self.before_unpatch: list[Callable[[], None]] = []
        self.active = True
        self._entered = False

    def unpatch(self) -> None:
        """Restores the model's own attention; a second call does nothing."""
        if not self.active:
            return
        try:
            for end in [*self.before_unpatch]:
                end()
        finally:
            self._restore()

    def _restore(self) -> None:
        self.active = False
        for module in self._modules:
            settings = settings_of(module)
            if settings is not None and settings.press_hook is not None:
                settings.press_hook.remove()
            del module._art_settings
        for config in self._configs:
            _ATTENTION.release(config)
        if self._generation is not None:
            _COMPILING.release(self._generation)

    def check_active(self) -> None:
        """Raises RuntimeError if the model is not patched any more."""
        if not self.active:
            raise RuntimeError(
                f"this {type(self.model).__name__} is not patched any more: call art_torch.patch "
                "again"
            )

    def gather_stats(self, group: ProcessGroup | None = None) -> ReadStats:
        """Statistics of all KV heads of a tensor-parallel model, of which a rank has some.

        Every rank of the group must call it, after the same steps; all of them get the result. It
        can be called after the model was unpatched, while torch.distributed is initialised.

        Args:
            group: The ranks among which the heads are split; None for all ranks.

        Returns:
            New statistics; those of this rank stay as they are in ``stats``.

        Raises:
            RuntimeError: torch.distributed is not available, or not initialised.
            ValueError: This rank is not in the group, the ranks have not taken the same steps, or
                their heads together are not those of the model.
        """
        heads = {_layer_index(module): _num_kv_heads(module) for module in self._modules}
        shares = join_shares(all_shares(self.stats.shares(), group), heads)
        return ReadStats.of_shares(shares, self.stats.exact_fallbacks)

    @property
    def modules(self) -> list[nn.Module]:
        """The attention modules that are patched."""
        return self._modules

    def return_configs(self) -> list[PreTrainedConfig]:
        """Gives the model its configs back, as they were, until :meth:`take_configs`."""
        configs, self._configs = self._configs, []
        for config in configs:
            _ATTENTION.release(config)
        return configs

    def take_configs(self, configs: list[PreTrainedConfig]) -> None:
        """Switches configs again that :meth:`return_configs` returned."""
        self._configs = configs
        for config in configs:
            _ATTENTION.acquire(config)

    def __enter__(self) -> PatchHandle:
        self.check_active()
        if self._entered:
            raise RuntimeError("this handle is in a with block already, whose end would unpatch")
        self._entered = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.unpatch()


class _Switch:
    """An attribute of configs, set while they are used by any patched model.

    Models may share a config object, and the last of them to be unpatched restores it: unless
    somebody has set it meanwhile, who will want to keep that.
    """

    def __init__(self, attribute: str, value: Any) -> None:
        self._attribute, self._value = attribute, value
        # By id: the config, what it said before, and the number of models that use it.
        self._switched: dict[int, tuple[Any, Any, int]] = {}
        self._lock = threading.Lock()  # models of several threads may share a config

    def acquire(self, config: Any) -> None:
        with self._lock:
            new = (config, getattr(config, self._attribute), 0)
            config, previous, users = self._switched.get(id(config), new)
            self._switched[id(config)] = (config, previous, users + 1)
            setattr(config, self._attribute, self._value)

    def release(self, config: Any) -> None:
        with self._lock:
            config, previous, users = self._switched.pop(id(config))
            if users > 1:
                self._switched[id(config)] = (config, previous, users - 1)
            elif getattr(config, self._attribute) == self._value:
                setattr(config, self._attribute, previous)

    def original(self, config: Any) -> Any:
        """What the attribute is without any patch."""
        entry = self._switched.get(id(config))
        return getattr(config, self._attribute) if entry is None else entry[1]


# Not through the property: it would switch the encoders of a multimodal model as well.
_ATTENTION = _Switch("_attn_implementation_internal", "art")
# On a GPU generate() compiles the decode step of a static cache by itself, and a compiled step on a
# cache that is not ours has to be exact attention.
_COMPILING = _Switch("disable_compile", True)


def patch_model(
    model: PreTrainedModel,
    criterion: Criterion | None,
    options: dict[str, Any],
    skip_layers: Iterable[int],
    per_layer: Mapping[int, Criterion | None],
    on_call: OnCall | None,
    measure_mass: bool = False,
    exact_where_faster: bool = True,
    dense_every: int | None = None,
) -> PatchHandle:
    """Patches a model; :func:`art_torch.patch` documents the arguments."""
    model = base_model(model)
    modules = attention_modules(model)
    _check_patchable(model, modules)
    devices = _devices_of(model)
    if options["walk"] == "guided":
        for device in devices:
            require_guided_device(device)
    layers = sorted({_layer_index(module) for module in modules})
    skipped, overrides = set(skip_layers), dict(per_layer)
    for name, given in (("skip_layers", skipped), ("per_layer", set(overrides))):
        unknown = sorted(given - set(layers))
        if unknown:
            raise ValueError(
                f"{name} must name layers {_ranges(layers)} of the model, got {unknown}"
            )
    if both := sorted(skipped & set(overrides)):
        raise ValueError(f"layers {both} are in skip_layers and in per_layer")
    # A layer that was named to be exact needs no codes: it reads everything in any order.
    unguided = dict(options, walk="sink_recent") if options["walk"] == "guided" else options
    exact = skipped | {layer for layer, other in overrides.items() if other is None}
    least_bytes = max(map(least_guided_bytes, devices)) if exact_where_faster else 0
    stats, noted, shape = ReadStats(), set[str](), _shape_of(model)
    settings = {}
    for module in modules:
        layer = _layer_index(module)
        settings[module] = LayerSettings(
            layer=layer,
            criterion=None if layer in skipped else overrides.get(layer, criterion),
            options=unguided if layer in exact else options,
            stats=stats,
            eager_only=_uses_eager(model, module),
            noted=noted,
            on_call=on_call,
            measure_mass=measure_mass,
            least_guided_bytes=least_bytes,
            dense_every=dense_every,
            shape=shape,
        )
    AttentionInterface.register("art", art_attention)
    AttentionMaskInterface.register("art", art_mask)
    return PatchHandle(model, settings)


def base_model(model: Any) -> PreTrainedModel:
    """The model itself; of a model of peft, the one that its adapters were put into.

    Raises:
        TypeError: It is no model of transformers.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    return model


def _devices_of(model: PreTrainedModel) -> set[torch.device]:
    """Where the modules run; accelerate may keep their weights elsewhere in between."""
    devices = set()
    for module in model.modules():
        runs_on = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        for parameter in module.parameters(recurse=False):
            devices.add(parameter.device if runs_on is None else torch.device(runs_on))
    return devices


def _shape_of(model: PreTrainedModel) -> tuple[Any, ...] | None:
    try:
        return shape_of(model.config)
    except ValueError:  # the cache says why when somebody makes one
        return None


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers in words, such as "0 to 3" or "1, 5 to 7"."""
    begins = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    pairs = zip(begins, ends, strict=True)
    return ", ".join(f"{begin} to {end}" if end > begin else str(begin) for begin, end in pairs)


def _layer_index(module: nn.Module) -> int:
    return module.layer_idx  # type: ignore[return-value]


def _num_kv_heads(module: nn.Module) -> int:
    """KV heads of a layer in the whole model, however many of them this rank has."""
    config: Any = module.config
    groups = getattr(module, "num_key_value_groups", None)
    if isinstance(groups, int):  # where layers differ, the config does not tell
        return int(config.num_attention_heads // groups)
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that call the attention interface of a decoder."""
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and "Attention" in type(module).__name__
        and isinstance(getattr(module, "config", None), PreTrainedConfig)
        and getattr(module, "is_causal", True)
    ]


def _configs_of(modules: list[nn.Module]) -> list[PreTrainedConfig]:
    return list({id(module.config): module.config for module in modules}.values())


def _uses_eager(model: PreTrainedModel, module: nn.Module) -> bool:
    original = _ATTENTION.original(module.config)
    return original == "eager" or (not model._supports_sdpa and original != "sdpa")


def _check_patchable(model: PreTrainedModel, modules: list[nn.Module]) -> None:
    name = type(model).__name__
    if any(settings_of(module) is not None for module in modules):
        raise RuntimeError(
            f"this {name} is patched already: unpatch() the first handle before patching again"
        )
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} cannot be patched: it is an encoder-decoder model")
    owners = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    for part in owners:
        if not part._can_set_attn_implementation():
            raise ValueError(
                f"{name} cannot be patched: the source of {type(part).__name__} does not use "
                "transformers' attention interface (ALL_ATTENTION_FUNCTIONS), or is not available"
            )
    if not modules:
        raise ValueError(
            f"{name} cannot be patched: none of its modules is a causal attention with a layer_idx"
        )
    for module in modules:
        for label, dim in _head_dims(module).items():
            if not (32 <= dim <= 256 and dim % 8 == 0):
                raise ValueError(
                    f"{name} cannot be patched: {type(module).__name__} has {label} {dim}, and "
                    "art_torch needs a multiple of 8 from 32 to 256"
                )
        if any(parameter.dtype == torch.float64 for parameter in module.parameters()):
            raise ValueError(
                f"{name} cannot be patched: {type(module).__name__} is in float64, and art_torch "
                "needs float32, float16 or bfloat16"
            )


def _head_dims(module: nn.Module) -> dict[str, int]:
    """Sizes of keys and values, as far as the module tells them."""
    names = ("qk_head_dim",) if hasattr(module, "qk_head_dim") else ("head_dim",)
    found = {name: getattr(module, name, None) for name in (*names, "v_head_dim")}
    return {name: dim for name, dim in found.items() if isinstance(dim, int)}
