"""``generate_batch`` with ART on a GPU, with and without CUDA graphs.

A pass that waits for the device cannot be captured, so the graphs also show that none does.
"""

from __future__ import annotations

import pytest
import torch
from batched import answers, prompts_of
from test_art_on import CRITERION, SIZES
from tiny_models import build
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
        first = answers(model, prompts, **how)
        assert 0.0 < handle.stats.read_fraction() < 1.0
        assert answers(model, prompts, **how) == first
