"""An ARTCache with key codes that is fed by hand, and the check that they are those of its keys."""

from __future__ import annotations

import numpy as np
import torch
from tiny_models import TINY

import art_torch
from art_torch import encode_keys, key_code_bytes

HEADS, DIM = 2, 32
FULL_LAYERS = 2
PAGE_SIZES = [16, 48, 64, 128, 256]


def config(**changes):
    made = TINY["llama"]()
    made.update({"num_hidden_layers": FULL_LAYERS, "num_key_value_heads": HEADS} | changes)
    return made


class Driven:
    """An ARTCache that is fed by hand."""

    def __init__(self, page_size: int = 64, key_codes: bool = True, **limits) -> None:
        self.cache = art_torch.ARTCache(config(), page_size, key_codes=key_codes, **limits)
        self.generator = torch.Generator().manual_seed(0)

    @property
    def table(self):
        return self.cache.tables[0]

    def append(self, batch: int, tokens: int, real: np.ndarray | None = None) -> None:
        for layer in self.cache.layers:
            new = torch.randn(2, batch, HEADS, tokens, DIM, generator=self.generator)
            layer.append(new[0], new[1], real)

    def switch_on(self) -> None:
        for layer in self.cache.layers:
            layer.use_codes()

    def write(self, page: int | torch.Tensor) -> None:
        """Changes a page of keys as anybody may."""
        self.cache.layers[1].storage.key_cache[int(page)].mul_(-1)

    def check(self) -> None:
        """Codes written step by step equal those of the whole cache, made at once."""
        table = self.table
        assert table.static_len or table.counts.longest == int(table.seq_lens.max())
        for layer in self.cache.layers:
            codes = layer.guided_arguments()
            rows, groups = codes["code_table"].shape
            fresh = torch.zeros(rows * groups, HEADS, key_code_bytes(DIM), dtype=torch.uint8)
            places = torch.arange(rows * groups, dtype=torch.int32).view(rows, groups)
            keys = layer.storage.key_cache
            scale = layer.storage.scales.get("key_scale")
            encode_keys(keys, table.block_table, table.seq_lens, fresh, places, key_scale=scale)
            for row, length in enumerate(table.seq_lens.tolist()):
                pages = codes["code_table"][row, : length // 64].long()
                assert (pages > 0).all()
                wanted = fresh[places[row, : length // 64].long()]
                assert torch.equal(codes["key_codes"][pages], wanted)
        self.check_pages()

    def check_pages(self) -> None:
        """Code pages are held for complete groups only, and by all who share them."""
        groups = self.table.codes.groups
        if not self.table.static_len:
            assert groups.used.tolist() == (self.table.seq_lens // 64).tolist()
        held, counts = np.unique(groups.table[groups.table > 0], return_counts=True)
        assert groups.pages_in_use == len(held)
        assert (groups._ids.references[held] == counts).all()
