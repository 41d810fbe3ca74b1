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
        with pytest.raises(RuntimeError, match="no room left: it was preallocated for 32"):
            model(prompt(1, 1), past_key_values=cache)


@pytest.mark.parametrize("why", ["limit", "device"])
def test_a_preallocation_that_does_not_fit_changes_nothing(tiny, why, monkeypatch):
    model, ids = tiny("gemma2"), prompt(2, 60)  # layers with a window, and without one
    with art_torch.patch(model, None):
        expected = model(prompt(2, 5, seed=1), past_key_values=filled(model, ids)).logits
        cache = filled(model, ids)
        if why == "limit":
            first, *others = (table.bytes_to_preallocate(900) for table in cache.tables.values())
            assert first
            assert all(others)
            cache.budget.max_bytes = cache.budget.used_bytes + first + sum(others) - 1
            with pytest.raises(MemoryError, match="pass a larger max_bytes"):
                cache.preallocate(900)
            cache.budget.max_bytes += 1
        else:
            *_, last = cache.tables.values()

            def no_memory(num_pages):
                raise torch.OutOfMemoryError(f"{num_pages} pages")

            with monkeypatch.context() as patched:
                patched.setattr(last.pages.storages[-1], "ensure", no_memory)
                with pytest.raises(torch.OutOfMemoryError):
                    cache.preallocate(900)
        assert not any(table.static_len for table in cache.tables.values())
        got = model(prompt(2, 5, seed=1), past_key_values=cache).logits
        assert torch.equal(got, expected)
        cache.preallocate(900)


def test_a_longer_preallocation_that_does_not_fit_leaves_the_shorter_one(tiny):
    model = tiny("gemma2")
    with art_torch.patch(model, None):
        cache = filled(model, prompt(2, 60))
        cache.preallocate(100)
        before = [table.static for table in cache.tables.values()]
        cache.budget.max_bytes = cache.budget.used_bytes
        with pytest.raises(MemoryError, match="pass a larger max_bytes"):
            cache.preallocate(900)
        with pytest.raises(ValueError, match="at least the 60 tokens"):
            cache.preallocate(59)
    after = [table.static for table in cache.tables.values()]
    assert [lengths.length for lengths in after] == [100, 100]
    assert all(a is b for a, b in zip(after, before, strict=True))


def filled(model, ids):
    cache = art_torch.ARTCache(model.config, page_size=16)
    model(ids, past_key_values=cache)
    return cache
