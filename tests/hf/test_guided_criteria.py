"""patch(walk="guided") with presets, ResidualMass and both rules together."""

from __future__ import annotations

import pytest
import torch
from test_exact import generate
from test_guided import (
    RULE,
    GuidedRecorder,
    assert_full_layers_stop,
    full_layers,
    guided,
    padded_batch,
)
from test_guided_limits import decode, decode_in_one_graph
from tiny_models import LAYERS, prompt

import art_torch
from art_torch import PRESETS, ResidualMass, Stability
from art_torch.integrations.transformers import plan

MASS = ResidualMass(0.3)
CRITERIA = {"mass": MASS, "both": RULE & MASS, "either": RULE | ResidualMass(0.15)}
criteria = pytest.mark.parametrize("criterion", CRITERIA.values(), ids=list(CRITERIA))


# ---------------------------------------------------------------- presets


def test_presets():
    assert list(PRESETS) == ["quality", "balanced", "fast"]
    assert PRESETS["balanced"] == Stability()
    scales = [rule.d_scale for rule in PRESETS.values()]
    assert scales == sorted(scales)
    for rule in PRESETS.values():  # the same change across the output as along it
        assert rule.d_direction == pytest.approx(rule.d_scale**2 / 2)
    with pytest.raises(TypeError):
        PRESETS["mine"] = Stability()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_rule(tiny, name):
    model, results, seen = tiny("gemma2"), [], set()
    for criterion in (name, PRESETS[name]):

        def on_call(layer, arguments, _):
            seen.add((layer, arguments["walk"], arguments["criterion"]))

        cache = art_torch.ARTCache(model.config)
        with guided(model, criterion, on_call=on_call, block_size=16):
            results.append(generate(model, prompt(1, 400), cache, max_new_tokens=6))
    for one, other in zip(results[0].logits, results[1].logits, strict=True):
        assert torch.equal(one, other)
    full = full_layers(model)
    assert seen == {
        (i, "guided", PRESETS[name]) if i in full else (i, "sink_recent", None)
        for i in range(LAYERS)
    }


# ---------------------------------------------------------------- the mass that is left


@criteria
def test_calls_agree_with_the_reference(any_tiny, criterion):
    recorder = GuidedRecorder()
    ids, mask = padded_batch(4, 500)  # the last two rows have everything pinned
    cache = art_torch.ARTCache(any_tiny.config)
    with guided(any_tiny, criterion, on_call=recorder, block_size=16) as handle:
        generate(any_tiny, ids, cache, attention_mask=mask, max_new_tokens=6)
    assert recorder.walks.count("guided") == 5 * len(full_layers(any_tiny))
    assert recorder.inside <= 0.02 * recorder.compared
    assert_full_layers_stop(any_tiny, recorder, handle)
    assert handle.stats.exact_fallbacks == 0


@criteria
def test_short_rows(tiny, monkeypatch, criterion):
    """Everything is pinned: nothing is left to read, with the codes or without."""
    model, logits = tiny("llama"), []
    for pinned_tokens in (plan._PINNED_TOKENS, 0):
        monkeypatch.setattr(plan, "_PINNED_TOKENS", pinned_tokens)
        cache = art_torch.ARTCache(model.config)
        with guided(model, criterion) as handle:
            model(prompt(2, 180), past_key_values=cache)
            logits.append(model(prompt(2, 1), past_key_values=cache).logits)
        assert handle.stats.read_fraction() == 1.0
    assert torch.equal(*logits)


def test_layers_with_criteria_of_their_own(tiny):
    model, seen = tiny("llama"), {}

    def on_call(layer, arguments, _):
        seen[layer] = arguments["walk"], arguments["criterion"]

    others = {1: MASS, 2: "fast", 3: None}
    cache = art_torch.ARTCache(model.config)
    with guided(model, RULE & MASS, per_layer=others, on_call=on_call, block_size=16) as handle:
        generate(model, prompt(1, 400), cache, max_new_tokens=4)
    assert seen == {
        0: ("guided", RULE & MASS),
        1: ("guided", MASS),
        2: ("guided", PRESETS["fast"]),
        3: ("sink_recent", None),
    }
    fractions = handle.stats.fractions()
    assert (fractions[:2] < 1.0).all()
    assert (fractions[3] == 1.0).all()


def test_measured_mass(tiny, capsys):
    model, shares = tiny("llama"), {}
    for eps in (0.02, 0.4):
        cache = art_torch.ARTCache(model.config)
        criterion = ResidualMass(eps)
        with guided(model, criterion, measure_mass=True, block_size=16) as handle:
            generate(model, prompt(1, 500), cache, max_new_tokens=5)
        shares[eps] = handle.stats.mass_read()
        assert len(handle.stats.table().columns) == 8
        handle.stats.summary()
        assert "mass" in capsys.readouterr().out
    assert (shares[0.02].true > 0.95).all()
    assert (shares[0.4].true < 0.95).all()
    assert (shares[0.4].lowest < shares[0.02].lowest).all()


# ---------------------------------------------------------------- compiled steps


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@criteria
def test_one_graph(tiny, name, criterion):
    model = tiny(name)
    torch._dynamo.reset()
    with guided(model, criterion, per_layer={0: "balanced"}, block_size=16) as handle:
        decode_in_one_graph(model, handle, prompt(2, 378), 8)
    torch._dynamo.reset()


@criteria
def test_preallocated_short_rows(tiny, criterion):
    """Lengths are on the device, so that the codes are asked even where everything is pinned."""
    model = tiny("llama")
    with guided(model, criterion) as handle:
        expected = decode(model, model, art_torch.ARTCache(model.config), prompt(2, 100), 4)
        cache = art_torch.ARTCache(model.config, key_codes=True)
        got = decode(model, model.forward, cache, prompt(2, 100), 4)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert handle.stats.read_fraction() == 1.0
