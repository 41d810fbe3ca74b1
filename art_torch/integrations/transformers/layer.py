"""One layer of an ``ARTCache``.

``Cache.update`` does not see the attention mask, and pad tokens must not be stored. So ``update``
hands over only the new keys and values, marked with their layer, and the attention function, which
does see the mask, appends them (:meth:`ARTLayer.append`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from art_torch.cache import BoolArray, CacheMemoryError, PageTable, Step
from art_torch.code_table import CodeStorage
from art_torch.evicted import EvictedTable, Prompt
from art_torch.integrations.transformers.fits import check_dtype, check_fits, fits_dtype
from art_torch.integrations.transformers.masks import NO_KEYS
from art_torch.integrations.transformers.new_keys import NewKeys
from art_torch.ops import append_kv
from art_torch.page_storage import PageStorage

__all__ = ["ARTLayer"]

_INTERRUPTED_PRESS = (
    "a press did not finish with the prompt of this ARTCache: reset() the cache and run the prompt "
    "again"
)


class _Place(NamedTuple):
    """Where a layer keeps its tokens."""

    table: PageTable
    storage: PageStorage | None
    codes: CodeStorage | None


class ARTLayer(CacheLayerMixin):
    """One layer of an :class:`ARTCache`: its storage, and the page table of its kind of layer.

    Args:
        table: Shared by all layers with the same window.
        leads: Whether this is the first layer of its table in a forward pass.
        lends: Whether other layers may read the keys of this one.
        made_for: Windows and heads of the model that the cache was made for.
        storage_type: Of its pages.
    """

    is_croppable = True

    def __init__(
        self,
        table: PageTable,
        leads: bool,
        lends: bool,
        made_for: tuple[Any, ...],
        storage_type: type[PageStorage] = PageStorage,
    ) -> None:
        super().__init__()
        self.table, self.leads, self.lends = table, leads, lends
        self.made_for, self.storage_type = made_for, storage_type
        self.lent: tuple[Tensor, Tensor] | None = None  # dense keys and values of the last pass
        self.storage: PageStorage | None = None
        self.codes: CodeStorage | None = None  # from the first pass on with codes in the table
        self.pending: tuple[Tensor, Tensor] | None = None
        self.prompt: Prompt | None = None  # not stored yet: presses decide what is
        self._before_eviction: _Place | None = None
        self.padded_len = 0  # tokens this layer has seen; equals the table's between passes

    @property
    def is_sliding(self) -> bool:
        """Whether the layer sees only a window."""
        return self.table.window is not None

    @property
    def record_past(self) -> bool:
        """Whether passes can be undone by ``crop`` although their tokens left the window."""
        return self.table.record_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.table.record_past = value

    def activate_past_recording(self) -> None:
        """Keeps tokens that leave the window until the next ``crop``."""
        self.table.record_past = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Reserves the pages, for keys and values ``[batch, num_kv_heads, tokens, head_dim]``."""
        heads, dims = key_states.shape[1], (key_states.shape[-1], value_states.shape[-1])
        self.storage = self._add_storage(self.table, heads, dims, key_states)
        self.is_initialized = True

    def _add_storage(
        self,
        table: PageTable,
        heads: int,
        dims: tuple[int, int],
        like: Tensor,
        pages: int | None = None,
    ) -> PageStorage:
        """Reserves pages of the dtype and on the device of ``like``; None for what may be."""
        dtype, device = like.dtype, like.device
        table.device = device

        def make(max_pages: int) -> PageStorage:
            size = max_pages if pages is None else pages
            return self.storage_type(heads, *dims, table.page_size, dtype, device, size)

        parts = self.storage_type.parts_of(heads, *dims, table.page_size, dtype)
        return table.pages.add_storage(make, sum(part.num_bytes for part in parts))

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Marks the new keys with this layer; the attention function stores them.

        Args:
            key_states: ``[batch, num_kv_heads, tokens, head_dim]``.
            value_states: ``[batch, num_kv_heads, tokens, value_dim]``.
            *args: Ignored.
            **kwargs: Ignored.

        Returns:
            The new keys and values only.

        Raises:
            RuntimeError: A press was interrupted.
        """
        if self.prompt is not None:
            raise RuntimeError(_INTERRUPTED_PRESS)
        self.pending, self.lent = (key_states, value_states), None
        marked = key_states.as_subclass(NewKeys)
        marked._art_layer = self
        return marked, value_states

    def append(self, key: Tensor, value: Tensor, real: BoolArray | None) -> None:
        """Stores new tokens, leaving out pads.

        Args:
            key: ``[batch, num_kv_heads, tokens, head_dim]``.
            value: ``[batch, num_kv_heads, tokens, value_dim]``.
            real: bool ``[batch, tokens]``, False for a pad; None if there is none.

        Raises:
            CacheMemoryError: The memory limit does not allow it. Nothing is stored then.
            RuntimeError: The layers have seen different numbers of tokens.
            ValueError: The tokens are on another device than the pages, of other heads, or of
                another dtype without autocast.
        """
        table = self.table
        if isinstance(table, EvictedTable):
            key, value, real = table.as_rows(key, value, real)
        if (static := table.static) is not None:
            check_dtype(self.storage, key)
            if key.shape[2] != 1:
                raise RuntimeError(
                    f"a preallocated ARTCache takes one token per row, got {key.shape[2]} with a "
                    "mask of their own: crop(0) goes back to passes of any length"
                )
            self._join_codes()
            if self.leads:
                static.advance(table.codes)
            slots = static.slots
        else:
            slots = self._join_step(key, value, real).slots
        self._write(key, value, slots)
        self._encode()

    def _write(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Writes keys and values, ``[rows, heads, tokens, dim]``, to slots ``[rows * tokens]``."""
        storage = self.storage
        assert storage is not None
        if key.requires_grad or value.requires_grad:
            key, value = key.detach(), value.detach()
        if key.shape[2] == 1:
            key, value = key[:, :, 0], value[:, :, 0]
        else:
            key, value = key.transpose(1, 2).flatten(0, 1), value.transpose(1, 2).flatten(0, 1)
        if not key.dtype == value.dtype == storage.dtype:  # autocast
            key, value = key.to(storage.dtype), value.to(storage.dtype)
        append_kv(key, value, storage.key_cache, storage.value_cache, slots, **storage.scales)

    def _join_step(self, key: Tensor, value: Tensor, real: BoolArray | None) -> Step:
        table, tokens = self.table, key.shape[2]
        self._leave_unfit_pages(key)
        check_fits(table, self.storage, key)
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        self._join_codes()
        step = table.step
        if self.padded_len == table.padded_len:
            step = table.begin_step(key.shape[0], tokens, real)
        elif step is None or step.start != self.padded_len or step.tokens != tokens:
            raise RuntimeError(
                f"this layer has seen {self.padded_len} tokens and the cache holds "
                f"{table.padded_len}: a forward pass was interrupted or skipped layers; "
                "reset() the cache"
            )
        self.padded_len += tokens
        return step

    def _leave_unfit_pages(self, key: Tensor) -> None:
        """Empty pages of another dtype make way for new ones, of all layers of a table at once."""
        if self.storage is None or self.padded_len:
            return
        table, pages = self.table, self.table.pages
        unfit = table.device == key.device and not fits_dtype(self.storage, key)
        if unfit and not table.padded_len:
            pages.drop_storages()
        if self.storage not in pages.storages:
            self.storage, self.is_initialized = None, False

    def pages(self) -> dict[str, Tensor]:
        """Keys, values and where they are, as arguments of :func:`art_torch.decode_attention`."""
        table, storage = self.table, self.storage
        assert storage is not None
        pages = {
            "key_cache": storage.key_cache,
            "value_cache": storage.value_cache,
            "block_table": table.block_table,
            "seq_lens": table.seq_lens,
            **storage.scales,
        }
        return table.per_head(pages) if isinstance(table, EvictedTable) else pages

    # ---------------------------------------------------------------- presses

    @property
    def is_evicted(self) -> bool:
        """Whether a press has compressed the prompt."""
        return self._before_eviction is not None

    def evict(self, keys: Tensor, values: Tensor, kept: Tensor) -> None:
        """Stores what presses have left of the prompt that waits, head by head.

        Args:
            keys: ``[batch, num_kv_heads, candidates, head_dim]``.
            values: ``[batch, num_kv_heads, candidates, value_dim]``.
            kept: bool ``[batch, num_kv_heads, candidates]``, the tokens to store.

        Raises:
            CacheMemoryError: The memory limit does not allow it. Nothing is stored then.
        """
        prompt, shared = self.prompt, self.table
        assert prompt is not None
        table = EvictedTable(shared.page_size, shared.pages.budget, keys.shape[1])
        rows = kept.flatten(0, 1).cpu().numpy()
        pages = int((-(-rows.sum(1) // table.page_size)).sum())
        dims = keys.shape[-1], values.shape[-1]
        # As many again for what follows; a growing storage copies what it has.
        storage = self._add_storage(table, 1, dims, keys, 2 * pages + len(rows))
        step = table.begin_prompt(rows, prompt.keys.shape[2], prompt.real)
        self._before_eviction = _Place(shared, self.storage, self.codes)
        self._move(_Place(table, storage, None))
        self._write(*table.as_rows(keys, values, None)[:2], step.slots)
        self.prompt, self.padded_len = None, table.padded_len
        self.is_initialized = True
        if shared.codes is not None:
            self.use_codes()

    def _move(self, place: _Place) -> None:
        self.table, self.storage, self.codes = place

    def leave_evicted(self) -> None:
        """Back to the pages all layers share, without any token."""
        self.prompt = None
        if self._before_eviction is not None:
            self.table.give_up()
            self._move(self._before_eviction)
            self._before_eviction = None
            self.is_initialized = self.storage is not None

    # ---------------------------------------------------------------- key codes

    def use_codes(self) -> None:
        """Switches key codes on, for tokens that are there as well.

        Raises:
            CacheMemoryError: The memory limit does not allow it. They stay off then.
            NotImplementedError: There are no kernels for the device.
        """
        table = self.table
        if table.codes is not None:
            return
        table.switch_on_codes()
        try:
            self._join_codes()
        except CacheMemoryError:
            table.codes = self.codes = None
            raise

    def guided_arguments(self) -> dict[str, Tensor]:
        """Codes of all complete groups, as arguments of :func:`art_torch.decode_attention`.

        Raises:
            CacheMemoryError: Keys were changed by others, rows shared code pages, and the memory
                limit does not allow one for each.
        """
        self._join_codes()
        codes = self.table.codes
        assert codes is not None
        assert self.codes is not None
        assert self.storage is not None
        # Compiled steps may copy what append_kv was to write: PyTorch then sees our own writes. So
        # others' are looked for when a static phase begins, and after it.
        if not self.table.static_len and self.storage.foreign_writes:
            self.table.renew_codes()
        self.write_void_codes()
        arguments = {"key_codes": self.codes.key_codes, "code_table": codes.code_table}
        table = self.table
        return table.per_head(arguments) if isinstance(table, EvictedTable) else arguments

    def _join_codes(self) -> None:
        """Makes room for codes, if the table has them and the layer has keys."""
        table, storage = self.table, self.storage
        if table.codes is None or self.codes is not None or storage is None:
            return
        self.codes = table.codes.add_storage(storage)
        table.cover_codes()

    def write_void_codes(self) -> None:
        """Writes the codes of all groups, if there are codes and they are void."""
        if self.codes is not None and self.codes.is_void:
            self._encode()

    def _encode(self) -> None:
        """Writes the codes of groups that the last pass completed, or of all if they are void."""
        table = self.table
        if table.codes is None:
            return
        assert self.storage is not None
        assert self.codes is not None
        self.codes.encode(self.storage, table.block_table, table.seq_lens, table.codes)

    # ---------------------------------------------------------------- what transformers asks

    def history(self) -> tuple[Tensor, Tensor] | None:
        """What the next pass may see of earlier tokens, dense, pads as zeros.

        Returns:
            Keys ``[batch, num_kv_heads, tokens, head_dim]`` and values of the same kind; None when
            there is nothing.
        """
        end = self.padded_len
        if end == 0 or self.storage is None:
            return None
        _, start = self.get_mask_sizes(0)
        return self.storage.gather(self.table.history_slots(start, end))

    def get_seq_length(self) -> int:
        """Tokens per row as the model counts them, pads included (a tensor while preallocated)."""
        if self.table.static is not None:
            return self.table.static.padded_len  # type: ignore[return-value]
        return self.padded_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask has to cover.

        None while preallocated: the pages themselves tell what a step sees.
        """
        if self.table.static_len:
            return NO_KEYS
        visible = self.padded_len
        if self.table.window is not None:
            visible = min(visible, self.table.window - 1)
        return visible + query_length, self.padded_len - visible

    def get_max_length(self) -> int:
        """-1: there is no maximum but memory."""
        return -1

    def get_max_cache_shape(self) -> int:
        """-1, the older name of :meth:`get_max_length`."""
        return -1

    def _only_as_a_whole(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("layers of an ARTCache share pages: call this on the cache")

    reset = crop = reorder_cache = offload = prefetch = _only_as_a_whole
    batch_repeat_interleave = batch_select_indices = _only_as_a_whole
