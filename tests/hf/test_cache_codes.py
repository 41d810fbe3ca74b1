"""Key codes of an ARTCache: whatever happens to it, they are those of the keys it holds."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TINY

import art_torch
from art_torch import code_table, encode_keys, key_code_bytes
from art_torch.cache import CacheMemoryError
from art_torch.code_table import CodeStorage, CodeTable

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


def pages_of(table):
    return st.integers(1, table.pages._ids.end - 1)


def action(draw, driven: Driven) -> None:
    """Does something drawn at random to a filled cache."""
    cache, table = driven.cache, driven.table
    kinds = ["step", "append", "pads", "crop", "reorder", "select", "repeat", "static", "write"]
    kind = draw(st.sampled_from([*kinds, "copy", "reset", "switch"]))
    batch = table.batch
    if kind == "step":
        driven.append(batch, 1)
    elif kind == "append":
        driven.append(batch, draw(st.integers(2, 300)))
    elif kind == "pads":
        tokens = draw(st.integers(1, 200))
        pads = draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
        driven.append(batch, tokens, np.arange(tokens)[None] >= np.array(pads)[:, None])
    elif kind == "crop":
        cache.crop(-draw(st.integers(0, min(table.padded_len, 200))))
    elif kind == "reorder":
        rows = st.integers(0, batch - 1)
        cache.reorder_cache(torch.tensor(draw(st.lists(rows, min_size=batch, max_size=batch))))
    elif kind == "select":
        rows = draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=3))
        cache.batch_select_indices(torch.tensor(rows))
    elif kind == "repeat" and batch < 3:
        cache.batch_repeat_interleave(2)
    elif kind == "static":
        steps, more = draw(st.integers(0, 70)), draw(st.integers(0, 70))
        if draw(st.booleans()):
            driven.write(draw(pages_of(table)))
        cache.preallocate(table.counts.longest + steps + more + draw(st.integers(0, 100)))
        for _ in range(steps):
            driven.append(batch, 1)
        if draw(st.booleans()):
            driven.switch_on()
        for _ in range(more):
            driven.append(batch, 1)
        if table.codes is not None:
            driven.check()
        if draw(st.booleans()):
            driven.write(draw(pages_of(table)))
        cache.reorder_cache(torch.arange(batch))  # goes back to lengths on the host
    elif kind == "write":
        driven.write(draw(pages_of(table)))
    elif kind == "copy":
        left, driven.cache = driven.cache, copy.deepcopy(driven.cache)
        left.crop(-min(left.get_seq_length(), 70))
        for layer in left.layers:  # must not reach the copy
            layer.append(*torch.ones(2, batch, HEADS, 130, DIM), None)
    elif kind == "reset":
        cache.reset()
        driven.append(draw(st.integers(1, 3)), draw(st.integers(1, 200)))
    elif kind == "switch":
        driven.switch_on()


@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_after_anything_codes_are_those_of_the_keys(data):
    on = data.draw(st.booleans())
    kv_dtype = data.draw(st.sampled_from([None, torch.int8]))
    page_size = data.draw(st.sampled_from(PAGE_SIZES))
    driven = Driven(page_size, key_codes=on, kv_dtype=kv_dtype)
    driven.append(data.draw(st.integers(1, 3)), data.draw(st.integers(1, 400)))
    for _ in range(data.draw(st.integers(0, 10))):
        action(data.draw, driven)
        if driven.table.codes is not None:
            driven.check()
    driven.switch_on()
    driven.check()


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_a_long_prompt_and_single_tokens(page_size):
    driven = Driven(page_size)
    driven.append(2, 3000)
    driven.check()
    for _ in range(130):
        driven.append(2, 1)
    driven.check()
    assert driven.table.codes.groups.used.tolist() == [3130 // 64] * 2


def test_pads_take_no_place_in_groups():
    driven = Driven()
    real = np.ones((2, 200), np.bool_)
    real[0, :130] = False
    driven.append(2, 200, real)
    driven.check()
    assert driven.table.codes.groups.used.tolist() == [1, 3]


def test_a_shared_record_is_not_written_to():
    driven = Driven()
    driven.append(1, 200)
    driven.cache.batch_repeat_interleave(2)
    groups = driven.table.codes.groups
    assert groups.pages_in_use == 3
    shared = driven.cache.layers[0].codes.key_codes[groups.table[0, :3]].clone()
    left = copy.deepcopy(driven.cache)
    driven.cache.crop(-20)  # into the last complete group of both rows
    driven.append(2, 30)
    driven.check()
    assert groups.table[0, :2].tolist() == groups.table[1, :2].tolist()
    assert groups.table[0, 2] != groups.table[1, 2]
    assert torch.equal(left.layers[0].guided_arguments()["key_codes"][1:4], shared)


def test_steps_between_groups_write_nothing(monkeypatch):
    calls = []
    monkeypatch.setattr(code_table, "encode_keys", lambda *args, **_: calls.append(args))
    driven = Driven()
    driven.append(1, 100)
    assert len(calls) == FULL_LAYERS
    for _ in range(27):
        driven.append(1, 1)
    assert len(calls) == FULL_LAYERS
    driven.append(1, 1)
    assert len(calls) == 2 * FULL_LAYERS


def test_a_copy_has_a_code_table_of_its_own():
    """On a GPU the table is written in place, at every step."""
    driven = Driven()
    driven.append(1, 200)
    codes = driven.table.codes
    before, copied = codes.code_table.clone(), copy.deepcopy(codes)
    assert torch.equal(copied.code_table, before)
    copied.code_table.fill_(-1)
    assert torch.equal(codes.code_table, before)


@pytest.fixture
def renewed(monkeypatch):
    """The code tables that are made anew."""
    tables, renew = [], CodeTable.renew

    def noted(self, lens):
        tables.append(self)
        renew(self, lens)

    monkeypatch.setattr(CodeTable, "renew", noted)
    return tables


@pytest.mark.parametrize("inference", [False, True])
def test_keys_written_by_others_are_encoded_again(inference, renewed):
    driven = Driven()
    with torch.inference_mode(inference):
        driven.append(1, 200)
        driven.cache.batch_repeat_interleave(2)
        driven.append(2, 1)  # row 1 gets a copy of the last page, and our own copy is no write
        storage, codes = driven.cache.layers[1].storage, driven.table.codes
        driven.check()
        assert renewed == []
        storage.key_cache[driven.table.block_table[1, 0], 7] = 3.0
        driven.check()
        assert renewed == [codes]
        storage.value_cache[:] = 1.0  # values have no codes
        driven.append(2, 70)
        driven.check()
        assert renewed == [codes]
        with torch.no_grad():
            storage.key_cache[driven.table.block_table[0, 1].long(), 9:12] *= 2
        left = copy.deepcopy(driven)
        left.check()  # the copy knows as well
        driven.check()
        assert renewed == [codes, left.table.codes, codes]


@pytest.mark.parametrize("max_length", [None, 400])
def test_keys_written_before_it_is_preallocated(max_length, renewed):
    driven = Driven(max_length=max_length)
    driven.append(2, 200)
    driven.check()
    driven.write(driven.table.block_table[0, 1])
    if max_length is None:
        driven.cache.preallocate(400)
    else:
        driven.cache.get_mask_sizes(1, 0)  # a step of one token begins
    assert driven.table.static_len == 400
    driven.check()
    for _ in range(70):
        driven.append(2, 1)
    driven.check()
    with pytest.raises(RuntimeError, match=r"preallocated for 400 tokens .* call leave_static"):
        driven.table.renew_codes()
    driven.cache.crop(-3)
    driven.check()
    assert len(renewed) == 1


def test_keys_written_while_it_is_preallocated():
    """They are encoded again when the cache goes back to lengths on the host."""
    driven = Driven()
    driven.append(2, 200)
    for page, length in enumerate((300, 400)):
        driven.cache.preallocate(length)
        driven.append(2, 1)
        driven.write(driven.table.block_table[1, page])
    driven.cache.crop(0)
    driven.check()


def test_what_a_reset_cache_held_does_not_count(renewed):
    driven = Driven()
    driven.append(2, 200)
    driven.write(driven.table.block_table[1, 0])
    driven.cache.reset()
    driven.append(2, 200)
    driven.check()
    assert renewed == []


def test_rows_that_share_codes_are_written_to_apart():
    driven = Driven(256)
    driven.append(1, 200)
    driven.cache.batch_repeat_interleave(2)
    driven.append(2, 1)  # now the rows have pages of their own, and still the same codes
    groups, pages = driven.table.codes.groups, driven.table.block_table[:, 0].tolist()
    assert pages[0] != pages[1]
    assert groups.table[0, :3].tolist() == groups.table[1, :3].tolist()
    driven.cache.layers[0].storage.key_cache[pages[1], 5] = 2.0
    driven.check()
    assert groups.pages_in_use == 6


@pytest.mark.parametrize("head_dim", [32, 64, 72, 128, 256])
@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_memory(head_dim, page_size):
    """Codes take less than 9 % of 16-bit keys and values, and the budget counts them."""
    used = []
    for key_codes in (False, True):
        cache = art_torch.ARTCache(config(), page_size, key_codes=key_codes)
        for layer in cache.layers:
            new = torch.ones(2, 1, HEADS, 4096, head_dim, dtype=torch.bfloat16)
            layer.append(*new, None)
        used.append((cache.bytes_in_use, cache.budget.used_bytes))
    exact = 2 * FULL_LAYERS * HEADS * 4096 * head_dim * 2
    assert used[0][0] == exact
    for before, after in zip(*used, strict=True):
        print(f"head_dim {head_dim}, pages of {page_size}: {after / before:.4f} x 16-bit KV")
        assert before + FULL_LAYERS * HEADS * 64 * key_code_bytes(head_dim) <= after
        assert after <= 1.09 * before


def budget_for(tokens: int) -> int:
    """Bytes of so many tokens in pages of 16 and their codes, null pages included."""
    pages = -(-tokens // 16) + 1
    groups = 0 if tokens < 64 else tokens // 64 + 1
    page, record = 16 * HEADS * 2 * DIM * 4, HEADS * key_code_bytes(DIM)
    return FULL_LAYERS * (pages * page + groups * record)


def test_memory_limit_counts_codes():
    driven = Driven(16, max_bytes=budget_for(320))
    driven.append(1, 250)
    for _ in range(3):  # nothing changes, so it can be tried again
        with pytest.raises(CacheMemoryError, match="pass a larger max_bytes"):
            driven.append(1, 100)
        driven.check()
    driven.append(1, 70)
    driven.check()
    assert driven.cache.budget.used_bytes == budget_for(320)


def test_nothing_is_claimed_when_only_the_codes_do_not_fit():
    driven = Driven(16, max_bytes=budget_for(320) - 1)
    driven.append(1, 250)
    used = driven.cache.budget.used_bytes
    with pytest.raises(CacheMemoryError, match="pass a larger max_bytes"):
        driven.append(1, 70)
    assert driven.cache.budget.used_bytes == used
    driven.append(1, 69)
    driven.check()


def test_switching_codes_on_needs_room():
    limit = budget_for(320) - FULL_LAYERS * HEADS * key_code_bytes(DIM)
    driven = Driven(16, key_codes=False, max_bytes=limit)
    driven.append(1, 320)
    with pytest.raises(CacheMemoryError, match="pass a larger max_bytes"):
        driven.cache.layers[0].use_codes()
    assert driven.table.codes is None
    driven.cache.crop(-1)
    driven.append(1, 1)  # goes on without
    driven.cache.crop(-10)
    driven.switch_on()
    driven.check()


def test_preallocation_needs_room_for_codes():
    driven = Driven(16, max_bytes=budget_for(320))
    driven.append(1, 200)
    with pytest.raises(CacheMemoryError):
        driven.cache.preallocate(330)
    driven.check()
    driven.cache.preallocate(320)
    for _ in range(120):
        driven.append(1, 1)
    driven.check()
    assert driven.cache.budget.used_bytes == budget_for(320)


def test_preallocation_needs_room_for_renewed_codes():
    """Rows that shared code pages get their own, for their keys may differ now."""
    driven = Driven(16, max_bytes=1 << 24)
    driven.append(1, 200)
    driven.cache.batch_repeat_interleave(2)
    table, budget = driven.table, driven.cache.budget
    shared = table.bytes_to_preallocate(300)
    driven.write(table.block_table[0, 1])
    needed = table.bytes_to_preallocate(300)
    assert needed == shared + 3 * FULL_LAYERS * HEADS * key_code_bytes(DIM)
    budget.max_bytes = budget.used_bytes + needed - 1
    with pytest.raises(CacheMemoryError):
        driven.cache.preallocate(300)
    assert table.codes.keys_were_written
    budget.max_bytes += 1
    driven.cache.preallocate(300)
    assert budget.used_bytes == budget.max_bytes
    driven.check()


def test_codes_that_come_while_it_is_preallocated():
    driven = Driven(key_codes=False)
    driven.append(2, 200)
    driven.cache.preallocate(400)
    driven.append(2, 1)
    driven.switch_on()
    for _ in range(130):
        driven.append(2, 1)
    driven.check()


def test_an_interrupted_pass_is_cropped():
    driven = Driven()
    driven.append(2, 100)
    driven.cache.layers[0].append(*torch.ones(2, 2, HEADS, 40, DIM), None)
    driven.cache.crop(-40)
    driven.append(2, 90)
    driven.check()


def test_windows_have_no_codes():
    cache = art_torch.ARTCache(TINY["gemma2"](), key_codes=True)
    assert [layer.table.codes is not None for layer in cache.layers] == [False, False, True, False]
    with pytest.raises(ValueError, match="full attention, and this table has a window of 40"):
        cache.layers[0].use_codes()
    with pytest.raises(ValueError, match="mistral: key_codes are for full-attention layers"):
        art_torch.ARTCache(TINY["mistral"](), key_codes=True)


def test_only_on_the_cpu():
    cache = art_torch.ARTCache(config(), key_codes=True)
    meta = torch.empty(2, 1, HEADS, 70, DIM, device="meta")
    with pytest.raises(NotImplementedError, match="runs on CPUs and NVIDIA GPUs, got meta"):
        cache.layers[0].append(*meta, None)


def test_copies_of_code_pages():
    storage = CodeStorage(HEADS, DIM, torch.device("cpu"), 4)
    storage.ensure(4)
    storage.key_codes[3] = 7
    storage.copy_pages(torch.tensor([3]), torch.tensor([1]))
    storage.ensure(40)  # more than was reserved
    assert (storage.key_codes[[1, 3]] == 7).all()
    assert storage.key_codes.shape == (40, HEADS, key_code_bytes(DIM))
    assert storage.key_codes.data_ptr() % 16 == 0
