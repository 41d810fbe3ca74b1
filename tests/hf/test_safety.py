"""Exact steps in between (dense_every), and criteria of single layers from a file."""

from __future__ import annotations

import json
import math

import pytest
import torch
from test_compile import STEPS, decode
from test_exact import assert_same, cache_of, generate, left_padded
from tiny_models import LAYERS, prompt
from torch._dynamo.testing import CompileCounterWithBackend

import art_torch

RULE = art_torch.Stability(d_scale=0.3, d_direction=0.1, patience=1)
# Small enough to decide inside the windows of the tiny models.
SIZES = {"num_pinned": 1, "block_size": 16, "unit_size": 8}
EITHER = RULE | art_torch.ResidualMass(0.2)
BOTH = art_torch.Stability(0.5, 0.2, 1) & art_torch.ResidualMass(0.5)


# ---------------------------------------------------------------- dense_every


def rules_by_layer(model, ids, kind, every, **options):
    """Of each layer, the criteria of the decode steps of a generation."""
    seen: dict[int, list] = {layer: [] for layer in range(LAYERS)}

    def on_call(layer, arguments, _):
        seen[layer].append(arguments["criterion"])

    cache = cache_of(kind, model, length=ids.shape[1] + 14)
    with art_torch.patch(model, RULE, dense_every=every, on_call=on_call, **SIZES) as handle:
        generate(model, ids, cache, max_new_tokens=14, **options)
    assert handle.stats.exact_fallbacks == 0
    return seen, handle.stats


@pytest.mark.parametrize("kind", ["art", "dynamic", "static"])
@pytest.mark.parametrize("tokens", [9, 33, 330])  # before, across and after the windows' end
@pytest.mark.parametrize("padded", [False, True])
def test_which_steps_are_exact(any_tiny, kind, tokens, padded):
    every = 5
    ids, options = prompt(1, tokens), {}
    if padded:
        ids, mask = left_padded(2, tokens)
        options["attention_mask"] = mask
    seen, stats = rules_by_layer(any_tiny, ids, kind, every, **options)
    # The first of 14 tokens comes from the prompt; step i brings the cache to tokens + i.
    expected = [None if (tokens + i) % every == 0 else RULE for i in range(1, 14)]
    assert 2 <= expected.count(None) <= 3
    for layer in range(LAYERS):
        assert seen[layer] == expected
        read, present = stats.per_step(layer)
        for i, rule in enumerate(expected):
            if rule is None:
                assert (read[i] == present[i]).all()
    if tokens == 330:
        assert stats.read_fraction() < 1.0


@pytest.mark.parametrize("walk", ["sink_recent", "guided"])
def test_every_step(any_tiny, walk):
    sizes = {"walk": walk, "block_size": 16} if walk == "guided" else SIZES
    ids, mask = left_padded(2, 330)
    expected = generate(any_tiny, ids, attention_mask=mask)

    def art(**settings):
        cache = art_torch.ARTCache(any_tiny.config)
        with art_torch.patch(any_tiny, RULE, **settings, **sizes) as handle:
            got = generate(any_tiny, ids, cache, attention_mask=mask)
        return got, handle.stats.read_fraction()

    got, read = art(dense_every=1)
    assert_same(got, expected)
    assert read == 1.0
    if any_tiny.config.model_type != "mistral" or walk != "guided":  # which has windows only
        assert art()[1] < 1.0


@pytest.mark.parametrize(
    ("name", "walk", "criterion"),
    [
        ("llama", "sink_recent", RULE),
        ("mistral", "recent_first", RULE),
        ("gemma2", "sink_recent", RULE),
        ("llama", "guided", RULE),
        ("gemma2", "guided", EITHER),
        ("llama", "guided", BOTH),
    ],
)
def test_compiled_steps(tiny, name, walk, criterion):
    """One graph holds both kinds of steps, and the lengths on the device choose."""
    model, every = tiny(name), 3
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    sizes = {"block_size": 16} if walk == "guided" else SIZES
    settings = {"walk": walk, "dense_every": every} | sizes
    with art_torch.patch(model, criterion, **settings) as handle:
        expected = decode(model, model, art_torch.ARTCache(model.config))
        read, present = handle.stats.tokens_read(), handle.stats.tokens_present()
        handle.stats.reset()
        step = torch.compile(model, fullgraph=True, backend=backend)
        got = decode(model, step, art_torch.ARTCache(model.config))
        assert backend.frame_count == 1
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(handle.stats.tokens_read(), read)
        assert torch.equal(handle.stats.tokens_present(), present)
        assert handle.stats.steps == STEPS
    with art_torch.patch(model, criterion, walk=walk, **sizes) as handle:
        decode(model, model, art_torch.ARTCache(model.config))
        assert handle.stats.tokens_read().sum() < read.sum()  # the exact steps read more
    torch._dynamo.reset()


