"""ARTCache(kv_dtype=torch.int8): a model decodes as with exact attention over rounded keys.

That calls with a rule agree with the reference is in the tests of rules, walks and presses.
"""

from __future__ import annotations

import copy

import pytest
import torch
from rounded import rounded
from test_art_cache import assert_continues
from test_exact import TOKENS, cache_of, generate, left_padded
from tiny_models import LAYERS, SHARING, build, prompt

import art_torch
from art_torch.cache import CacheMemoryError
from art_torch.int8_storage import Int8PageStorage

KINDS = ("rounded", "int8")


def assert_near(got, expected):
    """Where float32 sums differ, a rounding may fall on the other side: a step in one element.

    In the logits of these models, whose deviation is 2.4, that is 1e-3 at most (root mean square);
    what rounding to int8 changes in all is 9e-3 to 0.2.
    """
    assert torch.equal(got.sequences, expected.sequences)
    away = torch.stack(got.logits) - torch.stack(expected.logits)
    assert away.square().mean().sqrt() < 3e-3
    assert away.abs().max() < 0.05


def both(model, ids, **options):
    """The same generation with exact attention over rounded keys, and patched with int8 pages."""
    expected = generate(model, ids, cache_of("rounded", model), **options)
    with art_torch.patch(model, None) as handle:
        got = generate(model, ids, cache_of("int8", model), **options)
    assert handle.stats.read_fraction() == 1.0
    return got, expected, handle


def test_greedy(any_tiny):
    got, expected, handle = both(any_tiny, prompt(1, 90))
    assert_near(got, expected)
    assert handle.stats.steps == TOKENS - 1
    assert handle.stats.exact_fallbacks == 0


def test_it_is_not_the_exact_model(tiny):
    """The comparison above would not see a cache that rounds nothing."""
    model = tiny("llama")
    got, _, _ = both(model, prompt(1, 90))
    exact = generate(model, prompt(1, 90))
    assert torch.equal(got.logits[0], exact.logits[0])  # the prompt sees itself as it came
    assert (got.logits[1] - exact.logits[1]).abs().max() > 0.02


def test_left_padded_batch(any_tiny):
    ids, mask = left_padded(4, 90)
    assert_near(*both(any_tiny, ids, attention_mask=mask)[:2])


def test_beam_search(any_tiny):
    ids, mask = left_padded(2, 90)
    got, expected, _ = both(any_tiny, ids, attention_mask=mask, num_beams=3)
    assert torch.equal(got.sequences, expected.sequences)


def test_prompt_lookup(any_tiny):
    """Passes of several tokens over rounded ones, and tokens that are cropped again."""
    ids = torch.cat([prompt(1, 30)] * 3, dim=1)
    got, expected, _ = both(any_tiny, ids, prompt_lookup_num_tokens=4, max_new_tokens=40)
    assert torch.equal(got.sequences, expected.sequences)


def test_chunked_prefill(any_tiny):
    ids, mask = left_padded(2, 90)
    assert_near(*both(any_tiny, ids, attention_mask=mask, prefill_chunk_size=23)[:2])


@pytest.mark.parametrize("name", sorted(SHARING))
def test_layers_that_share_keys(tiny, name):
    assert_near(*both(tiny(name), prompt(2, 90))[:2])


def test_rows_that_are_edited(any_tiny):
    rows = torch.tensor([2, 2, 0, 3])

    def reorder(cache, mask):
        cache.reorder_cache(rows)
        return mask[rows]

    def select(cache, mask):
        cache.batch_select_indices(torch.tensor([3, 1]))
        return mask[[3, 1]]

    def repeat(cache, mask):
        cache.batch_repeat_interleave(2)
        return mask.repeat_interleave(2, dim=0)

    with art_torch.patch(any_tiny, None):
        for edit, count in ((reorder, 4), (select, 2), (repeat, 8)):
            assert_continues(any_tiny, edit, count, KINDS, atol=0.05)


