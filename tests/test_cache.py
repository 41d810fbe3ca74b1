"""The paged cache without a model: a dense copy of every row says what it must hold."""

from __future__ import annotations

import copy
import errno
import mmap

import numpy as np
import pytest
import torch

from art_torch.cache import CacheMemoryError, MemoryBudget, PageStorage, PageTable
from art_torch.ops import append_kv
from art_torch.page_storage import NULL_PAGE

PAGE, HEADS, DIM, VALUE_DIM = 16, 2, 32, 40
PAGE_BYTES = PAGE * HEADS * (DIM + VALUE_DIM) * 4


class Model:
    """A page table with two layers, and what a dense cache would hold."""

    def __init__(self, window: int | None = None, max_bytes: int = 1 << 24) -> None:
        self.budget = MemoryBudget(max_bytes)
        self.table = PageTable(PAGE, window, self.budget, num_layers=2)
        for _ in range(2):
            self.table.pages.add_storage(self.make, PAGE_BYTES)
        self.rows: list[torch.Tensor] = []  # of stored tokens, [tokens, 2, HEADS, DIM + VALUE_DIM]
        self.generator = torch.Generator().manual_seed(0)

    @staticmethod
    def make(max_pages: int) -> PageStorage:
        cpu = torch.device("cpu")
        return PageStorage(HEADS, DIM, VALUE_DIM, PAGE, torch.float32, cpu, max_pages)

    def append(self, batch: int, tokens: int, pads: list[list[int]] | None = None) -> None:
        real = np.ones((batch, tokens), np.bool_)
        for row, columns in enumerate(pads or []):
            real[row, columns] = False
        new = torch.randn(batch, tokens, 2, HEADS, DIM + VALUE_DIM, generator=self.generator)
        if not self.rows:
            self.rows = [new[0, :0] for _ in range(batch)]
        step = self.table.begin_step(batch, tokens, None if pads is None else real)
        for layer, storage in enumerate(self.table.pages.storages):
            part = new[:, :, layer].flatten(0, 1)
            caches = storage.key_cache, storage.value_cache
            append_kv(part[..., :DIM], part[..., DIM:], *caches, step.slots)
        self.rows = [
            torch.cat([row, new[i][torch.from_numpy(real[i])]]) for i, row in enumerate(self.rows)
        ]

    def check(self) -> None:
        """Every visible token is where the table says, in both layers."""
        table = self.table
        assert table.seq_lens.tolist() == [len(row) for row in self.rows]
        for row, expected in enumerate(self.rows):
            start = 0 if table.window is None else max(0, len(expected) + 1 - table.window)
            index = torch.arange(start, len(expected))
            page = table.block_table[row, index // PAGE].long()
            assert (page != NULL_PAGE).all()
            for layer, storage in enumerate(table.pages.storages):
                torch.testing.assert_close(
                    storage.key_cache[page, index % PAGE], expected[start:, layer, :, :DIM]
                )
                torch.testing.assert_close(
                    storage.value_cache[page, index % PAGE], expected[start:, layer, :, DIM:]
                )
        held = np.unique(table.pages.table)
        assert table.pages.pages_in_use == len(held[held != NULL_PAGE])  # none is lost


def test_append_over_page_boundaries():
    model = Model()
    for tokens in (1, 14, 1, 1, 40, 16, 7):
        model.append(3, tokens)
        model.check()
    assert model.table.padded_len == 80
    assert model.table.pages.pages_in_use == 3 * 5


def test_pads_are_not_stored():
    model = Model()
    model.append(2, 40, pads=[[*range(30)], [3, 17, 39]])
    model.check()
    assert model.table.padded_len == 40
    assert model.table.seq_lens.tolist() == [10, 37]
    assert model.table.pages.pages_in_use == 1 + 3
    model.append(2, 1, pads=[[], [0]])
    model.append(2, 1)
    model.check()


def test_history_is_dense_with_pads_as_zeros():
    model = Model()
    model.append(2, 20, pads=[[0, 1, 2, 10], []])
    keys, values = model.table.pages.storages[1].gather(model.table.history_slots(1, 20))
    assert keys.shape == (2, HEADS, 19, DIM)
    assert values.shape == (2, HEADS, 19, VALUE_DIM)
    real = [i for i in range(1, 20) if i not in (1, 2, 10)]
    expected = torch.zeros(HEADS, 19, DIM)
    expected[:, [i - 1 for i in real]] = model.rows[0][:, 1, :, :DIM].transpose(0, 1)
    torch.testing.assert_close(keys[0], expected)
    torch.testing.assert_close(values[1], model.rows[1][1:, 1, :, DIM:].transpose(0, 1))


def test_rows_share_pages_until_one_writes():
    model = Model()
    model.append(2, 40)
    model.table.select_rows(np.array([1, 1, 1]))
    model.rows = [model.rows[1]] * 3
    model.check()
    assert model.table.pages.pages_in_use == 3
    model.append(3, 1)  # copies the last page for two of three rows
    model.check()
    assert model.table.pages.pages_in_use == 5
    model.append(3, 7)
    model.append(3, 1)  # a new page each, nothing to copy
    model.check()
    assert model.table.pages.pages_in_use == 8


def test_a_shared_full_page_is_never_copied():
    model = Model()
    model.append(1, 32)
    model.table.select_rows(np.array([0, 0]))
    model.rows = model.rows * 2
    model.append(2, 1)
    model.check()
    assert model.table.pages.pages_in_use == 2 + 2


@pytest.mark.parametrize("seed", range(4))
def test_random_edits(seed):
    model = Model()
    generator = np.random.default_rng(seed)
    model.append(3, 25)
    for _ in range(60):
        action = generator.integers(4)
        batch = len(model.rows)
        if action == 0:
            model.append(batch, int(generator.integers(1, 30)))
        elif action == 1:
            model.append(batch, 1)
        elif action == 2:
            rows = generator.integers(0, batch, size=generator.integers(1, 5))
            model.table.select_rows(rows)
            model.rows = [model.rows[i] for i in rows]
        elif model.table.padded_len > 1:
            tokens = int(generator.integers(0, min(40, model.table.padded_len)))
            model.table.crop(tokens)
            model.rows = [row[: len(row) - tokens] for row in model.rows]
        model.check()


def test_crop_counts_padded_positions():
    model = Model()
    model.append(2, 40, pads=[[0, 1, 38], []])
    model.table.crop(3)
    model.rows = [model.rows[0][:-2], model.rows[1][:-3]]
    model.check()
    assert model.table.padded_len == 37
    with pytest.raises(ValueError, match="can crop 0 to 37 tokens, got 38"):
        model.table.crop(38)


def test_pages_that_left_the_window_come_back():
    model = Model(window=40)
    model.append(2, 20)
    for _ in range(300):
        model.append(2, 1)
        model.check()
    assert model.table.pages.pages_in_use <= 2 * 4
    assert model.budget.used_bytes <= 2 * PAGE_BYTES * (1 + 2 * 4 + 1)


def test_a_prompt_longer_than_the_window_stores_its_end():
    model = Model(window=40)
    model.append(1, 500)
    model.check()
    assert model.table.pages.pages_in_use <= 4
    model.append(1, 1)
    model.append(1, 90)
    model.check()


def test_window_and_crop():
    model = Model(window=40)
    model.append(1, 100)
    model.append(1, 1)
    model.table.crop(1)  # the last pass can be undone
    model.rows = [model.rows[0][:-1]]
    model.check()
    with pytest.raises(RuntimeError, match="call activate_past_recording"):
        model.table.crop(60)
    model.table.record_past = True
    for _ in range(50):
        model.append(1, 3)
    model.table.crop(150)
    model.rows = [model.rows[0][:-150]]
    model.check()
    assert model.table.pages.pages_in_use <= 4  # cropping lets go of what left the window


def test_memory_limit():
    model = Model(max_bytes=2 * PAGE_BYTES * 6)  # two layers: five pages and the null page
    model.append(1, 70)
    model.check()
    message = r"the KV cache needs [\d,]+ bytes and its limit is [\d,]+: pass a larger max_bytes"
    for _ in range(2):  # nothing has changed, so it can be tried again
        with pytest.raises(CacheMemoryError, match=message):
            model.append(1, 11)
        model.check()
    model.append(1, 10)
    model.check()
    assert isinstance(CacheMemoryError(), MemoryError)
    model.table.reset()
    model.rows = []
    model.append(5, 16)
    model.check()


def test_batch_must_stay():
    model = Model()
    model.append(2, 5)
    with pytest.raises(ValueError, match="holds 2 sequences, got a batch of 3"):
        model.append(3, 1)


def test_growth_keeps_the_memory_where_it_is():
    model = Model()
    model.append(1, 1)
    address = model.table.pages.storages[0].key_cache.data_ptr()
    for _ in range(20):
        model.append(1, 100)
    assert model.table.pages.storages[0].key_cache.data_ptr() == address
    model.check()


def test_growth_past_the_reservation_copies():
    storage = Model.make(4)
    storage.ensure(4)
    storage.key_cache[3] = 1.0
    storage.ensure(40)  # more than was reserved
    assert (storage.key_cache[3] == 1.0).all()
    assert (storage.key_cache[NULL_PAGE] == 0.0).all()
    assert storage.key_cache.shape == (40, PAGE, HEADS, DIM)


def test_layout_keeps_the_tokens_of_a_head_together():
    storage = Model.make(4)
    assert storage.key_cache.stride()[1:] == (DIM, PAGE * DIM, 1)
    assert storage.value_cache.stride()[1:] == (VALUE_DIM, PAGE * VALUE_DIM, 1)
    assert storage.key_cache.data_ptr() % 4096 == 0


def test_unwritten_memory_is_not_resident():
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident()
    storage = PageStorage(8, 128, 128, 64, torch.float32, torch.device("cpu"), 16384)  # 8 GiB
    storage.ensure(16384)
    assert storage.key_cache.numel() * 4 == 4 << 30
    assert resident() - before < 64 << 20


@pytest.mark.parametrize("why", ["refused", "unknown"])
def test_without_huge_pages(why, monkeypatch):
    refusals = []

    class Refusing(mmap.mmap):
        def madvise(self, *advice):
            refusals.append(advice)
            raise OSError(errno.EINVAL, "no huge pages")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    if why == "unknown":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    model = Model()
    model.append(2, 30)
    model.check()
    assert len(refusals) == (2 if why == "refused" else 0)  # a layer each


def test_deep_copy_is_independent():
    model = Model()
    model.append(2, 30)
    clone = copy.deepcopy(model)
    model.append(2, 5)
    clone.append(2, 9)
    model.check()
    clone.check()
    assert clone.table.block_table.data_ptr() != model.table.block_table.data_ptr()


def test_lengths_as_tensors():
    model = Model()
    model.append(2, 30, pads=[[0, 1], []])
    model.table.select_rows(np.array([0, 1, 1]))
    model.rows = [model.rows[0], model.rows[1], model.rows[1]]
    assert model.table.counts.longest == 30
    assert model.table.counts.visible_total() == 28 + 30 + 30
    model.table.preallocate(50)
    for _ in range(20):
        model.table.static.advance(None)
        new = torch.randn(3, 2, HEADS, DIM + VALUE_DIM, generator=model.generator)
        for layer, storage in enumerate(model.table.pages.storages):
            caches = storage.key_cache, storage.value_cache
            append_kv(
                new[:, layer, :, :DIM], new[:, layer, :, DIM:], *caches, model.table.static.slots
            )
        model.rows = [torch.cat([row, new[i : i + 1]]) for i, row in enumerate(model.rows)]
    assert int(model.table.static.padded_len) == 50
    for ask in (lambda: model.table.counts.longest, model.table.counts.visible_total):
        with pytest.raises(RuntimeError, match=r"preallocated for 50 tokens .* read seq_lens"):
            ask()
    model.table.leave_static()
    assert model.table.padded_len == 50
    model.check()
    model.append(3, 20)
    model.check()


def test_preallocate_refuses():
    model = Model(max_bytes=2 * PAGE_BYTES * 6)
    with pytest.raises(ValueError, match="run the prompt through it first"):
        model.table.preallocate(10)
    model.append(1, 30)
    with pytest.raises(ValueError, match=r"at least the 30 tokens .* pass a larger max_length"):
        model.table.preallocate(29)
    with pytest.raises(CacheMemoryError):
        model.table.preallocate(200)
    model.append(1, 1)
    model.check()


@pytest.mark.parametrize("window", [None, 20])
def test_preallocate_claims_what_it_says(window):
    """Pages that left the window are used again, and pages that rows share are copied."""
    model = Model(window)
    model.append(2, 30)
    model.append(2, 10)
    model.table.select_rows(np.array([0, 1, 1]))
    model.rows = [model.rows[0], model.rows[1], model.rows[1]]
    lengths = iter((70, 100, 300))
    for length in lengths:  # the later ones while it is preallocated
        needed = model.table.bytes_to_preallocate(length)
        assert needed > 0
        used = model.budget.used_bytes
        model.budget.max_bytes = used + needed - 1
        model.table.leave_static()
        with pytest.raises(CacheMemoryError):
            model.table.preallocate(length)
        model.check()
        model.budget.max_bytes += 1
        model.table.preallocate(length)
        assert model.budget.used_bytes == used + needed
        model.table.leave_static()
        model.check()
        model.table.preallocate(length)
        for _ in range(25):
            model.table.static.advance(None)
            new = torch.randn(3, 2, HEADS, DIM + VALUE_DIM, generator=model.generator)
            for layer, storage in enumerate(model.table.pages.storages):
                caches = storage.key_cache, storage.value_cache
                part, slots = new[:, layer], model.table.static.slots
                append_kv(part[..., :DIM], part[..., DIM:], *caches, slots)
            model.rows = [torch.cat([row, new[i : i + 1]]) for i, row in enumerate(model.rows)]
