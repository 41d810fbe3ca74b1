"""The pages of one layer in eight bits an element."""

from __future__ import annotations

import torch
from torch import Tensor

from art_torch.page_storage import PagePart, PageStorage

__all__ = ["Int8PageStorage"]


class Int8PageStorage(PageStorage):
    """The same in eight bits an element, and a float32 scale for each token and head, on the CPU.

    ``dtype`` is that in which keys and values come and are read; ``scales`` has ``key_scale`` and
    ``value_scale``, ``[used_pages, page_size, num_kv_heads]``.

    Raises:
        NotImplementedError: The device is not the CPU.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        max_pages: int,
    ) -> None:
        if device.type != "cpu":
            raise NotImplementedError(
                f"int8 caches run on the CPU, got {device}: leave out kv_dtype there"
            )
        super().__init__(num_kv_heads, head_dim, value_dim, page_size, dtype, device, max_pages)

    @classmethod
    def parts_of(
        cls, num_kv_heads: int, head_dim: int, value_dim: int, page_size: int, dtype: torch.dtype
    ) -> tuple[PagePart, ...]:
        """Codes of keys and of values, then the scales of both."""
        codes = super().parts_of(num_kv_heads, head_dim, value_dim, page_size, torch.int8)
        scale = PagePart(torch.float32, (num_kv_heads, page_size))
        return *codes, scale, scale

    def gather(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Reads tokens into dense tensors, see :meth:`PageStorage.gather`.

        They are products of codes and scales in float32, rounded to ``dtype``.
        """
        page = torch.div(slots, self.page_size, rounding_mode="floor")
        offset = slots % self.page_size
        keys, values = (
            (codes[page, offset].float() * scale[page, offset].unsqueeze(-1)).to(self.dtype)
            for codes, scale in zip(
                (self.key_cache, self.value_cache), self.scales.values(), strict=True
            )
        )
        return keys.transpose(1, 2), values.transpose(1, 2)
