"""The attention function of a patched model.

A decode step (one query per row) goes to :func:`art_torch.decode_attention`; prefill, training and
everything else the operator does not cover goes to the model's own exact attention.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from art_torch import ops
from art_torch.evicted import EvictedTable
from art_torch.integrations.transformers.exact import exact_attention
from art_torch.integrations.transformers.exact_paged import (
    attend_to_prompt,
    exact_paged,
    why_not_this_mask,
)
from art_torch.integrations.transformers.layer import ARTLayer
from art_torch.integrations.transformers.masks import MaskInfo, info_of
from art_torch.integrations.transformers.new_keys import layer_of
from art_torch.integrations.transformers.plan import pin_all_where, plan_dense, plan_paged
from art_torch.integrations.transformers.presses import (
    are_pressing,
    forget_masked_keys,
    wait_for_presses,
)
from art_torch.mass import mass_read

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from art_torch.criterion import Criterion
    from art_torch.stats import Present, ReadStats

__all__ = ["LayerSettings", "art_attention", "call_operator", "settings_of"]

logger = logging.getLogger("art_torch")

# What of the keyword arguments a model passes would change the result of a decode step.
_NOT_COVERED = ("position_bias", "cache", "output_attentions")


_ONLY_STEPS = (
    "a step on a preallocated ARTCache takes one token per row, position_ids and no attention mask "
    "(pads are not stored), under torch.no_grad(), in eval mode and without output_attentions: "
    "crop(0) goes back to a cache that takes all of that"
)


@dataclass
class LayerSettings:
    """How one attention module of a patched model decodes.

    Attributes:
        layer: Index of the layer.
        criterion: When to stop; None reads everything.
        options: Further arguments of :func:`art_torch.decode_attention` (walk, sizes).
        stats: Where tokens read are counted.
        eager_only: Whether exact attention must be eager although sdpa would do.
        noted: What was logged already; shared by the layers of a model.
        on_call: Called after each call of the operator with (layer, arguments, result).
        measure_mass: Whether the softmax mass that each call reads is measured.
        least_guided_bytes: Keys and values below which a layer is not guided.
        dense_every: A step is exact when it makes the tokens of a row a multiple of this.
        shape: What an ``ARTCache`` of the model is made for; None if it can have none.
        single_pages: int32 ``[batch, 1]``, the page table of a dense cache.
        press_hook: What serves the presses of kvpress, from the first one on.
    """

    layer: int
    criterion: Criterion | None
    options: dict[str, Any]
    stats: ReadStats
    eager_only: bool
    noted: set[str]
    on_call: Callable[[int, dict[str, Any], ops.DecodeResult], None] | None = None
    measure_mass: bool = False
    least_guided_bytes: int = 0
    dense_every: int | None = None
    shape: tuple[Any, ...] | None = None
    single_pages: Tensor | None = None
    press_hook: RemovableHandle | None = None

    @property
    def guided(self) -> bool:
        """Whether the layer asks for the guided walk."""
        return bool(self.options["walk"] == "guided")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        # The copy would be patched for good, for nobody has a handle of it.
        raise TypeError(
            "a patched model can neither be copied nor pickled: unpatch() it first; to patch two "
            "models with the same weights, copy and then patch"
        )

    def is_dense_step(self, tokens: int) -> bool:
        """Whether the step that brings a row to so many tokens, pads included, reads everything."""
        return self.dense_every is not None and tokens % self.dense_every == 0

    def note_once(self, text: str) -> None:
        """Logs what a user should know, once per model; a compiled step logs nothing."""
        if torch.compiler.is_compiling() or text in self.noted:
            return
        self.noted.add(text)
        logger.warning("%s", text)

    def note_exact(self, text: str) -> None:
        """The same, and counts a call that fell back to exact attention."""
        if not torch.compiler.is_compiling():
            self.stats.count_exact_fallback()
            self.note_once(text)


def settings_of(module: nn.Module) -> LayerSettings | None:
    """The settings :func:`art_torch.patch` gave to an attention module."""
    return getattr(module, "_art_settings", None)


def art_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a patched model; registered as "art" with ``AttentionInterface``.

    Args:
        module: The attention module, which carries its :class:`LayerSettings`.
        query: ``[batch, num_q_heads, queries, head_dim]``.
        key: ``[batch, num_kv_heads, keys, head_dim]``; with an ``ARTCache`` only the new ones.
        value: ``[batch, num_kv_heads, keys, value_dim]``.
        attention_mask: What :func:`art_mask` made, or a mask of the user's.
        dropout: Probability, in training.
        scaling: Factor on the logits, default ``head_dim ** -0.5``.
        sliding_window: The layer's window; the mask has it as well.
        softcap: ``c * tanh(logit / c)``.
        s_aux: ``[num_q_heads]`` attention sinks.
        **kwargs: For the model's own attention.

    Returns:
        ``[batch, queries, num_q_heads, value_dim]`` and, if asked for, the attention weights.
    """
    settings, layer, new = settings_of(module), layer_of(key), None
    if layer is not None:
        new, layer.pending = layer.pending, None
        if new is not None:
            if value is not new[1]:
                raise RuntimeError(
                    f"{type(module).__name__} computes with cached values before its attention, "
                    "and an ARTCache hands over the new ones only: use a DynamicCache"
                )
            key = new[0]  # without the mark, whose checks take time
    logits = {"scaling": scaling, "softcap": softcap, "s_aux": s_aux}
    own = dict(kwargs, dropout=dropout, sliding_window=sliding_window, **logits)
    reason = _why_exact(settings, module, query, key, value, kwargs)
    pressed = settings is not None and are_pressing(module, settings)
    if layer is None:
        if settings is not None and pressed and settings.dense_every is not None:
            raise NotImplementedError(
                "dense_every counts the tokens that a press evicts as well, and only an ARTCache "
                "remembers how many: pass art_torch.ARTCache(model.config), or patch without it"
            )
        forget_masked_keys(module, query, key)
        if settings is None or reason is not None:
            _note(settings, reason)
            eager_only = settings is not None and settings.eager_only
            return exact_attention(module, query, key, value, attention_mask, own, eager_only)
        return _decode_dense(module, settings, query, key, value, attention_mask, logits, own)

    if settings is None:
        raise RuntimeError(
            "ARTCache works with a patched model only, and this model is not: use "
            "`with art_torch.patch(model, criterion):` (criterion=None is exact)"
        )
    if layer.made_for != settings.shape:
        raise ValueError(
            "this ARTCache was made for another model, whose layers have other windows, KV heads "
            f"or head sizes (expected {settings.shape}, got {layer.made_for}): use "
            "ARTCache(model.config)"
        )
    if settings.guided and not layer.is_sliding and layer.table.codes is None:
        _check_codes_can_start(layer)
        layer.use_codes()
    if pressed and wait_for_presses(settings, layer):
        return attend_to_prompt(module, settings, layer, query, new, attention_mask, own)
    if torch.compiler.is_compiling():
        _check_compilable(settings, layer, reason, attention_mask)
    elif reason is None and attention_mask is not None:
        reason = why_not_this_mask(attention_mask, layer)
    if reason is not None and layer.table.static_len:
        raise RuntimeError(_only_steps(reason))
    if reason is not None:
        _note(settings, reason)
        return exact_paged(module, settings, layer, query, new, attention_mask, own)
    return _decode_paged(settings, layer, query, new, attention_mask, logits)


