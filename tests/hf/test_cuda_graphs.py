"""Steps of patched models on a GPU: recorded in a CUDA graph, and compiled."""

from __future__ import annotations

import pytest
import torch
from test_art_on import CRITERION, SIZES
from test_cuda import GPU, prompt

import art_torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch, no_hang):
    monkeypatch.delenv("ART_CHECKED", raising=False)


@pytest.mark.parametrize("walk", ["sink_recent", "guided"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_decode_step_in_a_cuda_graph(name, walk, tiny_on_gpu):
    """On a preallocated cache a step waits for nothing, so it can be recorded and replayed."""
    model, tokens = tiny_on_gpu(name), prompt(2, 12, seed=3)
    sizes = {"block_size": 16} if walk == "guided" else SIZES
    sizes |= {"exact_where_faster": False}
    with art_torch.patch(model, CRITERION, walk=walk, **sizes) as handle:

        def filled():
            cache = art_torch.ARTCache(model.config)
            model(prompt(2, 300), past_key_values=cache)
            cache.preallocate(400)
            return cache

        def step(cache, token, position):
            return model(token, position_ids=position, past_key_values=cache).logits

        cache, expected = filled(), []
        for i in range(12):
            position = torch.full((2, 1), 300 + i, device=GPU)
            expected.append(step(cache, tokens[:, i : i + 1], position))
        read = handle.stats.tokens_read()
        handle.stats.reset()

        cache = filled()
        token, position = tokens[:, :1].clone(), torch.full((2, 1), 300, device=GPU)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        got = []
        with torch.cuda.stream(side):  # the first three steps warm up
            for i in range(3):
                token.copy_(tokens[:, i : i + 1])
                got.append(step(cache, token, position))
                position.add_(1)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step(cache, token, position)
        for i in range(3, 12):
            token.copy_(tokens[:, i : i + 1])
            graph.replay()
            got.append(logits.clone())
            position.add_(1)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
        assert torch.equal(handle.stats.tokens_read(), read)
        assert handle.stats.steps == 12
        assert cache.get_seq_length() == 312


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_compiled_step(name, tiny_on_gpu):
    model, tokens = tiny_on_gpu(name), prompt(2, 6, seed=3)
    torch._dynamo.reset()
    with art_torch.patch(model, CRITERION, **SIZES):
        results = []
        for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
            cache = art_torch.ARTCache(model.config)
            model(prompt(2, 300), past_key_values=cache)
            cache.preallocate(320)
            logits = [
                call(
                    input_ids=tokens[:, i : i + 1],
                    position_ids=torch.full((2, 1), 300 + i, device=GPU),
                    past_key_values=cache,
                ).logits
                for i in range(6)
            ]
            results.append(torch.cat(logits, 1))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-3)
    torch._dynamo.reset()
