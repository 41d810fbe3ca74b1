"""patch(walk="guided"): what is refused, what is said, and steps that are compiled."""

from __future__ import annotations

import logging

import pytest
import torch
from test_exact import generate
from test_guided import RULE, guided
from tiny_models import build, prompt
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache

import art_torch


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_pinned": 8}, 'num_pinned must not be given with walk="guided".* got 8'),
        ({"unit_size": 32}, 'unit_size must be 16 with walk="guided", got 32'),
    ],
)
def test_bad_arguments(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        guided(tiny("llama"), RULE, **arguments)


def test_other_caches_are_refused(tiny):
    model = tiny("llama")
    message = r'walk="guided" needs the codes of an ARTCache: pass past_key_values=art_torch'
    with guided(model, RULE), pytest.raises(RuntimeError, match=message):
        generate(model, prompt(1, 20), DynamicCache())
    with guided(model, RULE):  # a pass without a cache has nothing to guide
        model(prompt(1, 20), use_cache=False)


@pytest.mark.parametrize("what", ["assistant_model", "assistant_early_exit", "guidance_scale"])
def test_caches_that_transformers_makes_itself(what):
    """Nobody can pass an ARTCache there; another walk takes what there is."""
    model, ids = build("llama"), prompt(1, 60)
    options = {
        "assistant_model": {"assistant_model": build("llama")},
        "assistant_early_exit": {"assistant_early_exit": 2},
        "guidance_scale": {"guidance_scale": 1.5},
    }[what]
    patched = options.get("assistant_model", model)

    def run():
        cache = None if patched is not model else art_torch.ARTCache(model.config)
        return generate(model, ids, cache, max_new_tokens=20, **options).sequences

    with art_torch.patch(patched, None):
        run()
    with guided(patched, RULE), pytest.raises(RuntimeError, match="only another walk will do"):
        run()


def test_a_model_that_is_not_on_the_cpu():
    model = build("llama").to("meta")
    with pytest.raises(NotImplementedError, match="runs on CPUs and NVIDIA GPUs, got meta"):
        guided(model, RULE)
    assert model.config._attn_implementation == "eager"


def test_windows_are_mentioned_once(tiny, caplog):
    caplog.set_level(logging.INFO, logger="art_torch")
    model = tiny("mistral")
    with guided(model, RULE) as handle:
        generate(model, prompt(1, 60), art_torch.ARTCache(model.config), max_new_tokens=4)
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 2
    assert "two-bit codes" in texts[0]
    assert "layers with a sliding window read all of their window" in texts[1]
    assert handle.stats.read_fraction() == 1.0


def decode(model, step, cache, ids, steps):
    token = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
    if step is not model:
        cache.preallocate(ids.shape[1] + steps)
    logits = []
    for i in range(steps):
        positions = torch.full((len(ids), 1), ids.shape[1] + i)
        logits.append(step(token, position_ids=positions, past_key_values=cache).logits)
        token = logits[-1].argmax(-1)
    return torch.cat(logits, dim=1)


def decode_in_one_graph(model, handle, ids, steps):
    """Compiled steps are one graph, and give and read what others do; returns their cache."""
    backend = CompileCounterWithBackend("aot_eager")
    expected = decode(model, model, art_torch.ARTCache(model.config), ids, steps)
    read = handle.stats.tokens_read()
    assert handle.stats.read_fraction() < 1.0
    handle.stats.reset()
    cache = art_torch.ARTCache(model.config)
    got = decode(model, torch.compile(model, fullgraph=True, backend=backend), cache, ids, steps)
    assert backend.frame_count == 1
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(handle.stats.tokens_read(), read)
    return cache


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_one_graph(tiny, name):
    model = tiny(name)
    torch._dynamo.reset()
    ids = prompt(2, 378)
    with guided(model, RULE, block_size=16) as handle:
        cache = decode_in_one_graph(model, handle, ids, 8)
        # Back to lengths on the host: what compiled steps wrote could be others' as well, so codes
        # are made anew.
        cache.crop(-1)
        table = cache.tables[0]
        assert table.codes.keys_were_written
        model(ids[:, :1], past_key_values=cache)
        assert not table.codes.keys_were_written
        assert not any(storage.is_void for storage in table.codes.groups.storages)
        assert table.codes.groups.used.tolist() == (table.seq_lens // 64).tolist()
    torch._dynamo.reset()


def test_what_cannot_be_compiled(tiny):
    model = tiny("llama")
    ids = prompt(1, 300)
    cache = art_torch.ARTCache(model.config)
    with art_torch.patch(model, RULE):
        model(ids, past_key_values=cache)
        cache.preallocate(310)
    for measure_mass, message in (
        (False, r'walk="guided" needs the codes of the prompt'),
        (True, "measure_mass=True cannot be compiled"),
    ):
        torch._dynamo.reset()
        step = torch.compile(model, fullgraph=True, backend="eager")
        with guided(model, RULE, measure_mass=measure_mass):
            with pytest.raises(RuntimeError, match=message):
                step(ids[:, :1], position_ids=torch.tensor([[300]]), past_key_values=cache)
            cache.layers[0].use_codes()
    torch._dynamo.reset()
