"""Key codes of an ARTCache: whatever happens to it, they are those of the keys it holds."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from coded_cache import DIM, FULL_LAYERS, HEADS, PAGE_SIZES, Driven, config
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TINY

import art_torch
from art_torch import code_table, key_code_bytes
from art_torch.code_table import CodeStorage


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
