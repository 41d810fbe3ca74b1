"""New keys on their way from a cache to the attention function of a patched model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from art_torch.integrations.transformers.layer import ARTLayer

__all__ = ["NOT_PATCHED", "NewKeys", "layer_of"]

NOT_PATCHED = (
    "ARTCache works with a patched model only, for its attention must read the pages: "
    "use `with art_torch.patch(model, criterion):` (criterion=None is exact). If the model is "
    "patched, a forward pass was interrupted (crop() its tokens or reset() the cache), continuous "
    "batching is enabled (disable() it), or the model computes with cached keys before its "
    "attention (use a DynamicCache)."
)


class NewKeys(Tensor):
    """New keys, marked with the layer whose ``update`` returned them.

    They are not all keys, so any other attention that computes with them would be wrong.
    """

    _art_layer: ARTLayer

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _HARMLESS:
                return func(*args, **(kwargs or {}))
            # Models that share keys between layers make sure that they are on the right device.
            if func is Tensor.to and (same := func(*args, **(kwargs or {}))) is args[0]:
                return same
        raise RuntimeError(NOT_PATCHED)


# What tells of a tensor without reading it.
_HARMLESS = frozenset(
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "requires_grad", "grad_fn", "ndim", "is_cuda")
) | {Tensor.size, Tensor.dim, Tensor.is_floating_point, Tensor.__repr__}


def layer_of(key: Tensor) -> ARTLayer | None:
    """The layer whose ``update`` returned ``key``; None for keys of any other cache."""
    return key._art_layer if isinstance(key, NewKeys) else None
