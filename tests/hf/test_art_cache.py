"""ARTCache as a Cache: what is edited and reused continues as with a DynamicCache."""

from __future__ import annotations

import copy
import io
import pickle
from contextlib import nullcontext

import pytest
import torch
from test_exact import assert_same, cache_of, generate, left_padded
from tiny_models import LAYERS, build, prompt
from transformers import DynamicCache

import art_torch


def assert_continues(model, edit, rows: int, kinds=("dynamic", "art"), atol=1e-3):
    """After a padded prompt and ``edit``, further tokens of ``rows`` rows see the same past."""
    ids, mask = left_padded(4, 90)
    more = prompt(rows, 12, seed=3)
    results = []
    for kind in kinds:
        cache, now = cache_of(kind, model), mask.clone()
        model(ids, attention_mask=mask, past_key_values=cache)
        now = edit(cache, now)
        logits = []
        for tokens in (slice(0, 7), *(slice(i, i + 1) for i in range(7, 12))):
            part = more[:, tokens]
            now = torch.cat([now, torch.ones_like(part)], dim=1)
            positions = (now.cumsum(1) - 1)[:, -part.shape[1] :]
            inputs = {"attention_mask": now, "position_ids": positions, "past_key_values": cache}
            logits.append(model(part, **inputs).logits)
        results.append(torch.cat(logits, dim=1))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=atol)


def test_reorder(any_tiny):
    rows = torch.tensor([2, 2, 0, 3])

    def edit(cache, mask):
        cache.reorder_cache(rows)
        return mask[rows]

    with art_torch.patch(any_tiny, None):
        assert_continues(any_tiny, edit, 4)


@pytest.mark.parametrize("rows", [torch.tensor([3, 1]), torch.tensor([True, False, True, True])])
def test_batch_select_indices(any_tiny, rows):
    def edit(cache, mask):
        cache.batch_select_indices(rows)
        return mask[rows]

    kept = len(torch.arange(4)[rows])
    with art_torch.patch(any_tiny, None):
        assert_continues(any_tiny, edit, kept)


def test_batch_repeat_interleave(any_tiny):
    def edit(cache, mask):
        cache.batch_repeat_interleave(2)
        return mask.repeat_interleave(2, dim=0)

    with art_torch.patch(any_tiny, None):
        assert_continues(any_tiny, edit, 8)


def test_rows_of_an_empty_cache(tiny):
    """There is nothing to select, as in other caches."""
    model = tiny("gemma2")
    cache = art_torch.ARTCache(model.config)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_select_indices(torch.tensor([True, False]))
    cache.batch_repeat_interleave(3)
    with art_torch.patch(model, None):
        got = generate(model, prompt(2, 50), cache)
    assert torch.equal(got.sequences, generate(model, prompt(2, 50)).sequences)


def test_reset_and_reuse(any_tiny):
    cache = art_torch.ARTCache(any_tiny.config)
    with art_torch.patch(any_tiny, None):
        generate(any_tiny, prompt(3, 70, seed=7), cache)
        held = cache.bytes_in_use
        cache.reset()
        assert cache.get_seq_length() == 0
        assert cache.bytes_in_use == 0 < held
        got = generate(any_tiny, prompt(1, 50), cache)
    assert torch.equal(got.sequences, generate(any_tiny, prompt(1, 50)).sequences)


def test_a_copied_prefix(any_tiny):
    """The documented way to reuse the cache of a common prompt is copy.deepcopy."""
    prefix = prompt(1, 60)
    questions = [torch.cat([prefix, prompt(1, n, seed=n)], dim=1) for n in (5, 9)]
    expected = [generate(any_tiny, ids).sequences for ids in questions]
    cache = art_torch.ARTCache(any_tiny.config)
    with art_torch.patch(any_tiny, None):
        any_tiny(prefix, past_key_values=cache)
        for ids, wanted in zip(questions, expected, strict=True):
            assert torch.equal(generate(any_tiny, ids, copy.deepcopy(cache)).sequences, wanted)
        assert cache.get_seq_length() == 60


def test_chunked_prefill(any_tiny):
    ids, mask = left_padded(2, 90)
    expected = generate(any_tiny, ids, attention_mask=mask)
    cache = art_torch.ARTCache(any_tiny.config)
    with art_torch.patch(any_tiny, None):
        got = generate(any_tiny, ids, cache, attention_mask=mask, prefill_chunk_size=23)
    assert torch.equal(got.sequences, expected.sequences)


def test_sampling_draws_the_same(any_tiny):
    ids = prompt(2, 50)
    options = {"do_sample": True, "temperature": 1.0, "max_new_tokens": 10}
    torch.manual_seed(3)
    expected = any_tiny.generate(ids, **options)
    with art_torch.patch(any_tiny, None):
        torch.manual_seed(3)
        got = any_tiny.generate(ids, past_key_values=art_torch.ARTCache(any_tiny.config), **options)
    assert torch.equal(got, expected)


