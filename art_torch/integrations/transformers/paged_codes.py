"""Key codes of a cache of transformers' continuous batching, for the guided walk.

transformers owns the pages: it hands them out, frees and shares them without telling. So codes go
by where keys are, 64 slots of a page each, and every such group remembers whether anything was
written to it since it was encoded. What no forward pass has written (copies for a forked request,
pages that come back from the CPU) shows in PyTorch's version counter of the pool: then all codes
are void.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from art_torch.guided import GROUP_TOKENS, encode_keys, key_code_bytes
from art_torch.integrations.transformers.paged_step import LayerPool, PagedStep

__all__ = ["PagedCodes"]


class _LayerCodes:
    """Codes of one layer.

    Args:
        pool: Its pages.

    Attributes:
        records: uint8 ``[groups, num_kv_heads, key_code_bytes(head_dim)]``.
        valid: bool ``[groups]``, whether nothing was written to a group since it was encoded.
    """

    def __init__(self, pool: LayerPool) -> None:
        if pool.page_size % GROUP_TOKENS:
            raise ValueError(
                f'walk="guided" encodes keys by {GROUP_TOKENS}: the page_size (block_size in '
                "transformers 5.17) of ContinuousBatchingConfig must be a multiple of that, got "
                f"{pool.page_size}"
            )
        keys = pool.key_pages
        if keys.is_inference():
            raise RuntimeError(
                'walk="guided" must see who writes to the cache, and tensors made under '
                "torch.inference_mode() do not count writes: call generate_batch outside of it"
            )
        self.keys = keys.view(-1, GROUP_TOKENS, *keys.shape[2:])
        heads, dim = keys.shape[2:]
        shape = (pool.num_groups, heads, key_code_bytes(dim))
        self.records = torch.empty(shape, dtype=torch.uint8, device=keys.device)
        self.valid = torch.zeros(pool.num_groups, dtype=torch.bool, device=keys.device)

    def encode(self, pool: LayerPool, groups: Tensor, complete: Tensor) -> None:
        """Encodes those groups whose codes are void.

        Args:
            pool: Of the layer.
            groups: int64 ``[rows, groups]``.
            complete: bool ``[rows, groups]``, whether all tokens of a group are there.
        """
        needed = complete & ~self.valid[groups]
        if needed.is_cuda:  # asking which would wait for the device
            groups, needed = groups.flatten(), needed.flatten()
        elif needed.any():
            # Rows may share pages, and two threads must not write one record.
            groups = groups[needed].unique()
            needed = torch.ones_like(groups, dtype=torch.bool)
        else:
            return
        encode_keys(
            self.keys,
            pool.places_of(groups)[:, None].to(torch.int32),
            needed.to(torch.int32) * GROUP_TOKENS,
            self.records,
            groups[:, None].to(torch.int32),
        )
        self.valid[groups] = self.valid[groups] | needed


class PagedCodes:
    """Key codes of one cache: of the layers that are guided."""

    def __init__(self) -> None:
        self._layers: dict[int, _LayerCodes] = {}
        self._versions: dict[int, int] = {}  # of the pools, by address

    @contextmanager
    def writing(self, layer: int, guided: bool, step: PagedStep, pool: LayerPool) -> Iterator[None]:
        """Around the attention of a layer, which writes the keys of the pass to its pool.

        Args:
            layer: Index of the layer.
            guided: Whether the layer needs codes.
            step: The pass.
            pool: The pages of the layer.

        Raises:
            ValueError: The page size does not fit.
            RuntimeError: Writes to the pool cannot be seen, or are recorded in a CUDA graph.
        """
        if not guided and not self._layers:
            yield
            return
        if is_recorded(pool.key_pages):
            raise RuntimeError(
                'walk="guided" looks before every step for pages that were copied, and a CUDA '
                "graph calls no Python: pass use_cuda_graph=False to ContinuousBatchingConfig"
            )
        if guided and layer not in self._layers:
            self._layers[layer] = _LayerCodes(pool)
        address = _address(pool.key_pages)
        if self._versions.pop(address, None) != pool.key_pages._version:
            for codes in self._layers.values():
                if _address(codes.keys) == address:
                    codes.valid.fill_(False)
        if layer in self._layers:
            self._layers[layer].valid.index_fill_(0, step.written_groups(pool), False)
        yield  # after an exception the version is not known
        self._versions[address] = pool.key_pages._version

    def arguments(self, layer: int, step: PagedStep, pool: LayerPool) -> dict[str, Tensor]:
        """Codes of the decode rows, as arguments of :func:`art_torch.decode_attention`."""
        codes, groups = self._layers[layer], step.groups(pool)
        codes.encode(pool, groups.ids, groups.complete)
        return {"key_codes": codes.records, "code_table": groups.table}


def is_recorded(tensor: Tensor) -> bool:
    """Whether work on the device of a tensor is recorded in a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