@pytest.mark.parametrize("walk", ["sink_recent", "oldest_first", "guided"])
def test_preallocated_steps_that_are_exact(tiny, walk):
    model, ids = tiny("llama"), prompt(2, 300)
    cache = art_torch.ARTCache(model.config)
    more, every = prompt(2, 8, seed=1), 4
    with art_torch.patch(model, RULE, walk=walk, dense_every=every, block_size=16) as handle:
        model(ids, past_key_values=cache)
        cache.preallocate(320)
        for i in range(8):
            before = handle.stats.tokens_read() if i else 0
            position = torch.full((2, 1), 300 + i)
            model(more[:, i : i + 1], position_ids=position, past_key_values=cache)
            read = handle.stats.tokens_read() - before
            everything = (read == 2 * (301 + i)).all()
            assert everything == ((301 + i) % every == 0)


@pytest.mark.parametrize("walk", ["sink_recent", "guided"])
def test_mass_of_preallocated_steps(tiny, walk):
    model, shares = tiny("llama"), []
    settings = {"walk": walk, "dense_every": 2, "block_size": 16, "measure_mass": True}
    for preallocated in (False, True):
        cache = art_torch.ARTCache(model.config)
        with art_torch.patch(model, RULE, **settings) as handle:
            model(prompt(1, 300), past_key_values=cache)
            if preallocated:
                cache.preallocate(310)
            for i in range(2):
                model(prompt(1, 1), position_ids=torch.tensor([[300 + i]]), past_key_values=cache)
        shares.append(handle.stats.mass_read())
    torch.testing.assert_close(shares[1].true, shares[0].true, rtol=1e-4, atol=0)
    assert (shares[1].true < 1.0).all()
    # Of the exact step there is an estimate where only the device knows that it is exact.
    expected = (shares[0].estimated + 1) / 2
    torch.testing.assert_close(shares[1].estimated, expected, rtol=1e-4, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "dense_every must be at least 1, got 0"),
        (-3, ValueError, "dense_every must be at least 1, got -3"),
        (2.5, TypeError, "dense_every must be an int or None, got float"),
        (True, TypeError, "dense_every must be an int or None, got bool"),
    ],
)
def test_bad_dense_every(tiny, value, error, message):
    with pytest.raises(error, match=message):
        art_torch.patch(tiny("llama"), RULE, dense_every=value)


# ---------------------------------------------------------------- criteria in a file


def per_head(d_scale):
    return art_torch.Stability(torch.tensor(d_scale), torch.tensor([0.1, 0.2]), 3)


CRITERIA = {
    0: None,
    1: "balanced",
    2: art_torch.Stability(1e-7, 1e-3, 5),
    3: art_torch.ResidualMass(0.25),
    10: EITHER,
    11: BOTH,
}


def test_a_saved_file_loads_the_same(tmp_path):
    path = tmp_path / "criteria.json"
    art_torch.save_criteria(CRITERIA, path)
    assert art_torch.load_criteria(path) == CRITERIA
    assert list(art_torch.load_criteria(str(path))) == sorted(CRITERIA)
    art_torch.save_criteria({7: per_head([0.3, 0.7])}, path)  # replaces it
    (layer,) = art_torch.load_criteria(path).items()
    assert layer[0] == 7
    assert torch.equal(layer[1].d_scale, torch.tensor([0.3, 0.7]))
    assert torch.equal(layer[1].d_direction, torch.tensor([0.1, 0.2]))
    assert layer[1].patience == 3


def test_the_file_is_what_the_documentation_shows(tmp_path):
    path = tmp_path / "criteria.json"
    art_torch.save_criteria({5: EITHER, 0: None}, path)
    assert json.loads(path.read_text()) == {
        "format": "art_torch.criteria",
        "version": 1,
        "layers": {
            "0": None,
            "5": {
                "stability": {"d_scale": 0.3, "d_direction": 0.1, "patience": 1},
                "residual_mass": {"eps": 0.2},
                "all_agree": False,
            },
        },
    }


def test_patching_from_a_file(tiny, tmp_path):
    model, seen = tiny("llama"), {}

    def on_call(layer, arguments, _):
        seen[layer] = arguments["criterion"]

    path, other = tmp_path / "criteria.json", art_torch.Stability(0.5, 0.1, 1)
    art_torch.save_criteria({0: None, 2: other}, path)
    criteria = art_torch.load_criteria(path)
    with art_torch.patch(model, RULE, per_layer=criteria, on_call=on_call, **SIZES):
        generate(model, prompt(1, 40), max_new_tokens=2)
    assert seen == {0: None, 1: RULE, 2: other, 3: RULE}

    art_torch.save_criteria(CRITERIA, path)
    with pytest.raises(ValueError, match=r"per_layer must name layers 0 to 3 .* got \[10, 11\]"):
        art_torch.patch(model, RULE, "guided", per_layer=art_torch.load_criteria(path))
    with pytest.raises(ValueError, match=r"per_layer\[1\]: preset 'balanced' was chosen for"):
        art_torch.patch(model, RULE, per_layer=art_torch.load_criteria(path))


