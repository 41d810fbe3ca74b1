"""Key codes of an ARTCache: what they take of the memory limit, and where it is short."""

from __future__ import annotations

import pytest
import torch
from coded_cache import DIM, FULL_LAYERS, HEADS, Driven, config

import art_torch
from art_torch import key_code_bytes
from art_torch.cache import CacheMemoryError


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
