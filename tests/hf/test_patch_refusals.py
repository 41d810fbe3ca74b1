"""Models, caches and arguments that art_torch.patch refuses, and what it says of them."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build
from transformers.models.bart import BartConfig, BartForConditionalGeneration
from transformers.models.bloom import BloomConfig, BloomForCausalLM
from transformers.models.llama import LlamaConfig, LlamaForCausalLM
from transformers.models.llama4 import Llama4TextConfig
from transformers.models.mamba import MambaConfig, MambaForCausalLM

import art_torch

RULE = art_torch.Stability()


REFUSED = {
    "encoder_decoder": (
        lambda: BartForConditionalGeneration(
            BartConfig(
                vocab_size=50,
                d_model=64,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=32,
                decoder_ffn_dim=32,
            )
        ),
        "it is an encoder-decoder model",
    ),
    "no_interface": (
        lambda: BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=64, n_layer=1, n_head=2)),
        "BloomForCausalLM cannot be patched: the source of .* does not use transformers' attention",
    ),
    "no_attention": (
        lambda: MambaForCausalLM(
            MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, state_size=4)
        ),
        "MambaForCausalLM cannot be patched",
    ),
    "head_dim": (
        lambda: LlamaForCausalLM(
            LlamaConfig(
                vocab_size=50,
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
            )
        ),
        "LlamaAttention has head_dim 16, and art_torch needs a multiple of 8 from 32 to 256",
    ),
    "float64": (
        lambda: build("llama").double(),
        "LlamaAttention is in float64, and art_torch needs float32, float16 or bfloat16",
    ),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_models_that_cannot_be_patched(name):
    make, message = REFUSED[name]
    model = make()
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=message):
        art_torch.patch(model, RULE)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"criterion": 0.1},
            TypeError,
            "criterion must be a Stability, .* the name of a preset, or None, got float",
        ),
        ({"walk": "backwards"}, ValueError, "walk must be one of oldest_first, .* got 'backwards'"),
        ({"per_layer": {1: 0.5}}, TypeError, r"per_layer\[1\] must be a Stability, .* or None"),
        (
            {"criterion": "balanced"},
            ValueError,
            r'preset \'balanced\' was chosen for walk="guided", got walk=\'sink_recent\'; pass art',
        ),
        (
            {"criterion": "best", "walk": "guided"},
            ValueError,
            "criterion must be one of the presets quality, balanced, fast, got 'best'",
        ),
        (
            {"per_layer": {1: "best"}},
            ValueError,
            r"per_layer\[1\] must be one of the presets .* got 'best'",
        ),
        (
            {"criterion": RULE | art_torch.ResidualMass()},
            ValueError,
            "criterion: ResidualMass needs walk=\"guided\", .* got walk='sink_recent'",
        ),
        (
            {"per_layer": {1: art_torch.ResidualMass()}, "walk": "oldest_first"},
            ValueError,
            r'per_layer\[1\]: ResidualMass needs walk="guided", .* got walk=\'oldest_first\'',
        ),
        ({"per_layer": {9: None}}, ValueError, r"per_layer must name layers 0 to 3 .* got \[9\]"),
        (
            {"per_layer": {1: None}, "skip_layers": (1,)},
            ValueError,
            r"layers \[1\] are in skip_layers and in per_layer",
        ),
        ({"block_size": 40}, ValueError, "block_size must be a positive multiple of unit_size"),
        ({"num_pinned": -1}, ValueError, "num_pinned must not be negative, got -1"),
        ({"num_pinned": 1.5}, TypeError, "num_pinned must be an int or None, got float"),
        ({"unit_size": 8.0}, TypeError, "unit_size must be an int, got float"),
        ({"block_size": 64.0}, TypeError, "block_size must be an int, got float"),
        ({"skip_layers": 3}, TypeError, "skip_layers must be an iterable of layers, got int"),
        (
            {"per_layer": [None]},
            TypeError,
            "per_layer must be a mapping from layers to criteria, got list",
        ),
    ],
)
def test_bad_arguments(tiny, arguments, error, message):
    with pytest.raises(error, match=message):
        art_torch.patch(tiny("llama"), **{"criterion": RULE} | arguments)


def test_criterion_is_required(tiny):
    with pytest.raises(TypeError, match="criterion"):
        art_torch.patch(tiny("llama"))


def test_model_must_be_a_model():
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel, got Linear"):
        art_torch.patch(torch.nn.Linear(2, 2), RULE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: art_torch.ARTCache(build("llama").config, page_size=24), "multiple of 16, got 24"),
        (lambda: art_torch.ARTCache(build("llama").config, max_bytes=0), "positive, got 0"),
        (lambda: art_torch.ARTCache(Llama4TextConfig()), "chunked attention is not supported"),
        (lambda: art_torch.ARTCache(MambaConfig()), "ARTCache holds full and sliding-window"),
    ],
)
def test_bad_caches(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_cache_takes_a_config(tiny):
    with pytest.raises(TypeError, match=r"config must be model\.config, got LlamaForCausalLM"):
        art_torch.ARTCache(tiny("llama"))
