"""One forward pass of transformers' continuous batching: which rows decode, and their pages.

Nothing here waits for a device: lengths and page ids stay the tensors that transformers prepares,
so that a pass can be captured in its CUDA graphs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation.continuous_batching import PagedAttentionCache

from art_torch.guided import GROUP_TOKENS

if TYPE_CHECKING:
    from art_torch.integrations.transformers.paged_codes import PagedCodes

__all__ = ["CodedGroups", "DecodeRows", "LayerPool", "PagedStep", "layer_pool"]


class LayerPool(NamedTuple):
    """Views of the pool of one layer, as ``art_torch.decode_attention`` takes them.

    Attributes:
        key_pages: ``[num_pages, page_size, num_kv_heads, head_dim]``.
        value_pages: ``[num_pages, page_size, num_kv_heads, value_dim]``.
        group: Which of the read and write indices and block tables are the layer's.
        window: Tokens a query of a sliding layer sees: the token at ``position`` is kept at
            ``position % window``; None for full attention.
        page_stride: Page ids of the layer are multiples of this.
    """

    key_pages: Tensor
    value_pages: Tensor
    group: int
    window: int | None
    page_stride: int

    @property
    def kind(self) -> str:
        """``"full_attention"`` or ``"sliding_attention"``, as transformers calls it."""
        return "full_attention" if self.window is None else "sliding_attention"

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return self.key_pages.shape[1]

    # Groups of 64 slots of a page, counted without the pages of other layers.

    @property
    def num_groups(self) -> int:
        """Groups of 64 slots that pages of the layer have."""
        return -(-len(self.key_pages) // self.page_stride) * (self.page_size // GROUP_TOKENS)

    def groups_of(self, pages: Tensor, offsets: Tensor) -> Tensor:
        """Groups of slots, int64, by their page and their offset in it, int64."""
        per_page = self.page_size // GROUP_TOKENS
        return pages // self.page_stride * per_page + offsets // GROUP_TOKENS

    def places_of(self, groups: Tensor) -> Tensor:
        """First slot of each group, divided by 64: int64."""
        per_page = self.page_size // GROUP_TOKENS
        return groups // per_page * (self.page_stride * per_page) + groups % per_page


def layer_pool(cache: PagedAttentionCache, layer: int) -> LayerPool:
    """Finds the pages of a layer.

    Args:
        cache: Of transformers: one tensor ``[tokens, num_kv_heads, head_dim]`` a layer (5.17), or
            one pool whose pages alternate between layers, keys and values (from 5.18 on).
        layer: Index of the layer.

    Returns:
        Views; nothing is copied.
    """
    if hasattr(cache, "layer_to_allocator"):
        allocator = cache.layer_to_allocator[layer]
        window = getattr(allocator, "sliding_window", None)
        key_pages, value_pages = allocator._kv_page_views[layer]
        stride = allocator.block_physical_stride // key_pages.shape[1]
        return LayerPool(key_pages, value_pages, allocator.index, window, stride)
    group, index = cache.layer_index_to_group_indices[layer]
    window = None if cache.sliding_windows[layer] == 1 else cache.sliding_windows[layer]
    key, value = cache.key_cache[index], cache.value_cache[index]
    shape = (-1, cache.block_size, *key.shape[1:])
    return LayerPool(key.view(shape), value.view(shape), group, window, 1)


class DecodeRows(NamedTuple):
    """The decode rows of one forward pass, for the layers of one group.

    Attributes:
        block_table: int32 ``[rows, max_pages]``.
        seq_lens: int32 ``[rows]``; 0 for a row that does not decode.
        slots: int64 ``[rows]``, where the new tokens are stored; -1 for nowhere.
        present: Sum of ``seq_lens``; None where only the device knows it.
    """

    block_table: Tensor
    seq_lens: Tensor
    slots: Tensor
    present: int | None


class CodedGroups(NamedTuple):
    """Of the decode rows, where the codes of their keys are.

    Attributes:
        ids: int64 ``[rows, groups]``, the group of each 64 tokens; any where there are fewer.
        table: The same as int32.
        complete: bool ``[rows, groups]``, whether all 64 tokens are there.
    """

    ids: Tensor
    table: Tensor
    complete: Tensor


class PagedStep(PagedAttentionCache):
    """What one forward pass works on.

    It takes the place of the cache among the arguments of the model, since models of transformers
    5.24 update the cache themselves, which would copy all keys and values that the batch reads.

    Args:
        inputs: Keyword arguments that transformers passes to the model.
        codes: Key codes of the cache.

    Attributes:
        cache: The cache of transformers.
        codes: As above.
        decodes: Whether there are decode rows.
        tokens: int64 ``[rows]``, where the queries of the rows are; None where every token is one.
        prefills: Sequences that do not decode: index, first token and end. Empty where every
            sequence is a row.
        is_decode: bool ``[rows]``, which rows decode, if only the device knows; None if all do.
    """

    def __init__(self, inputs: dict[str, Any], codes: PagedCodes) -> None:
        self.cache: PagedAttentionCache = inputs["cache"]
        self.codes = codes
        self.prefills: list[tuple[int, int, int]] = []
        self.tokens: Tensor | None = None
        self.is_decode: Tensor | None = None
        self._inputs = inputs
        self._sequences: Tensor | None = None  # of the rows; None for all
        self._rows: dict[int, DecodeRows] = {}
        self._groups: dict[int, CodedGroups] = {}
        self._written: dict[int, Tensor] = {}
        self._read_index, self._write_index = inputs["read_index"], inputs["write_index"]
        self._block_table: Tensor | None = inputs["block_table"]
        self._positions: Tensor = inputs["position_ids"][0]
        # transformers reads nothing where no sequence has earlier tokens.
        reads = self._block_table is not None or any(index.numel() for index in self._read_index)
        self.decodes = reads
        # The names until 5.18 and from 5.19 on.
        self._longest = "max_seqlen" if "max_seqlen_q" in inputs else "max_length"
        if not reads or self._block_table is not None or inputs[f"{self._longest}_q"] == 1:
            return
        if lengths_on_host(inputs):
            self._split()
        else:
            bounds = inputs["cu_seq_lens_q"].long()
            self.is_decode = bounds.diff() == 1
            self.tokens = bounds[:-1].clamp(max=len(self._positions) - 1)

    def _split(self) -> None:
        bounds = self._inputs["cu_seq_lens_q"].long()
        lens = bounds.diff()
        self._sequences = (lens == 1).nonzero()[:, 0]
        self.tokens = bounds[self._sequences]
        self.decodes = len(self.tokens) > 0
        ends = bounds.tolist()
        for sequence in (lens > 1).nonzero()[:, 0].tolist():
            self.prefills.append((sequence, ends[sequence], ends[sequence + 1]))

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Hands over only the new keys and values; the attention function stores them."""
        return key_states, value_states

    def _key_bounds(self, pool: LayerPool) -> Tensor:
        """Where the keys of each sequence begin in the read index: int64 ``[sequences + 1]``."""
        bounds = self._inputs["cu_seq_lens_k"]
        of_kind: Tensor = bounds[pool.kind] if isinstance(bounds, dict) else bounds
        return of_kind.long()

    def rows(self, pool: LayerPool) -> DecodeRows:
        """The decode rows for a layer, computed once for all layers of its group."""
        if pool.group not in self._rows:
            self._rows[pool.group] = self._make_rows(pool)
        return self._rows[pool.group]

    def groups(self, pool: LayerPool) -> CodedGroups:
        """Where codes of the decode rows are, computed once for all layers of a group."""
        if pool.group not in self._groups:
            rows = self.rows(pool)
            # Entries without a visible token may be anything.
            pages = rows.block_table.long().clamp(0, len(pool.key_pages) - 1)[..., None]
            offsets = torch.arange(0, pool.page_size, GROUP_TOKENS, device=pages.device)
            ids = pool.groups_of(pages, offsets).flatten(1)
            ends = torch.arange(1, ids.shape[1] + 1, device=ids.device) * GROUP_TOKENS
            self._groups[pool.group] = CodedGroups(
                ids, ids.to(torch.int32), ends <= rows.seq_lens[:, None]
            )
        return self._groups[pool.group]

    def written_groups(self, pool: LayerPool) -> Tensor:
        """Groups of 64 slots that this pass writes to, int64 ``[tokens]``, some of them twice."""
        if pool.group not in self._written:
            if self._block_table is None:
                slots = self._write_index[pool.group].long()
            else:
                slots = self.rows(pool).slots
            # A token that is not stored has slot -1; voiding the codes of group 0 loses nothing.
            slots = slots.clamp(min=0)
            groups = pool.groups_of(slots // pool.page_size, slots % pool.page_size)
            self._written[pool.group] = groups
        return self._written[pool.group]

    def _make_rows(self, pool: LayerPool) -> DecodeRows:
        bounds = self._key_bounds(pool)
        starts, lens = bounds[:-1], bounds.diff()
        if self._sequences is not None:
            starts, lens = starts[self._sequences], lens[self._sequences]
        if self.is_decode is not None:
            lens = lens.where(self.is_decode, 0)
        if self._block_table is None:
            written = self._write_index[pool.group]
            slots = written if self.tokens is None else written[self.tokens]
            table = self._table_of_slots(pool, starts, lens, slots)
        else:
            table = self._block_table[pool.group]
            last = (lens - 1).clamp(min=0)
            page = table.gather(1, (last // pool.page_size)[:, None])[:, 0]
            slots = torch.where(lens > 0, page * pool.page_size + last % pool.page_size, -1)
        present = None if lens.is_cuda or self.is_decode is not None else int(lens.sum())
        return DecodeRows(table, lens.to(torch.int32), slots, present)

    def _table_of_slots(
        self, pool: LayerPool, starts: Tensor, lens: Tensor, slots: Tensor
    ) -> Tensor:
        """Page ids, from where transformers reads and writes each token.

        Args:
            pool: Of the layer.
            starts: int64 ``[rows]``, first of the row's tokens in the read index.
            lens: int64 ``[rows]``.
            slots: int64 ``[rows]``, where the new token is written.

        Returns:
            int32 ``[rows, max_pages]``. Pages without a visible token may be any.
        """
        read = self._read_index[pool.group]
        longest = self._inputs[f"{self._longest}_k"]
        longest = longest[pool.kind] if isinstance(longest, dict) else longest
        page_starts = torch.arange(0, longest, pool.page_size, device=read.device)[None, :]
        if pool.window is None:
            token = page_starts.expand(len(lens), -1)
        else:
            # Tokens are read oldest first, and kept in a ring: which one begins the page?
            positions = self._positions if self.tokens is None else self._positions[self.tokens]
            oldest = positions.long() - (lens - 1)
            token = (page_starts - oldest[:, None]) % pool.window
        earlier = read[(starts[:, None] + token).clamp(max=read.numel() - 1)]
        # A sliding layer reads the new token before it is stored.
        slot = torch.where(token == lens[:, None] - 1, slots[:, None], earlier)
        return (slot // pool.page_size).to(torch.int32)

    def prefill_inputs(self, pool: LayerPool, sequence: int) -> tuple[dict[str, Any], slice]:
        """What transformers' own attention needs to know of one sequence that does not decode.

        Args:
            pool: Of the layer.
            sequence: Index of the sequence.

        Returns:
            Read and write indices of the sequence alone, and which keys of the mask are its own.
        """
        first, end = self._inputs["cu_seq_lens_q"][sequence : sequence + 2].tolist()
        keys = slice(*self._key_bounds(pool)[sequence : sequence + 2].tolist())
        read, write = list(self._read_index), list(self._write_index)
        read[pool.group], write[pool.group] = read[pool.group][keys], write[pool.group][first:end]
        return {"read_index": read, "write_index": write}, keys

    def merge(self, exact: Tensor, decoded: Tensor) -> Tensor:
        """Replaces the outputs of decode rows, where only the device knows which they are.

        Args:
            exact: ``[1, tokens, num_q_heads, value_dim]``.
            decoded: ``[rows, num_q_heads, value_dim]``.

        Returns:
            As ``exact``.
        """
        assert self.is_decode is not None
        assert self.tokens is not None
        count = exact.shape[1]
        # Rows that do not decode go to a token behind the last one.
        to = self.tokens.where(self.is_decode, count)
        outputs = exact.new_zeros(count + 1, *exact.shape[2:]).index_copy_(0, to, decoded)
        used = torch.zeros(count + 1, dtype=torch.bool, device=exact.device)
        used = used.index_copy_(0, to, self.is_decode)
        return torch.where(used[:count, None, None], outputs[:count], exact)


def lengths_on_host(inputs: dict[str, Any]) -> bool:
    """Whether sequences can be told apart without waiting for a device, and have masks to cut."""
    return inputs["cu_seq_lens_q"].device.type == "cpu" and inputs["attention_mask"] is not None