def _why_exact(
    settings: LayerSettings | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kwargs: dict[str, Any],
) -> str | None:
    """Why this is no decode step for the operator; "" for what needs no mention, None if it is."""
    if query.shape[2] != 1:
        return ""
    if module.training:
        return "the model is in training mode"
    if torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    ):
        return "gradients are enabled (use torch.no_grad())"
    if not query.dtype == key.dtype == value.dtype:
        return "query, key and value differ in dtype, as under torch.autocast"
    for name in _NOT_COVERED:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            return f"the model passes {name}"
    return None


def _only_steps(reason: str | None) -> str:
    return f"{_ONLY_STEPS}. Here {reason}" if reason else _ONLY_STEPS


def _note(settings: LayerSettings | None, reason: str | None) -> None:
    if reason and settings is not None:
        settings.note_exact(f"decode steps run with exact attention: {reason}")


def _check_codes_can_start(layer: ARTLayer) -> None:
    if torch.compiler.is_compiling():
        raise RuntimeError(
            'a compiled step with walk="guided" needs the codes of the prompt: make the cache with '
            "ARTCache(model.config, key_codes=True), or run the prompt through the patched model"
        )


def _check_compilable(
    settings: LayerSettings, layer: ARTLayer, reason: str | None, mask: Tensor | None
) -> None:
    if settings.measure_mass:
        raise RuntimeError("measure_mass=True cannot be compiled: it is for analysis")
    if not layer.table.static_len:
        raise RuntimeError(
            "a prompt on an ARTCache cannot be compiled: run it through the model as it is, then "
            "call cache.preallocate(max_length) and compile steps of one token, or let generate() "
            "compile them (ARTCache(config, max_length=...), disable_compile=False)"
        )
    if reason is not None or mask is not None:
        raise RuntimeError(_only_steps(reason))


