"""``generate_batch`` with ART on a GPU, with and without CUDA graphs.

A pass that waits for the device cannot be captured, so the graphs also show that none does.
"""

from __future__ import annotations

import pytest
import torch
from batched import answers, batching, prompts_of
from test_art_on import CRITERION, SIZES
from test_guided import RULE
from test_guided_batching import GUIDED, PAGE, Checker
from tiny_models import PAD, build
from transformers import GenerationConfig
from transformers.generation.continuous_batching import initialization

import art_torch
from art_torch.integrations import continuous_batching

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

pytestmark = pytest.mark.cuda

HOW = {
    "eager": {"use_cuda_graph": False},
    "graphs": {"use_cuda_graph": True},
    "graphs_and_block_tables": {"use_cuda_graph": True, "max_blocks_per_request": 32},
}


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch, no_hang):
    monkeypatch.delenv("ART_CHECKED", raising=False)


@pytest.fixture(params=sorted(HOW))
def how(request, monkeypatch):
    if "block_tables" in request.param:  # without flash attention transformers makes none
        monkeypatch.setattr(initialization, "ensure_decode_fast_path_is_available", lambda *_: None)
    return HOW[request.param]


# Requests join while others run, so pieces of prompts could be any length; none is one token here.
WHOLE = {"max_batch_tokens": 512}


def on_gpu(name):
    model = build(name).to("cuda")
    model.set_attn_implementation("sdpa")
    return model


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_tokens_without_a_criterion(name, how):
    if name == "gemma3":  # sliding layers have no block tables
        how = {key: value for key, value in how.items() if key != "max_blocks_per_request"}
    model, prompts = on_gpu(name), prompts_of(5, 40, 100, 17, 1)
    expected = answers(model, prompts, use_cuda_graph=False, max_blocks_per_request=0)
    with art_torch.patch(model, None) as handle, continuous_batching.enable(handle):
        assert answers(model, prompts, **how) == expected
    assert handle.stats.read_fraction() == 1.0
    assert handle.stats.exact_fallbacks == 0


def test_reading_stops(how):
    model, prompts = on_gpu("llama"), prompts_of(400, 60, 300)
    with art_torch.patch(model, CRITERION, **SIZES) as handle, continuous_batching.enable(handle):
        first = answers(model, prompts, **how, **WHOLE)
        assert 0.0 < handle.stats.read_fraction() < 1.0
        assert answers(model, prompts, **how, **WHOLE) == first


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_guided_walk_without_a_criterion(name):
    model, prompts = on_gpu(name), prompts_of(5, 300, 130, 64, 260, 1)
    options = {"page_size": PAGE, "num_blocks": 12, "use_cuda_graph": False}
    expected = answers(model, prompts, **options)
    checker = Checker()
    patched = art_torch.patch(model, None, on_call=checker.check_only, **GUIDED)
    with patched as handle, continuous_batching.enable(handle):
        assert answers(model, prompts, **options) == expected
    assert not checker.problems
    assert checker.groups > 0
    assert handle.stats.read_fraction() == 1.0


def test_guided_walk_stops():
    model, prompts = on_gpu("llama"), prompts_of(600, 60, 450)
    options = {"page_size": PAGE, "use_cuda_graph": False, **WHOLE}
    patched = art_torch.patch(model, RULE, **GUIDED)
    with patched as handle, continuous_batching.enable(handle):
        first = answers(model, prompts, **options)
        assert 0.0 < handle.stats.read_fraction() < 1.0
        assert answers(model, prompts, **options) == first


def test_guided_walk_in_graphs_is_refused():
    model, config = on_gpu("llama"), GenerationConfig(max_new_tokens=3, pad_token_id=PAD)
    patched = art_torch.patch(model, RULE, **GUIDED)
    with patched as handle, continuous_batching.enable(handle):
        outputs = model.generate_batch(
            prompts_of(90),
            generation_config=config,
            continuous_batching_config=batching(page_size=PAGE, use_cuda_graph=True),
        )
    (output,) = outputs.values()
    assert "pass use_cuda_graph=False to ContinuousBatchingConfig" in output.error
