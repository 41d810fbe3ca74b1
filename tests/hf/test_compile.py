"""A decode step of a patched model on a preallocated ARTCache compiles as one graph."""

from __future__ import annotations

import pytest
import torch
from tiny_models import prompt
from torch._dynamo.testing import CompileCounterWithBackend

import art_torch

RULE = art_torch.Stability(d_scale=0.3, d_direction=0.1, patience=1)
SIZES = {"num_pinned": 1, "block_size": 16, "unit_size": 8}
STEPS, PADS = 6, 11


def decode(model, step, cache):
    """A left-padded prompt, then steps whose tokens depend on each other."""
    ids = prompt(2, 300)
    mask = torch.ones_like(ids)
    mask[0, :PADS] = 0
    token = model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1:].argmax(-1)
    if step is not model:
        cache.preallocate(320)
    logits = []
    position = mask.sum(1, keepdim=True)
    for i in range(STEPS):
        inputs = {"input_ids": token, "position_ids": position + i, "past_key_values": cache}
        if step is model:
            inputs["attention_mask"] = torch.cat([mask, torch.ones(2, i + 1).long()], dim=1)
        logits.append(step(**inputs).logits)
        token = logits[-1].argmax(-1)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(
    ("name", "kv_dtype"),
    [
        ("llama", None),
        ("gemma2", None),
        ("gemma3", None),
        ("mistral", None),
        ("gemma2", torch.int8),
    ],
)
def test_one_graph(tiny, name, kv_dtype):
    model = tiny(name)
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    with art_torch.patch(model, RULE, **SIZES) as handle:
        expected = decode(model, model, art_torch.ARTCache(model.config, kv_dtype=kv_dtype))
        read, present = handle.stats.tokens_read(), handle.stats.tokens_present()
        assert handle.stats.read_fraction() < 1.0
        handle.stats.reset()
        cache = art_torch.ARTCache(model.config, kv_dtype=kv_dtype)
        step = torch.compile(model, fullgraph=True, backend=backend)
        got = decode(model, step, cache)
        assert backend.frame_count == 1  # neither a break nor a recompilation
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(handle.stats.tokens_read(), read)
        assert torch.equal(handle.stats.tokens_present(), present)
        assert handle.stats.steps == STEPS
        # Back to lengths on the host.
        cache.crop(-2)
        assert cache.get_seq_length() == 300 + STEPS - 2
        model(prompt(2, 5), past_key_values=cache)
        assert cache.get_seq_length() == 300 + STEPS + 3
    torch._dynamo.reset()


def test_inductor(tiny):
    model = tiny("phi3")
    torch._dynamo.reset()
    with art_torch.patch(model, RULE, **SIZES):
        expected = decode(model, model, art_torch.ARTCache(model.config))
        step = torch.compile(model, fullgraph=True)
        got = decode(model, step, art_torch.ARTCache(model.config))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()


def test_without_preallocation_it_says_what_to_do(tiny):
    model = tiny("llama")
    torch._dynamo.reset()
    cache = art_torch.ARTCache(model.config)
    with art_torch.patch(model, RULE, **SIZES):
        model(prompt(1, 20), past_key_values=cache)
        step = torch.compile(model, fullgraph=True, backend="eager")
        with pytest.raises(RuntimeError, match=r"call cache\.preallocate\(max_length\)"):
            step(prompt(1, 1), past_key_values=cache)
    torch._dynamo.reset()


def test_preallocate_past_its_length_fails(tiny):
    model = tiny("llama")
    cache = art_torch.ARTCache(model.config, page_size=16)
    with art_torch.patch(model, None):
        model(prompt(1, 30), past_key_values=cache)
        cache.preallocate(32)
        for _ in range(2):
            model(prompt(1, 1), past_key_values=cache)
        with pytest.raises(RuntimeError):
            model(prompt(1, 1), past_key_values=cache)