# ---------------------------------------------------------------- decode steps


def _decode_paged(
    settings: LayerSettings,
    layer: ARTLayer,
    query: Tensor,
    new: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    logits: dict[str, Any],
) -> tuple[Tensor, None]:
    info, table = info_of(mask), layer.table
    if new is not None:  # None where layers share keys and another one has stored them
        layer.append(*new, None if info is None else info.real_tokens())
    window: int | None = table.window
    starts = None
    if info is not None:
        window = info.window
        if (first := info.window_starts()) is not None:
            starts, window = torch.from_numpy(first).to(query.device, torch.int32), None
    result = call_operator(
        settings,
        logits,
        plan_paged(settings, layer),
        _dense_now(settings, layer),
        query=query[:, :, 0],
        **layer.pages(),
        sliding_window=window,
        seq_starts=starts,
    )
    if table.static_len:
        settings.stats.add_on_device(settings.layer, result.tokens_read, table.seq_lens, window)
    else:
        rows = None if info is None else info.real_tokens()
        rows = None if rows is None else rows[:, 0]
        if isinstance(table, EvictedTable):
            present: Present = table.present_per_head(rows)
        else:
            present = table.counts.visible_total(rows)
        settings.stats.add(settings.layer, result.tokens_read, present, rows)
    return result.out.unsqueeze(1), None


def _decode_dense(
    module: nn.Module,
    settings: LayerSettings,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    logits: dict[str, Any],
    own: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """A decode step on any other cache: its dense keys are one page per row."""
    batch, _, tokens, _ = key.shape
    info: MaskInfo | None = info_of(mask)
    visible = None if info is None else info.dense_range(batch, key.device)
    if (mask is not None and visible is None) or torch.compiler.is_compiling():
        _note(settings, "the attention mask is not a causal mask with padding at the left")
        return exact_attention(module, query, key, value, mask, own, settings.eager_only)
    pages = settings.single_pages
    if pages is None or pages.shape[0] != batch or pages.device != key.device:
        pages = torch.arange(batch, dtype=torch.int32, device=key.device)[:, None]
        settings.single_pages = pages
    if visible is None:
        everything = torch.full((batch,), tokens, dtype=torch.int32, device=key.device)
        starts, ends, total = None, everything, batch * tokens
    else:
        starts, ends, total = visible
    result = call_operator(
        settings,
        logits,
        # Without a mask a window is not full, or there is none: all tokens are there.
        plan_dense(settings, tokens if info is None else info.start + 1),
        None,
        query=query[:, :, 0],
        key_cache=key.transpose(1, 2),
        value_cache=value.transpose(1, 2),
        block_table=pages,
        seq_lens=ends,
        sliding_window=None,
        seq_starts=starts,
    )
    settings.stats.add(settings.layer, result.tokens_read, total, None)
    return result.out.unsqueeze(1), None


def _dense_now(settings: LayerSettings, layer: ARTLayer) -> Tensor | None:
    """Bool ``[]``: whether a step on a preallocated cache reads everything; None if it never is."""
    static = layer.table.static
    if settings.dense_every is None or static is None:
        return None  # plan_paged knows
    return static.padded_len % settings.dense_every == 0


def call_operator(
    settings: LayerSettings,
    logits: dict[str, Any],
    plan: dict[str, Any],
    dense: Tensor | None,
    **arguments: Any,
) -> ops.DecodeResult:
    """Calls the operator for one layer, measures and reports the call as the patch was asked to.

    Args:
        settings: Of the layer.
        logits: ``scaling``, ``softcap`` and ``s_aux``, as attention functions get them.
        plan: Criterion, walk and sizes.
        dense: Bool ``[]``, on the device: whether to read everything after all; None for no.
        **arguments: The other arguments of :func:`art_torch.decode_attention`.

    Returns:
        What it returned.
    """
    if logits["softcap"]:
        arguments["softcap"] = logits["softcap"]
    if logits["s_aux"] is not None:
        arguments["attn_sinks"] = logits["s_aux"]
    arguments.update(plan, scale=logits["scaling"])
    planned = arguments
    if dense is not None and arguments["criterion"] is not None:
        most = arguments["block_table"].shape[-1] * arguments["key_cache"].shape[1]
        arguments = pin_all_where(dense, most, planned)
    result = ops.decode_attention(**arguments)
    if settings.measure_mass:
        # As planned: the guided walk still has the codes by which mass is estimated.
        settings.stats.add_mass(settings.layer, *mass_read(planned, result))
    if settings.on_call is not None:
        settings.on_call(settings.layer, arguments, result)
    return result
