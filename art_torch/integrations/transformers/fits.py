"""Whether new keys fit the pages of a layer: their device, heads and dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from art_torch.cache import PageTable
from art_torch.page_storage import PageStorage


def fits_dtype(storage: PageStorage | None, key: Tensor) -> bool:
    """Whether keys of this dtype can be stored."""
    return (
        storage is None
        or key.dtype == storage.dtype
        or torch.is_autocast_enabled(key.device.type)  # then they are converted
    )


def check_dtype(storage: PageStorage | None, key: Tensor) -> None:
    """Checks the dtype of keys.

    Raises:
        ValueError: The pages hold another one.
    """
    if not fits_dtype(storage, key):
        assert storage is not None
        raise ValueError(
            f"this ARTCache holds keys of {storage.dtype}: expected the same, got {key.dtype}; "
            "make a new ARTCache for a model of another dtype, or reset() this one"
        )


def check_fits(table: PageTable, storage: PageStorage | None, key: Tensor) -> None:
    """Checks keys ``[batch, num_kv_heads, tokens, head_dim]``.

    Raises:
        ValueError: They are on another device than the pages of the table, or of other heads or of
            another dtype than those of the layer.
    """
    if table.pages.storages and table.device != key.device:
        raise ValueError(
            f"an ARTCache lives on one device: its pages are on {table.device}, and these keys "
            f"are on {key.device}; make a new cache after moving a model, and use a "
            "DynamicCache for a model whose layers are on different devices"
        )
    if storage is None:
        return
    held, got = (storage.num_kv_heads, storage.head_dim), (key.shape[1], key.shape[3])
    if held != got:
        raise ValueError(
            f"this ARTCache holds {held[0]} KV heads of {held[1]} in this layer, and these "
            f"keys have {got[0]} of {got[1]}: it was used by another model; make one for each, "
            "ARTCache(model.config)"
        )
    check_dtype(storage, key)
