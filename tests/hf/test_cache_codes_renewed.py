"""Key codes of an ARTCache whose keys are written to by others: they are made anew."""

from __future__ import annotations

import copy

import pytest
import torch
from coded_cache import Driven

from art_torch.code_table import CodeTable


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
