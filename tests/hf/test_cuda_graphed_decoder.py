"""Decoding by one recorded step; on a CPU the same steps, called one by one."""

from __future__ import annotations

import copy

import pytest
import torch
from test_exact import generate, left_padded
from tiny_models import prompt

import art_torch

RULE = art_torch.Stability(d_scale=0.3, d_direction=0.1, patience=1)
PATCHES = {
    "exact": {"criterion": None},
    "sink_recent": {"criterion": RULE, "num_pinned": 1, "block_size": 16, "unit_size": 8},
    "guided": {
        "criterion": RULE,
        "walk": "guided",
        "block_size": 16,
        "exact_where_faster": False,
    },
}


@pytest.fixture
def unchecked(device, monkeypatch):
    """Checks of indices on a GPU wait for it, and a recorded step cannot."""
    monkeypatch.delenv("ART_CHECKED", raising=False)
    return device


@pytest.fixture
def model_on(tiny, unchecked):
    return lambda name: copy.deepcopy(tiny(name)).to(unchecked)


@pytest.mark.parametrize("kind", PATCHES)
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_it_generates_what_generate_does(name, kind, model_on):
    model = model_on(name)
    ids, mask = (tensor.to(model.device) for tensor in left_padded(3, 200))
    with art_torch.patch(model, **PATCHES[kind]) as handle:
        cache = art_torch.ARTCache(model.config)
        expected = generate(model, ids, cache, attention_mask=mask, max_new_tokens=12).sequences
        read = handle.stats.tokens_read()
        handle.stats.reset()
        decoder = art_torch.GraphedDecoder(model, max_length=220)
        got = decoder.generate(ids, max_new_tokens=12, attention_mask=mask)
        assert torch.equal(got, expected)
        assert torch.equal(handle.stats.tokens_read(), read)
        # A guided walk reads all of a window, and mistral has nothing else.
        reads_all = kind == "exact" or (kind, name) == ("guided", "mistral")
        assert (handle.stats.read_fraction() < 1.0) != reads_all
        # Another prompt, of another batch size.
        again = generate(model, ids[:1], art_torch.ARTCache(model.config), max_new_tokens=9)
        assert torch.equal(decoder.generate(ids[:1], max_new_tokens=9), again.sequences)


def test_logits_are_those_of_the_model(model_on):
    model, ids = model_on("qwen3"), prompt(2, 90)
    ids = ids.to(model.device)
    expected = generate(model, ids, max_new_tokens=8)
    with art_torch.patch(model, None):
        decoder = art_torch.GraphedDecoder(model, max_length=97)
        logits = decoder.prefill(ids)
        for step, (wanted, token) in enumerate(
            zip(expected.logits, expected.sequences[:, 90:].unbind(1), strict=True)
        ):
            torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-3)
            if step < 7:
                logits = decoder.step(token)
        assert decoder.cache.get_seq_length() == 97
        with pytest.raises(
            ValueError, match=r"a row has reached max_length 97: make a .* with a larger"
        ):
            decoder.step(token)


def test_another_patch_needs_another_prompt(model_on):
    model = model_on("llama")
    ids = prompt(2, 40).to(model.device)
    with art_torch.patch(model, None):
        decoder = art_torch.GraphedDecoder(model, max_length=60)
        decoder.prefill(ids)
        for _ in range(6):  # on a GPU the last ones are recorded
            decoder.step(ids[:, 0])
    with pytest.raises(RuntimeError, match="unpatched, or patched anew, since the prompt"):
        decoder.step(ids[:, 0])
    with art_torch.patch(model, RULE, block_size=16):
        with pytest.raises(RuntimeError, match="call prefill again"):
            decoder.step(ids[:, 0])
        decoder.prefill(ids)
        decoder.step(ids[:, 0])


def test_rows_end_at_the_end_token(model_on):
    model = model_on("llama")
    ids = prompt(2, 40).to(model.device)
    free = generate(model, ids, max_new_tokens=10).sequences[:, 40:]
    end = int(free[0, 3])
    model.generation_config.eos_token_id = [end]
    expected = generate(model, ids, max_new_tokens=10).sequences
    with art_torch.patch(model, None):
        decoder = art_torch.GraphedDecoder(model, max_length=60)
        assert torch.equal(decoder.generate(ids, max_new_tokens=10), expected)
        assert decoder.generate(ids[:1], max_new_tokens=10).shape[1] == 44
        # Without a pad token an ended row repeats its last one.
        model.generation_config.pad_token_id = None
        got = decoder.generate(ids, max_new_tokens=10)[0, 43:]
        assert got.tolist() == [end] * len(got)


def test_choose_and_stream(model_on):
    model = model_on("llama")
    ids = prompt(2, 40).to(model.device)
    with art_torch.patch(model, None):
        decoder = art_torch.GraphedDecoder(model, max_length=60)
        rarest = decoder.generate(ids, 6, choose=lambda logits: logits.argmin(-1))
        new = [*decoder.stream(ids, 6, choose=lambda logits: logits.argmin(-1))]
    assert torch.equal(torch.stack(new, 1), rarest[:, 40:])
    assert not torch.equal(rarest, generate(model, ids, max_new_tokens=6).sequences)


