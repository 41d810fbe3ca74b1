"""What ARTCache(kv_dtype=torch.int8) is compared with: exact attention over rounded keys."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from art_torch import reference


def rounded(rows: torch.Tensor) -> torch.Tensor:
    """What int8 leaves of rows ``[..., dim]``."""
    return reference.dequantize(*reference.quantize(rows), torch.float32).to(rows.dtype)


class RoundedCache(DynamicCache):
    """Keeps rounded keys and values; tokens of one pass see each other as they came."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        both = super().update(rounded(key_states), rounded(value_states), layer_idx)
        new = key_states.shape[2]
        if new == 1:
            return both
        return tuple(
            torch.cat([kept[:, :, :-new], came], dim=2)
            for kept, came in zip(both, (key_states, value_states), strict=True)
        )
