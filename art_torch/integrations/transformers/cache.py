"""``ARTCache``: the paged KV cache as a transformers ``Cache``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, cache_utils
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from art_torch.cache import PageTable
from art_torch.int8_storage import Int8PageStorage
from art_torch.integrations.transformers.layer import ARTLayer
from art_torch.integrations.transformers.new_keys import NOT_PATCHED
from art_torch.page_storage import MemoryBudget, PageStorage

__all__ = ["ARTCache", "shape_of"]

DEFAULT_PAGE_SIZE = 64

# Stands for a layer that reads the keys of another one; 5.17 leaves such layers out instead.
_DummyLayer: type | None = getattr(cache_utils, "DummyLayer", None)

# Of _layer_windows, for layers whose keys are not in pages.
_DUMMY, _LINEAR = "dummy", "linear"


class ARTCache(Cache):
    """A paged KV cache for models patched with :func:`art_torch.patch`.

    New tokens are written in place, memory grows by whole pages without copying old ones, pad
    tokens are never stored, and beams share their common pages until one of them writes. Layers
    with a sliding window hand back the pages that left it. Layers of linear attention keep their
    states as in any other cache. Of a prompt that a press of kvpress compresses, only what it keeps
    is stored, head by head (``docs/kvpress.md``). ``copy.deepcopy`` copies a cache; it cannot be
    pickled or saved. On the CPU its memory is advised to use huge pages; where the system has none
    or refuses them, it uses small ones, which is slower, and nothing tells.

    Args:
        config: The model's config (``model.config``).
        page_size: Tokens a page, a multiple of 16. Default 64.
        max_bytes: Memory limit for keys, values and key codes. Default: half of the device's
            memory.
        key_codes: Keep two-bit codes of the keys of full-attention layers, about 8 % of 16-bit keys
            and values, for ``patch(model, criterion, walk="guided")``. A model patched so switches
            them on by itself. Codes follow everything the cache does. After keys were written to by
            others, through PyTorch, they are made anew (of a preallocated cache when that ends;
            ``docs/key_codes.md`` says what is not noticed).
        kv_dtype: ``torch.int8`` keeps keys and values in eight bits an element, on the CPU: each
            token of a head is rounded to 255 multiples of a float32 scale of its own when it is
            stored (``docs/int8.md``). Tokens of a forward pass see each other as they came, a
            decode step reads what is stored. None keeps them as they are.
        max_length: Tokens a row may reach, pads not counted; None for no limit but memory. With it
            the cache is preallocated, see :meth:`preallocate`, whenever a step of one token begins,
            and ``generate`` can compile that step (``docs/compiled.md``).

    Raises:
        TypeError: ``config`` is not a model config.
        ValueError: The page size does not fit, a limit is not positive, ``kv_dtype`` is another
            one, the model has layers that are neither full, sliding-window nor linear attention,
            or linear ones only, or ``key_codes`` is asked for and no layer is full attention.
    """

    layers: list[Any]

    def __init__(
        self,
        config: PreTrainedConfig,
        page_size: int | None = None,
        max_bytes: int | None = None,
        key_codes: bool = False,
        kv_dtype: torch.dtype | None = None,
        max_length: int | None = None,
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(f"config must be model.config, got {type(config).__name__}")
        page_size = DEFAULT_PAGE_SIZE if page_size is None else page_size
        if page_size < 16 or page_size % 16:
            raise ValueError(f"page_size must be a positive multiple of 16, got {page_size}")
        if kv_dtype not in (None, torch.int8):
            raise ValueError(
                f"kv_dtype must be torch.int8, or None for the dtype of the model, got {kv_dtype}"
            )
        for name, limit in (("max_bytes", max_bytes), ("max_length", max_length)):
            if limit is not None and limit <= 0:
                raise ValueError(f"{name} must be positive, got {limit}")
        text_config = config.get_text_config(decoder=True)
        shape = shape_of(config)
        windows = shape[0]
        kinds = [window for window in windows if isinstance(window, int)]
        self.budget = MemoryBudget(max_bytes)
        self.tables = {
            window: PageTable(page_size, window or None, self.budget, kinds.count(window))
            for window in dict.fromkeys(kinds)
        }
        if key_codes and 0 not in self.tables:
            raise ValueError(
                f"{config.model_type}: key_codes are for full-attention layers, and it has none"
            )
        if key_codes:
            self.tables[0].switch_on_codes()
        self.page_size, self.max_length = page_size, max_length
        self._unused: ARTLayer | None = None
        layers: list[Any] = []
        lends = _DUMMY in windows or bool(getattr(text_config, "num_kv_shared_layers", None))
        others = DynamicCache(config=text_config).layers
        led: set[Any] = set()
        storage = PageStorage if kv_dtype is None else Int8PageStorage
        for index, window in enumerate(windows):
            if not isinstance(window, int):
                layers.append(others[index])
                continue
            layers.append(ARTLayer(self.tables[window], window not in led, lends, shape, storage))
            led.add(window)
        super().__init__(layers=layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hands new keys and values to the attention function of a patched model.

        Args:
            key_states: ``[batch, num_kv_heads, tokens, head_dim]``.
            value_states: ``[batch, num_kv_heads, tokens, value_dim]``.
            layer_idx: Layer they belong to.
            *args: Ignored.
            **kwargs: Ignored.

        Returns:
            The new keys and values, not those of earlier tokens.

        Raises:
            RuntimeError: The attention before this one did not read the pages: the model is not
                patched.
            ValueError: The cache was made for a model with fewer layers.
        """
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"this ARTCache was made for a model of {len(self.layers)} layers, and layer "
                f"{layer_idx} of another one asks for its keys: use ARTCache(model.config)"
            )
        if self._unused is not None and self._unused.pending is not None:
            raise RuntimeError(NOT_PATCHED)
        self._unused = layer = self.layers[layer_idx]
        return layer.update(key_states, value_states)  # type: ignore[no-any-return]

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile steps: with ``max_length``."""
        return self.max_length is not None and all(layer.is_compileable for layer in self._linear())

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask has to cover; a forward pass begins by it."""
        if query_length != 1:
            self._leave_static()
        elif self.max_length is not None and not torch.compiler.is_compiling():
            self._enter_static(self.max_length)
        return super().get_mask_sizes(query_length, layer_idx)  # type: ignore[no-any-return]

    def _enter_static(self, max_length: int) -> None:
        tables = self._tables_in_use()
        if all(table.padded_len and not table.static_len for table in tables):
            self.preallocate(max_length)

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the pages that hold tokens, and of their key codes."""
        return sum(table.bytes_in_use for table in self._tables_in_use())

    def preallocate(self, max_length: int) -> None:
        """Allocates pages ahead, so that a decode step needs no bookkeeping on the host.

        Call it after the prompt has run. From then on lengths are tensors and a step of one token
        per row can be compiled with ``torch.compile(fullgraph=True)``. Pass ``position_ids`` and no
        attention mask: pads are not stored. Any other use (a longer pass, ``crop``, beams) goes
        back to lengths on the host. Sliding windows give no pages back meanwhile. With
        ``max_length`` nobody has to call it.

        Args:
            max_length: Tokens a row may reach, pads not counted.

        Raises:
            CacheMemoryError: The memory limit does not allow it. Nothing has changed then.
            ValueError: The cache is empty, or longer already.
            NotImplementedError: A press has compressed it.
        """
        tables = self._tables_in_use()
        needed = sum(table.bytes_to_preallocate(max_length) for table in tables)
        self.budget.check(needed, tables[0].device)
        self._leave_static()
        try:
            for table in tables:
                table.preallocate(max_length)
            for layer in self._paged():  # here, and not within a step that is compiled
                layer.write_void_codes()
        except BaseException:  # the device itself has no more memory
            self._leave_static()
            raise

    def _leave_static(self) -> None:
        for layer in self._paged():
            if layer.table.static_len:
                layer.table.leave_static()
                for other in self._paged():
                    if other.table is layer.table:
                        other.padded_len = layer.table.padded_len

    def _paged(self) -> list[ARTLayer]:
        return [layer for layer in self.layers if isinstance(layer, ARTLayer)]

    def _linear(self) -> list[LinearAttentionLayer]:
        return [layer for layer in self.layers if isinstance(layer, LinearAttentionLayer)]

    def _tables_in_use(self) -> list[PageTable]:
        """Those of :attr:`tables`, and one for each layer that a press has compressed."""
        return list(dict.fromkeys(layer.table for layer in self._paged()))

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens of every row.

        Args:
            tokens_to_remove: Zero or negative; -3 removes three tokens per row, pads counted.

        Raises:
            ValueError: It is positive, or there are not that many tokens.
            RuntimeError: A sliding window has dropped tokens that would be visible again, a layer
                of linear attention cannot go back, or tokens of a prompt that a press has
                compressed would be removed.
        """
        tokens_to_remove = int(tokens_to_remove)  # generate() passes a tensor
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes a negative number of tokens to remove, got {tokens_to_remove}"
            )
        self._edit()
        tables = self._tables_in_use()
        end = max(table.padded_len for table in tables) + tokens_to_remove
        for index, layer in enumerate(self.layers):
            # Layers differ after an interrupted forward pass, which cropping can undo.
            if isinstance(layer, ARTLayer) and layer.is_initialized and layer.padded_len < end:
                raise RuntimeError(
                    f"layer {index} has seen {layer.padded_len} tokens, too few to crop to {end}: "
                    "a forward pass was interrupted; crop more tokens or reset() the cache"
                )
        linear = self._linear() if tokens_to_remove else []
        for layer in linear:
            if not layer.is_croppable:
                raise RuntimeError(
                    "cannot crop: the model has layers of linear attention, whose states do not "
                    "go back; reset() the cache"
                )
            if not layer.record_past:
                raise RuntimeError(
                    "cannot crop: layers of linear attention have kept no earlier states; call "
                    "activate_past_recording() before the tokens that are to be removed"
                )
        for table in tables:
            table.crop(table.padded_len - end)
        for layer in linear:  # nothing is left that could fail
            layer.crop(tokens_to_remove)
        for layer in self._paged():
            layer.padded_len = min(layer.padded_len, end)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes the old row ``beam_idx[i]``, int64 ``[batch]``; pages are shared."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows ``indices``: int64 ``[n]`` or bool ``[batch]``."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row ``repeats`` times; pages are shared."""
        self._select(torch.arange(self._batch).repeat_interleave(repeats))

    def _select(self, rows: Tensor) -> None:
        self._edit()
        if self._batch == 0:
            return  # nothing to select from, as in other caches
        chosen = np.arange(self._batch)[torch.as_tensor(rows).cpu().numpy()]
        for table in self._tables_in_use():
            table.select_rows(chosen)
        for layer in self._linear():
            layer.reorder_cache(torch.from_numpy(chosen))

    @property
    def _batch(self) -> int:
        return max(table.sequences for table in self._tables_in_use())

    def _edit(self) -> None:
        self._leave_static()
        self._unused = None
        for layer in self._paged():
            layer.pending = layer.lent = None

    def reset(self) -> None:
        """Empties the cache; its memory is kept for the next sequences, if of the same dtype."""
        self._edit()
        for layer in self._paged():
            layer.leave_evicted()
            layer.padded_len = 0
        for table in self.tables.values():
            table.reset()
        for linear in self._linear():
            linear.reset()
            # Its states have the old batch: the next prompt makes them anew.
            for made in (linear.is_conv_states_initialized, linear.is_recurrent_states_initialized):
                made.update(dict.fromkeys(made, False))


def shape_of(config: PreTrainedConfig) -> tuple[Any, ...]:
    """What a cache is made for: the window of each layer, and KV heads and head size.

    The window is 0 for full attention, and a name for a layer without pages. Where layers differ in
    heads, there are heads and sizes of each. These are compared only, with those of another config:
    a rank of a tensor-parallel model has fewer heads.

    Raises:
        ValueError: An ``ARTCache`` cannot hold the keys of such a model.
    """
    config = config.get_text_config(decoder=True)
    per_layer = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    names = ("num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim")
    heads = []
    for part in per_layer:
        queries, keys, hidden, dim = (getattr(part, name, None) for name in names)
        heads.append((keys or queries, dim or (hidden, queries)))
    return _layer_windows(config, per_layer), tuple(heads)


def _layer_windows(config: PreTrainedConfig, per_layer: Any) -> tuple[Any, ...]:
    if any(getattr(part, "attention_chunk_size", None) is not None for part in per_layer):
        raise ValueError(
            f"{config.model_type}: chunked attention is not supported by ARTCache; use a "
            "DynamicCache"
        )
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(
            f"{config.model_type}: ARTCache does not hold the latent keys of MLA; use a "
            "DynamicCache"
        )
    if getattr(config, "cross_attention_layers", None):
        raise ValueError(
            f"{config.model_type}: ARTCache does not hold the keys of cross-attention layers; use "
            "a DynamicCache"
        )
    windows: list[Any] = []
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) is DynamicLayer:
            windows.append(0)
        elif type(layer) is DynamicSlidingWindowLayer:
            windows.append(layer.sliding_window)
        elif type(layer) is _DummyLayer:
            windows.append(_DUMMY)
        elif type(layer) is LinearAttentionLayer:
            windows.append(_LINEAR)
        else:
            raise ValueError(
                f"{config.model_type}: ARTCache holds full and sliding-window attention, and layer "
                f"{index} needs {type(layer).__name__}; use a DynamicCache"
            )
    if all(window == _LINEAR for window in windows):
        raise ValueError(
            f"{config.model_type}: ARTCache holds full and sliding-window attention, and this "
            "model has neither; use a DynamicCache"
        )
    return tuple(windows)