def test_what_does_not_fit_is_refused(model_on):
    model = model_on("llama")
    ids = prompt(2, 40).to(model.device)
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel, got str"):
        art_torch.GraphedDecoder("llama", 50)
    with pytest.raises(TypeError, match=r"must be an art_torch\.ARTCache, got str"):
        art_torch.GraphedDecoder(model, 50, cache="static")
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        art_torch.GraphedDecoder(model, 0)
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        art_torch.GraphedDecoder(model.train(), 50)
    model.eval()
    decoder = art_torch.GraphedDecoder(model, 50)
    with pytest.raises(RuntimeError, match="works with a patched model only"):
        decoder.prefill(ids)
    with art_torch.patch(model, None):
        decoder = art_torch.GraphedDecoder(model, 50)
        with pytest.raises(RuntimeError, match=r"call prefill\(input_ids\) first"):
            decoder.step(ids[:, 0])
        with pytest.raises(ValueError, match=r"must be \[batch, tokens\], got \[40\]"):
            decoder.prefill(ids[0])
        with pytest.raises(
            ValueError, match=r"60 tokens, more than max_length 50: make .* a larger"
        ):
            decoder.prefill(prompt(2, 60))
        with pytest.raises(ValueError, match=r"attention_mask must be \[2, 40\] as input_ids"):
            decoder.prefill(ids, torch.ones(2, 39))
        mask = torch.ones_like(ids)
        mask[:, -1] = 0
        with pytest.raises(ValueError, match="pads on the left"):
            decoder.prefill(ids, mask)
        with pytest.raises(
            ValueError, match=r"12 new ones .* max_length 50: make a .* with a larger"
        ):
            decoder.generate(ids, 12)
        with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
            decoder.generate(ids, 0)
        decoder.prefill(ids)
        with pytest.raises(ValueError, match=r"tokens must be \[2\], got \[1\]"):
            decoder.step(ids[:1, 0])
        with pytest.raises(ValueError, match="the cache must be empty, it has 40 tokens"):
            art_torch.GraphedDecoder(model, 50, cache=decoder.cache)
        decoder.cache.crop(-1)
        with pytest.raises(RuntimeError, match="call prefill again"):
            decoder.step(ids[:, 0])


def test_a_refused_prompt_changes_nothing(model_on):
    model = model_on("llama")
    ids = prompt(1, 40).to(model.device)
    with art_torch.patch(model, None):
        decoder = art_torch.GraphedDecoder(model, max_length=45)
        expected = decoder.generate(ids, 4)[0, 40:].tolist()
        logits, got = decoder.prefill(ids), []
        with pytest.raises(ValueError, match="the prompt has 60 tokens, more than max_length 45"):
            decoder.prefill(prompt(2, 60))
        with pytest.raises(ValueError, match="and 7 new ones do not fit into max_length 45"):
            decoder.generate(ids, 7)  # before the prompt is run
        for _ in range(4):
            got.append(int(logits.argmax()))
            logits = decoder.step(logits.argmax(-1))
    assert got == expected


@pytest.mark.parametrize("option", [{"measure_mass": True}, {"on_call": lambda *_: None}])
def test_what_calls_python_is_not_recorded(option, model_on, monkeypatch):
    model = model_on("llama")
    ids = prompt(1, 40).to(model.device)
    with art_torch.patch(model, None, **option):
        decoder = art_torch.GraphedDecoder(model, max_length=45)
        if model.device.type == "cpu":
            assert decoder.generate(ids, 2).shape == (1, 42)  # called one by one
            monkeypatch.setattr(art_torch.GraphedDecoder, "_records", True)
        with pytest.raises(RuntimeError, match="cannot be recorded in a CUDA graph"):
            decoder.prefill(ids)


def test_one_stream_at_a_time(model_on):
    model = model_on("llama")
    ids = prompt(1, 40).to(model.device)
    with art_torch.patch(model, None):
        decoder = art_torch.GraphedDecoder(model, max_length=60)
        first = decoder.stream(ids, 6)
        next(first)
        decoder.generate(ids, 3)
        with pytest.raises(RuntimeError, match="another prompt has run since this stream began"):
            next(first)


def test_steps_in_another_mode_than_the_prompt(model_on):
    model = model_on("gemma2")
    ids = prompt(2, 90).to(model.device)
    with art_torch.patch(model, RULE, walk="guided"):
        decoder = art_torch.GraphedDecoder(model, max_length=100)
        expected = decoder.generate(ids, 6)[:, 90:]
        got = []
        with torch.inference_mode():
            logits = decoder.prefill(ids)
        for _ in range(6):
            got.append(logits.argmax(-1))
            logits = decoder.step(got[-1])
    assert torch.equal(torch.stack(got, 1), expected)
