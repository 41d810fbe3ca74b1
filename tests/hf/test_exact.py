"""With criterion None a patched model gives the tokens and logits of its own eager attention."""

from __future__ import annotations

import pytest
import torch
from rounded import RoundedCache
from tiny_models import LAYERS, PAD, SHARING, prompt
from transformers import DynamicCache, StaticCache

import art_torch

TOKENS = 24


def generate(model, ids, cache=None, **kwargs):
    kwargs.setdefault("max_new_tokens", TOKENS)
    return model.generate(
        input_ids=ids,
        past_key_values=cache,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )


def assert_same(got, expected):
    assert torch.equal(got.sequences, expected.sequences)
    for a, b in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def left_padded(batch: int, tokens: int):
    ids = prompt(batch, tokens)
    mask = torch.ones_like(ids)
    for row, pads in enumerate((0, 5, 70, 33)[:batch]):
        ids[row, :pads], mask[row, :pads] = PAD, 0
    return ids, mask


def cache_of(kind: str, model, length: int = 256):
    if kind == "art":
        return art_torch.ARTCache(model.config)
    if kind == "int8":
        return art_torch.ARTCache(model.config, kv_dtype=torch.int8)
    if kind == "rounded":
        return RoundedCache(config=model.config)
    if kind == "static":
        return StaticCache(model.config, max_cache_len=length)
    return DynamicCache(config=model.config) if kind == "dynamic" else DynamicCache()


CACHES = ["art", "dynamic", "dynamic_without_config", "static"]


@pytest.mark.parametrize("kind", CACHES)
def test_greedy(any_tiny, kind):
    ids = prompt(1, 90)
    expected = generate(any_tiny, ids)
    with art_torch.patch(any_tiny, None) as handle:
        assert_same(generate(any_tiny, ids, cache_of(kind, any_tiny)), expected)
    assert handle.stats.steps == TOKENS - 1
    assert handle.stats.exact_fallbacks == 0
    assert handle.stats.read_fraction() == 1.0


@pytest.mark.parametrize("kind", CACHES)
def test_left_padded_batch(any_tiny, kind):
    ids, mask = left_padded(4, 90)
    expected = generate(any_tiny, ids, attention_mask=mask)
    with art_torch.patch(any_tiny, None) as handle:
        got = generate(any_tiny, ids, cache_of(kind, any_tiny), attention_mask=mask)
    assert_same(got, expected)
    assert handle.stats.exact_fallbacks == 0
    assert handle.stats.read_fraction() == 1.0