def test_lengths_and_masks(tiny):
    model = tiny("gemma2")  # sliding, sliding, full, sliding
    cache, own = art_torch.ARTCache(model.config), DynamicCache(config=model.config)
    with art_torch.patch(model, None):
        for tokens in (30, 1, 20, 1, 1):
            for each in (cache, own):
                model(prompt(2, tokens), past_key_values=each)
            assert cache.get_seq_length() == own.get_seq_length()
            for layer in range(LAYERS):
                sizes = cache.get_mask_sizes(3, layer)
                assert sizes == own.get_mask_sizes(3, layer)
    assert cache.is_sliding == own.is_sliding
    assert cache.is_croppable
    assert not cache.is_compileable
    assert cache.get_max_length() == -1
    assert len(cache) == LAYERS


def test_crop_takes_negative_numbers(tiny):
    model = tiny("llama")
    cache = art_torch.ARTCache(model.config)
    with art_torch.patch(model, None):
        model(prompt(1, 20), past_key_values=cache)
    cache.crop(0)
    assert cache.get_seq_length() == 20
    cache.crop(torch.tensor(-3))
    assert cache.get_seq_length() == 17
    with pytest.raises(ValueError, match="negative number of tokens to remove, got 5"):
        cache.crop(5)
    with pytest.raises(ValueError, match="can crop 0 to 17 tokens, got 18"):
        cache.crop(-18)
    with pytest.raises(NotImplementedError, match="call this on the cache"):
        cache.layers[0].crop(-1)


def test_crop_of_a_window_that_moved_on(tiny):
    model = tiny("mistral")
    cache = art_torch.ARTCache(model.config)
    with art_torch.patch(model, None):
        model(prompt(1, 100), past_key_values=cache)
        with pytest.raises(RuntimeError, match="call activate_past_recording"):
            cache.crop(-30)


def test_another_batch_needs_a_reset(tiny):
    model = tiny("llama")
    cache = art_torch.ARTCache(model.config)
    with art_torch.patch(model, None):
        model(prompt(2, 20), past_key_values=cache)
        with pytest.raises(ValueError, match="holds 2 sequences, got a batch of 3"):
            model(prompt(3, 1), past_key_values=cache)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("columns", [3, 20])
@pytest.mark.parametrize("padded", [False, True])
def test_a_mask_must_cover_the_past(tiny, name, tokens, columns, padded):
    model = tiny(name)
    cache = art_torch.ARTCache(model.config)
    with art_torch.patch(model, None):
        model(prompt(1, 20), past_key_values=cache)
        short = torch.ones(1, columns, dtype=torch.long)
        short[0, 0] = 0 if padded else 1
        refused = f"cover the 20 tokens of the cache and the {tokens} new ones, got {columns} col"
        with pytest.raises(ValueError, match=refused):
            model(prompt(1, tokens), attention_mask=short, past_key_values=cache)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("columns", [3, 20])
def test_a_short_mask_on_another_cache(tiny, name, columns):
    """transformers hides the tokens behind its end."""
    model, logits = tiny(name), []
    inputs = {"attention_mask": torch.ones(1, columns, dtype=torch.long)}
    inputs["position_ids"] = torch.tensor([[20]])
    for patched in (False, True):
        cache = DynamicCache(config=model.config)
        model(prompt(1, 20), past_key_values=cache)
        with art_torch.patch(model, None) if patched else nullcontext():
            logits.append(model(prompt(1, 1), past_key_values=cache, **inputs).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("max_length", [None, 80])
def test_a_cache_is_not_pickled(tiny, max_length):
    """Lengths of what comes back would stay as they were, and all reserved memory be written."""
    model, ids = tiny("llama"), prompt(1, 20)
    cache = art_torch.ARTCache(model.config, max_bytes=8 << 20, max_length=max_length)
    with art_torch.patch(model, None):
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
        for save in (pickle.dumps, lambda cache: torch.save(cache, io.BytesIO())):
            with pytest.raises(TypeError, match=r"cannot be pickled or saved: .* copy\.deepcopy"):
                save(cache)
        copied = copy.deepcopy(cache)
        steps = [model(ids[:, 1:2], past_key_values=each).logits for each in (cache, copied)]
    assert torch.equal(*steps)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("walk", ["sink_recent", "guided"])
@pytest.mark.parametrize(
    "options", [{}, {"max_length": 130}, {"kv_dtype": torch.int8}], ids=["plain", "fixed", "int8"]
)
def test_a_model_of_another_dtype(name, walk, options):
    """A cache that was reset takes it, and is then as a new one, also in what it claims."""
    model, ids, half = build(name), prompt(2, 90), build(name).to(torch.bfloat16)
    rule = art_torch.Stability(d_scale=0.3, d_direction=0.1, patience=1)
    settings = {"walk": walk, "exact_where_faster": False, "block_size": 16}

    def new():
        return art_torch.ARTCache(model.config, max_bytes=64 << 20, **options)

    cache = new()
    with art_torch.patch(model, rule, **settings), art_torch.patch(half, rule, **settings):
        generate(model, ids, cache)
        refused = r"torch\.float32: expected the same, got torch\.bfloat16; .* or reset\(\)"
        with pytest.raises(ValueError, match=refused):
            half(ids[:, :1], past_key_values=cache)
        for each in (half, model):
            cache.reset()
            fresh = new()
            assert_same(generate(each, ids, cache), generate(each, ids, fresh))
            assert cache.budget.used_bytes == fresh.budget.used_bytes