def one_layer(value):
    return json.dumps({"format": "art_torch.criteria", "version": 1, "layers": {"3": value}})


STABILITY = {"d_scale": 0.1, "d_direction": 0.1, "patience": 1}
STABILITY_RULE = {"stability": STABILITY}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", 'no file of criteria: it needs "format": "art_torch.criteria"'),
        ('{"layers": {}}', "no file of criteria"),
        ('{"format": "art_torch.criteria", "layers": {}}', "version must be 1, got None"),
        ('{"format": "art_torch.criteria", "version": 2}', "version must be 1, got 2"),
        ('{"format": "art_torch.criteria", "version": true}', "version must be 1, got True"),
        ('{"format": "art_torch.criteria", "version": 1}', '"layers" must be an object'),
        (
            '{"format": "art_torch.criteria", "version": 1, "layers": {}, "walk": "guided"}',
            r"the file has \['walk'\], and may have \['format', 'layers', 'version'\] only",
        ),
        (one_layer(None)[:-2] + ', "3": null}}', "'3' is there twice"),
        (one_layer(None).replace('"3"', '"-1"'), "a layer must be a number from 0 on, got '-1'"),
        (one_layer(None).replace('"3"', '"03"'), "a layer must be a number from 0 on, got '03'"),
        *(
            (one_layer(STABILITY_RULE).replace("0.1", number), f"must be finite, got {number}")
            for number in ("NaN", "Infinity", "-Infinity", "1e999")
        ),
        (
            one_layer({"stability": STABILITY | {"d_scale": [0.1, 1e39]}}),
            r"layer 3: d_scale must be numbers of float32, got \[0.1, 1e\+39\]",
        ),
        (one_layer("best"), "layer 3: a preset must be one of quality, .* got 'best'"),
        (one_layer(0.1), "layer 3: a criterion must be null, .* got 0.1"),
        (one_layer({"rule": 1}), "layer 3: a criterion must be null, .* got {'rule': 1}"),
        (
            one_layer({"stability": STABILITY, "eps": 0.1}),
            r"layer 3: a criterion has \['eps'\], and may have \['residual_mass', 'stability'\]",
        ),
        (
            one_layer({"stability": STABILITY, "all_agree": True}),
            r"layer 3: a criterion has \['all_agree'\]",
        ),
        (
            one_layer({"stability": {"d_scale": 0.1}}),
            r"layer 3: stability needs d_direction, d_scale, patience, got \['d_scale'\]",
        ),
        (one_layer({"residual_mass": 0.1}), "layer 3: residual_mass needs eps, got 0.1"),
        (one_layer({"residual_mass": {"eps": 1.5}}), "layer 3: eps must be at least 0 and less"),
        (one_layer({"residual_mass": {"eps": "a"}}), "layer 3: eps must be a number, got str"),
        (
            one_layer({"stability": STABILITY | {"d_scale": [0.1, "a"]}}),
            "layer 3: d_scale must be a number or a list of numbers",
        ),
        (
            one_layer({"stability": STABILITY | {"d_scale": []}}),
            "layer 3: d_scale .* an empty list",
        ),
        (
            one_layer({"stability": STABILITY | {"d_scale": [0.1, -0.1]}}),
            "layer 3: d_scale must not be negative or NaN",
        ),
        (
            one_layer({"stability": STABILITY, "residual_mass": {"eps": 0.1}}),
            "layer 3: two rules need all_agree",
        ),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "criteria.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        art_torch.load_criteria(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        art_torch.load_criteria(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("criteria", "error", "message"),
    [
        ({"1": None}, TypeError, "a layer must be an int, got '1'"),
        ({-1: None}, ValueError, "a layer must not be negative, got -1"),
        ({1: 0.1}, TypeError, "layer 1: criterion must be a Stability, .* got float"),
        ({1: "best"}, ValueError, "a preset must be one of quality, balanced, fast, got 'best'"),
        (
            {1: art_torch.Stability(math.inf, 0.1, 1) | art_torch.ResidualMass(0.1)},
            ValueError,
            "layer 1: d_scale must be finite to be saved, got inf",
        ),
        (
            {1: per_head([0.1, math.inf])},
            ValueError,
            r"layer 1: d_scale must be finite to be saved, got \[0.1.*, inf\]",
        ),
    ],
)
def test_what_cannot_be_saved(tmp_path, criteria, error, message):
    path = tmp_path / "criteria.json"
    with pytest.raises(error, match=message):
        art_torch.save_criteria(criteria, path)
    assert not path.exists()