@pytest.mark.parametrize("kind", ["art", "dynamic"])
def test_beam_search(any_tiny, kind):
    ids, mask = left_padded(2, 90)
    options = {"attention_mask": mask, "num_beams": 3}
    expected = generate(any_tiny, ids, **options)
    with art_torch.patch(any_tiny, None) as handle:
        got = generate(any_tiny, ids, cache_of(kind, any_tiny), **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert handle.stats.exact_fallbacks == 0


def test_prompt_lookup(any_tiny):
    ids = torch.cat([prompt(1, 30)] * 3, dim=1)
    options = {"prompt_lookup_num_tokens": 4, "max_new_tokens": 40}
    expected = generate(any_tiny, ids, **options)
    cache = art_torch.ARTCache(any_tiny.config)
    with art_torch.patch(any_tiny, None):
        got = generate(any_tiny, ids, cache, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert torch.equal(got.sequences, generate(any_tiny, ids, max_new_tokens=40).sequences)


def test_two_turns(any_tiny):
    first, second = prompt(1, 70), prompt(1, 30, seed=1)

    def talk(cache):
        so_far = generate(any_tiny, first, cache).sequences
        return generate(any_tiny, torch.cat([so_far, second], dim=1), cache)

    expected = talk(DynamicCache(config=any_tiny.config))
    with art_torch.patch(any_tiny, None):
        assert_same(talk(art_torch.ARTCache(any_tiny.config)), expected)


def test_two_turns_of_a_ragged_batch(any_tiny):
    """Pads inside the text, as a chat template pads the answers of a batch."""
    ids, mask = left_padded(3, 80)
    ids[1, -20:], mask[1, -20:] = PAD, 0  # a short first turn
    more = prompt(3, 50, seed=1)

    both = torch.cat([ids, more], dim=1)
    full = torch.cat([mask, torch.ones_like(more)], dim=1)

    def talk(cache):
        any_tiny(ids, attention_mask=mask, past_key_values=cache)
        positions = (full.cumsum(1) - 1)[:, 80:129]
        logits = any_tiny(
            more[:, :49],
            attention_mask=full[:, :129],
            position_ids=positions,
            past_key_values=cache,
        ).logits
        return logits, generate(any_tiny, both, cache, attention_mask=full)

    expected = talk(DynamicCache(config=any_tiny.config))
    cache = art_torch.ARTCache(any_tiny.config)
    with art_torch.patch(any_tiny, None) as handle:
        got = talk(cache)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-3)
    assert_same(got[1], expected[1])
    assert handle.stats.exact_fallbacks == 0
    for table in cache.tables.values():  # pads are not stored
        stored = torch.tensor([130, 105, 60]) + TOKENS - 1
        assert torch.equal(table.seq_lens.long(), stored)


def test_crop_and_continue(any_tiny):
    ids = prompt(2, 80)
    expected = generate(any_tiny, ids)
    cache = art_torch.ARTCache(any_tiny.config)
    with art_torch.patch(any_tiny, None):
        cache.activate_past_recording()
        any_tiny(ids, past_key_values=cache)
        any_tiny(prompt(2, 9, seed=5), past_key_values=cache)  # rejected guesses
        cache.crop(-10)
        assert cache.get_seq_length() == 79
        assert_same(generate(any_tiny, ids, cache), expected)


def test_step_by_step_without_a_mask(any_tiny):
    ids = prompt(2, 60)
    expected = any_tiny(ids).logits
    cache = art_torch.ARTCache(any_tiny.config, page_size=16)
    with art_torch.patch(any_tiny, None):
        got = [any_tiny(ids[:, :5], past_key_values=cache).logits]
        got += [any_tiny(ids[:, i : i + 1], past_key_values=cache).logits for i in range(5, 60)]
    torch.testing.assert_close(torch.cat(got, dim=1), expected, rtol=1e-4, atol=1e-3)


def test_pad_as_a_new_token(any_tiny):
    """A row may sit out a step; it is neither stored nor counted."""
    ids = prompt(2, 60)
    mask = torch.ones_like(ids)
    mask[1, 55:58] = 0
    cache, own = art_torch.ARTCache(any_tiny.config), DynamicCache(config=any_tiny.config)
    for i in [50, *range(51, 61)]:
        part = slice(0 if i == 50 else i - 1, i)
        inputs = {
            "input_ids": ids[:, part],
            "attention_mask": mask[:, :i],
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, part],
        }
        expected = any_tiny(**inputs, past_key_values=own).logits
        with art_torch.patch(any_tiny, None) as handle:
            got = any_tiny(**inputs, past_key_values=cache).logits
        real = mask[:, part].bool()
        torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=1e-3)
        if i > 50:
            window = cache.layers[0].table.window
            _, present = handle.stats.per_step(0)
            lens = [mask[row, :i].sum().item() for row in range(2) if real[row]]
            assert present.tolist() == [sum(min(n, window or n) for n in lens)]


def test_user_mask_falls_back(any_tiny, caplog):
    ids = prompt(1, 60)
    mask = torch.ones(1, 60, dtype=torch.long)
    cache, own = art_torch.ARTCache(any_tiny.config), DynamicCache(config=any_tiny.config)
    any_tiny(ids[:, :59], past_key_values=own)
    mask[0, 30:40] = 0  # hides tokens that are in the cache
    inputs = {"input_ids": ids[:, 59:], "attention_mask": mask}
    expected = any_tiny(**inputs, past_key_values=own).logits
    with art_torch.patch(any_tiny, art_torch.Stability()) as handle:
        any_tiny(ids[:, :59], past_key_values=cache)
        got = any_tiny(**inputs, past_key_values=cache).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    assert handle.stats.exact_fallbacks == LAYERS
    assert caplog.text.count("hides tokens that are in the cache") == 1  # not once a layer


@pytest.mark.parametrize("name", sorted(SHARING))
@pytest.mark.parametrize("kind", ["art", "dynamic"])
def test_layers_that_share_keys(tiny, name, kind):
    model, more = tiny(name), prompt(2, 20, seed=1)
    ids, mask = left_padded(2, 90)

    def talk(cache):
        so_far = generate(model, ids, cache, attention_mask=mask).sequences
        both = torch.cat([so_far, more], dim=1)
        full = torch.nn.functional.pad(mask, (0, both.shape[1] - mask.shape[1]), value=1)
        return generate(model, both, cache, attention_mask=full)

    expected = talk(DynamicCache(config=model.config))
    with art_torch.patch(model, None) as handle:
        assert_same(talk(cache_of(kind, model)), expected)
        # One row needs no mask; the sharing layers then get the last query of the prompt alone.
        single = generate(model, ids[1:, 5:], cache_of(kind, model))
    assert handle.stats.layers == list(range(6))
    assert torch.equal(single.sequences, generate(model, ids[1:, 5:]).sequences)
