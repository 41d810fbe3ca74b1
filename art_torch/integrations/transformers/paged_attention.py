"""The attention function for transformers' continuous batching.

Decode rows go to :func:`art_torch.decode_attention` over the pages of transformers' own cache; all
others, and every call outside of continuous batching, to the attention that the model has itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from art_torch.integrations.transformers.attention import LayerSettings, call_operator, settings_of
from art_torch.integrations.transformers.exact import eager_of
from art_torch.integrations.transformers.paged_step import LayerPool, PagedStep, layer_pool
from art_torch.integrations.transformers.plan import READ_ALL, note_unguided
from art_torch.integrations.transformers.presses import has_presses
from art_torch.ops import append_kv

__all__ = ["STEP", "paged_attention"]

# The keyword argument by which a forward pass hands its step to the attention function.
STEP = "art_step"

_WINDOW_NOTE = "continuous batching: layers with a sliding window read all of their window"


# transformers leaves its own paged attention out of compiled graphs as well.
@torch.compiler.disable
def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention over a batch of sequences one behind the other; registered as "art_paged".

    Args:
        module: The attention module, patched and enabled for continuous batching.
        query: ``[1, num_q_heads, tokens, head_dim]``.
        key: ``[1, num_kv_heads, tokens, head_dim]``, of the new tokens.
        value: ``[1, num_kv_heads, tokens, value_dim]``.
        attention_mask: What transformers made for the model's own attention.
        dropout: Probability, in training.
        **kwargs: For the model's own attention, and the :class:`PagedStep` as ``art_step``.

    Returns:
        ``[1, tokens, num_q_heads, value_dim]`` and, outside of continuous batching, the weights if
        asked for.

    Raises:
        NotImplementedError: A press of kvpress is active.
        ValueError: The pages do not fit the units of the walk, or the groups of key codes.
        RuntimeError: The walk is guided, and the pass is recorded in a CUDA graph or the cache was
            made under ``inference_mode()``.
    """
    step: PagedStep | None = kwargs.pop(STEP, None)
    own = dict(kwargs, dropout=dropout)
    if step is None:
        return _own_attention(module, query, key, value, attention_mask, own)
    if has_presses(module):
        raise NotImplementedError(
            "presses of kvpress cannot compress the cache of continuous batching: leave them, or "
            "use generate() with an ARTCache"
        )
    settings = settings_of(module)
    if settings is None:
        return _exact(module, step, query, key, value, attention_mask, own)
    pool = layer_pool(step.cache, settings.layer)
    guided = settings.guided and pool.window is None
    with step.codes.writing(settings.layer, guided, step, pool):
        return _attend(module, settings, step, pool, query, key, value, attention_mask, own)


def _attend(
    module: nn.Module,
    settings: LayerSettings,
    step: PagedStep,
    pool: LayerPool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    own: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Decode rows by the operator, all others by the model's own attention."""
    if not step.decodes:
        return _exact(module, step, query, key, value, mask, own)
    if own.get("position_bias") is not None:
        settings.note_exact("decode steps run with exact attention: the model passes position_bias")
        return _exact(module, step, query, key, value, mask, own)
    if step.is_decode is not None:  # the device alone knows which rows decode
        exact, _ = _exact(module, step, query, key, value, mask, own)
        return step.merge(exact, _decode(settings, step, pool, query, own)), None
    new_keys, new_values = (_of_rows(step, new) for new in (key, value))
    append_kv(new_keys, new_values, pool.key_pages, pool.value_pages, step.rows(pool).slots)
    decoded = _decode(settings, step, pool, query, own)
    if step.tokens is None:
        return decoded[None], None
    out = decoded.new_zeros(1, query.shape[2], *decoded.shape[1:])
    out[0, step.tokens] = decoded
    for sequence, first, end in step.prefills:
        new = slice(first, end)
        inputs, seen = step.prefill_inputs(pool, sequence)
        assert mask is not None
        q, k, v = (part[:, :, new] for part in (query, key, value))
        out[:, new] = _exact(module, step, q, k, v, mask[..., new, seen], own | inputs)[0]
    return out, None


def _of_rows(step: PagedStep, tokens: Tensor) -> Tensor:
    """Of ``[1, heads, tokens, dim]``, the tokens of the decode rows: ``[rows, heads, dim]``."""
    tokens = tokens[0].transpose(0, 1)
    return tokens if step.tokens is None else tokens[step.tokens]


def _decode(
    settings: LayerSettings, step: PagedStep, pool: LayerPool, query: Tensor, own: dict[str, Any]
) -> Tensor:
    """The outputs of the decode rows, ``[rows, num_q_heads, value_dim]``."""
    plan: dict[str, Any] = dict(settings.options, criterion=settings.criterion)
    unit_size = plan["unit_size"]
    if pool.page_size % unit_size:
        raise ValueError(
            f"page_size (block_size in transformers 5.17) of ContinuousBatchingConfig must be a "
            f"multiple of unit_size {unit_size}, got {pool.page_size}: choose another one, or pass "
            "unit_size to art_torch.patch"
        )
    if pool.window is not None:
        # A window is kept as a ring: its pages are not in the order of the text.
        settings.note_once(_WINDOW_NOTE)
        plan |= {"criterion": None, "walk": "oldest_first"}
    rows = step.rows(pool)
    if plan["walk"] == "guided":
        plan |= _guided_plan(settings, step, pool)
    result = call_operator(
        settings,
        {name: own.get(name) for name in ("scaling", "softcap", "s_aux")},
        plan,
        None,
        query=_of_rows(step, query),
        key_cache=pool.key_pages,
        value_cache=pool.value_pages,
        block_table=rows.block_table,
        seq_lens=rows.seq_lens,
        sliding_window=None,
        seq_starts=None,
    )
    if rows.present is None:
        settings.stats.add_on_device(settings.layer, result.tokens_read, rows.seq_lens, None)
    else:
        settings.stats.add(settings.layer, result.tokens_read, rows.present)
    return result.out


def _guided_plan(settings: LayerSettings, step: PagedStep, pool: LayerPool) -> dict[str, Any]:
    """Codes of the decode rows, or a walk that reads everything where that is faster."""
    token_bytes = pool.key_pages[0, 0].nbytes + pool.value_pages[0, 0].nbytes
    tokens = step.rows(pool).block_table.numel() * pool.page_size  # at most
    if tokens * token_bytes < settings.least_guided_bytes:
        note_unguided(settings)
        return READ_ALL
    return step.codes.arguments(settings.layer, step, pool)


# ---------------------------------------------------------------- the model's own attention


def _exact(
    module: nn.Module,
    step: PagedStep,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    own: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """What transformers would do without art_torch: store the new tokens, and attend to all."""
    if "cache" in own:  # before 5.24, the attention function updates the cache
        own = own | {"cache": step.cache}
    else:
        own = dict(own)  # update() changes it
        key, value = step.cache.update(key, value, module.layer_idx, kwargs=own)
    return _own_attention(module, query, key, value, mask, own)


class _OwnModule:
    """An attention module as it was: attention functions read its config."""

    def __init__(self, module: nn.Module, config: PreTrainedConfig) -> None:
        self._module, self.config = module, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _own_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    own: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    config: PreTrainedConfig = module._art_own_config
    function = ALL_ATTENTION_FUNCTIONS.get_interface(
        config._attn_implementation, eager_of(type(module))
    )
    attended: tuple[Tensor, Tensor | None] = function(
        _OwnModule(module, config), query, key, value, mask, **own
    )
    return attended