def test_a_copied_prefix(any_tiny):
    prefix = prompt(1, 60)
    caches = [cache_of(kind, any_tiny) for kind in KINDS]
    any_tiny(prefix, past_key_values=caches[0])
    with art_torch.patch(any_tiny, None):
        any_tiny(prefix, past_key_values=caches[1])
    for n in (5, 9):
        ids = torch.cat([prefix, prompt(1, n, seed=n)], dim=1)
        expected = generate(any_tiny, ids, copy.deepcopy(caches[0]))
        with art_torch.patch(any_tiny, None):
            assert_near(generate(any_tiny, ids, copy.deepcopy(caches[1])), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_stored(dtype):
    """Rows of the model's dtype, rounded; read back in it, pads as zeros."""
    model = build("llama").to(dtype)
    ids, mask = left_padded(3, 90)
    cache, plain = cache_of("int8", model), art_torch.ARTCache(model.config)
    with art_torch.patch(model, None):
        for each in (cache, plain):
            model(ids, attention_mask=mask, past_key_values=each)
    # Later layers of both have seen the same: a prompt sees itself as it came.
    for ours, theirs in zip(cache.layers, plain.layers, strict=True):
        for got, came in zip(ours.history(), theirs.history(), strict=True):
            assert got.dtype == dtype
            assert torch.equal(got, rounded(came))
            assert (got[2, :, :70] == 0).all()


@pytest.mark.parametrize("walk", ["sink_recent", "guided"])
def test_mass_and_dense_steps(tiny, walk):
    """Statistics read the same rounded keys, with the codes that were made of them."""
    model = tiny("llama")
    rule = art_torch.Stability(d_scale=0.3, d_direction=0.1, patience=1)
    options = {"measure_mass": True, "dense_every": 4, "exact_where_faster": False}
    with art_torch.patch(model, rule, walk=walk, block_size=16, **options) as handle:
        generate(model, prompt(2, 400), cache_of("int8", model))
    assert handle.stats.read_fraction() < 1.0
    mass = handle.stats.mass_read()
    assert ((mass.true > 0.4) & (mass.true < 1.0)).all()
    if walk == "guided":
        torch.testing.assert_close(mass.estimated, mass.true, rtol=0.1, atol=0.1)


def test_guided_walk_on_a_preallocated_cache(tiny):
    model = tiny("llama")
    results = []
    for static in (False, True):
        cache = cache_of("int8", model)
        with art_torch.patch(model, None, walk="guided", exact_where_faster=False):
            model(prompt(2, 300), past_key_values=cache)
            if static:
                cache.preallocate(400)
            steps = prompt(2, 70, seed=1).split(1, dim=1)
            positions = (torch.full((2, 1), 300 + i) for i in range(70))
            results.append(
                [
                    model(ids, position_ids=position, past_key_values=cache).logits
                    for ids, position in zip(steps, positions, strict=True)
                ]
            )
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_memory(tiny, page_size):
    """A byte an element and four for a scale, of tokens and heads; the limit counts the same."""
    model = tiny("llama")
    heads, dim = 2, 32
    cache = art_torch.ARTCache(model.config, page_size, kv_dtype=torch.int8)
    with art_torch.patch(model, None):
        model(prompt(1, 512), past_key_values=cache)
    pages = LAYERS * heads * 2 * (dim + 4)
    assert cache.bytes_in_use == 512 * pages
    limit = (512 + page_size) * pages  # a page without tokens in each layer
    small = art_torch.ARTCache(model.config, page_size, limit, kv_dtype=torch.int8)
    with art_torch.patch(model, None):
        model(prompt(1, 512), past_key_values=small)
        with pytest.raises(CacheMemoryError, match=f"limit is {limit:,}"):
            model(prompt(1, 1), past_key_values=small)


def test_keys_written_by_others(tiny):
    """Codes follow codes and scales that PyTorch wrote."""
    model = tiny("llama")
    rule = art_torch.Stability(d_scale=0.3, d_direction=0.1, patience=1)
    results = []
    for key_codes in (True, False):
        cache = art_torch.ARTCache(model.config, key_codes=key_codes, kv_dtype=torch.int8)
        with art_torch.patch(model, None):
            model(prompt(1, 500), past_key_values=cache)
        for layer in cache.layers:
            page = layer.table.block_table[0, 4]
            layer.storage.scales["key_scale"][page] *= 2.0
            assert layer.storage.foreign_writes > 0
        with art_torch.patch(model, rule, walk="guided", exact_where_faster=False):
            results.append(model(prompt(1, 1), past_key_values=cache).logits)
    assert torch.equal(*results)


@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.uint8, "int8"])
def test_other_dtypes(tiny, kv_dtype):
    with pytest.raises(ValueError, match=r"kv_dtype must be torch.int8, or None .*, got"):
        art_torch.ARTCache(tiny("llama").config, kv_dtype=kv_dtype)


def test_only_on_the_cpu():
    with pytest.raises(NotImplementedError, match="int8 caches run on the CPU, got meta"):
        Int8PageStorage(2, 32, 32, 64, torch.float32, torch.device("meta"), 4)
