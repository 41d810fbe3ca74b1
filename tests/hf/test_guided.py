"""patch(walk="guided"): exact without a rule, the calls of the reference with one."""

from __future__ import annotations

import logging

import pytest
import torch
from test_art_on import Recorder
from test_exact import assert_same, cache_of, generate
from tiny_models import LAYERS, PAD, SHARING, build, prompt

import art_torch
from art_torch import guided_walk, ops
from art_torch.criterion import rules_of
from art_torch.integrations.transformers import patching, plan

RULE = art_torch.Stability(d_scale=0.3, d_direction=0.1, patience=1)
FULL_ATTENTION = ["llama", "qwen3", "phi3"]


def guided(model, criterion=None, exact_where_faster=False, **kwargs):
    options = kwargs | {"exact_where_faster": exact_where_faster}
    return art_torch.patch(model, criterion, walk="guided", **options)


def full_layers(model) -> list[int]:
    cache = art_torch.ARTCache(model.config)
    return [i for i, layer in enumerate(cache.layers) if not layer.is_sliding]


def padded_batch(batch: int = 4, tokens: int = 400):
    """Rows of 400, 280, 130 and 20 tokens."""
    ids = prompt(batch, tokens)
    mask = torch.ones_like(ids)
    for row, pads in enumerate((0, 120, 270, 380)[:batch]):
        ids[row, :pads], mask[row, :pads] = PAD, 0
    return ids, mask


# ---------------------------------------------------------------- exact without a rule


@pytest.mark.parametrize("key_codes", [False, True])
@pytest.mark.parametrize("tokens", [20, 330])
def test_greedy(any_tiny, tokens, key_codes):
    ids = prompt(1, tokens)
    expected = generate(any_tiny, ids, max_new_tokens=70)
    on = key_codes and bool(full_layers(any_tiny))
    cache = art_torch.ARTCache(any_tiny.config, key_codes=on)
    with guided(any_tiny) as handle:
        assert_same(generate(any_tiny, ids, cache, max_new_tokens=70), expected)
    assert handle.stats.exact_fallbacks == 0
    assert handle.stats.read_fraction() == 1.0
    coded = [layer.codes is not None for layer in cache.layers]
    assert coded == [not layer.is_sliding for layer in cache.layers]


def test_batch_of_different_lengths(any_tiny):
    ids, mask = padded_batch()
    expected = generate(any_tiny, ids, attention_mask=mask)
    cache = art_torch.ARTCache(any_tiny.config, page_size=16)
    with guided(any_tiny) as handle:
        assert_same(generate(any_tiny, ids, cache, attention_mask=mask), expected)
    assert handle.stats.read_fraction() == 1.0


def test_beam_search(any_tiny):
    ids, mask = padded_batch(2)
    options = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 40}
    expected = generate(any_tiny, ids, **options)
    cache = art_torch.ARTCache(any_tiny.config)
    with guided(any_tiny):
        got = generate(any_tiny, ids, cache, **options)
    assert torch.equal(got.sequences, expected.sequences)
    if 0 in cache.tables:  # beams with a common past share its codes
        groups = cache.tables[0].codes.groups
        assert groups.pages_in_use < groups.used.sum()


def test_prompt_lookup(any_tiny):
    ids = prompt(1, 150).repeat(1, 2)
    expected = generate(any_tiny, ids, max_new_tokens=60)
    cache = art_torch.ARTCache(any_tiny.config)
    with guided(any_tiny):
        got = generate(any_tiny, ids, cache, prompt_lookup_num_tokens=4, max_new_tokens=60)
    assert torch.equal(got.sequences, expected.sequences)


def test_two_turns_and_reset(any_tiny):
    first, second = prompt(1, 250), prompt(1, 60, seed=1)

    def talk(cache):
        so_far = generate(any_tiny, first, cache).sequences
        return generate(any_tiny, torch.cat([so_far, second], dim=1), cache).sequences

    expected = talk(cache_of("dynamic", any_tiny))
    cache = art_torch.ARTCache(any_tiny.config)
    with guided(any_tiny):
        for _ in range(2):
            assert torch.equal(talk(cache), expected)
            cache.reset()


@pytest.mark.parametrize("name", sorted(SHARING))
def test_layers_that_share_keys(tiny, name):
    model = tiny(name)
    ids = prompt(2, 300)
    expected = generate(model, ids)
    with guided(model) as handle:
        assert_same(generate(model, ids, art_torch.ARTCache(model.config)), expected)
    assert len(handle.stats.layers) == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype):
    model = build("llama").to(dtype)
    ids = prompt(2, 400)
    logits = []
    for walk in ("oldest_first", "guided"):
        cache = art_torch.ARTCache(model.config)
        with art_torch.patch(model, None, walk=walk) as handle:
            model(ids[:, :-1], past_key_values=cache)
            logits.append(model(ids[:, -1:], past_key_values=cache).logits[:, -1].double())
        assert handle.stats.read_fraction() == 1.0
    exact = build("llama").double()(ids).logits[:, -1]
    error = [(each - exact).norm() for each in logits]
    assert error[1] < 1.5 * error[0]  # another order of summation, no worse but for luck


# ---------------------------------------------------------------- with a rule


def with_explicit_walk(arguments):
    """Arguments of a call, with the walk that the codes give at this time instead of "guided"."""
    named = dict(arguments)
    if named["walk"] != "guided":
        return named
    codes = named.pop("key_codes"), named.pop("code_table")
    tensors = (named[name] for name in ("query", "key_cache", "block_table", "seq_lens"))
    names = ("scale", "softcap", "attn_sinks", "sliding_window", "seq_starts", "key_scale")
    logits = {name: named[name] for name in names if name in named}
    walk = guided_walk(*tensors, *codes, **logits, rest=True)
    named |= dict(zip(("walk", "walk_lens", "num_pinned"), walk[:3], strict=True))
    if rules_of(named["criterion"]).residual_mass is not None:
        named["log_rest"] = walk.log_rest
    return named


class GuidedRecorder(Recorder):
    """Replays each call through the reference, with the walk that the codes at that time gave."""

    def __init__(self):
        super().__init__()
        self.walks: list[str] = []

    def __call__(self, layer, arguments, result):
        self.walks.append(arguments["walk"])
        super().__call__(layer, with_explicit_walk(arguments), result)


def assert_full_layers_stop(model, recorder, handle):
    """What full attention reads is cut short everywhere, and windows are read in full."""
    full = full_layers(model)
    assert (recorder.stopped > 0) == bool(full)
    fractions = handle.stats.fractions()
    for layer in range(LAYERS):
        assert (fractions[layer] < 1.0).all() == (layer in full)


@pytest.mark.parametrize(
    ("page_size", "kv_dtype"), [(16, None), (64, None), (256, None), (64, torch.int8)]
)
def test_calls_agree_with_the_reference(any_tiny, page_size, kv_dtype):
    recorder = GuidedRecorder()
    ids, mask = padded_batch(2, 500)
    cache = art_torch.ARTCache(any_tiny.config, page_size, kv_dtype=kv_dtype)
    with guided(any_tiny, RULE, on_call=recorder, block_size=16) as handle:
        generate(any_tiny, ids, cache, attention_mask=mask, max_new_tokens=6)
    assert recorder.walks.count("guided") == 5 * len(full_layers(any_tiny))
    assert recorder.inside <= 0.02 * recorder.compared
    assert_full_layers_stop(any_tiny, recorder, handle)


def test_beams_agree_with_the_reference(tiny):
    model, recorder = tiny("gemma2"), GuidedRecorder()
    cache = art_torch.ARTCache(model.config)
    with guided(model, RULE, on_call=recorder, block_size=16):
        generate(model, prompt(1, 400), cache, num_beams=3, max_new_tokens=80)
    assert recorder.stopped > 0


def test_a_cache_that_is_there_already(tiny):
    """Filled by a model without codes; they are made at the first step, once."""
    model = tiny("llama")
    ids = prompt(1, 500)
    cache, coded = (
        art_torch.ARTCache(model.config),
        art_torch.ARTCache(model.config, key_codes=True),
    )
    with art_torch.patch(model, RULE):
        for each in (cache, coded):
            model(ids[:, :-1], past_key_values=each)
    assert cache.tables[0].codes is None
    with guided(model, RULE) as handle:
        got = [model(ids[:, -1:], past_key_values=each).logits for each in (cache, coded)]
    assert torch.equal(*got)
    assert cache.bytes_in_use == coded.bytes_in_use
    assert handle.stats.read_fraction() < 1.0


def test_keys_written_by_others(tiny):
    model = tiny("llama")
    ids = prompt(1, 500)
    results = []
    for key_codes in (True, False):
        cache = art_torch.ARTCache(model.config, key_codes=key_codes)
        with art_torch.patch(model, RULE):
            model(ids, past_key_values=cache)
        for layer in cache.layers:
            page = layer.table.block_table[0, 4]
            layer.storage.key_cache[page] = layer.storage.key_cache[page].flip(0)
        with guided(model, RULE):
            results.append(model(ids[:, :1], past_key_values=cache).logits)
    assert torch.equal(*results)


def test_short_rows_skip_the_codes(tiny, monkeypatch):
    """Everything is pinned there: the same bits, without a look at the codes."""
    model = tiny("llama")
    calls = []
    monkeypatch.setattr(
        ops, "guided_walk", lambda *args, **kw: calls.append(1) or guided_walk(*args, **kw)
    )

    def run(tokens):
        calls.clear()
        cache = art_torch.ARTCache(model.config)
        with guided(model, RULE):
            model(prompt(2, tokens - 1), past_key_values=cache)
            return model(prompt(2, 1), past_key_values=cache).logits, len(calls)

    short, count = run(191)
    assert count == 0
    assert run(192)[1] == LAYERS
    monkeypatch.setattr(plan, "_PINNED_TOKENS", 0)
    guided_all, count = run(191)
    assert count == LAYERS
    assert torch.equal(short, guided_all)


def test_exact_where_that_is_faster(tiny, monkeypatch, caplog):
    """On a device that gains from some amount of keys and values on, which it is told."""
    caplog.set_level(logging.WARNING, logger="art_torch")
    model, walks = tiny("llama"), []
    token_bytes = 2 * model.config.num_key_value_heads * model.config.head_dim * 4
    monkeypatch.setattr(patching, "least_guided_bytes", lambda device: 402 * 2 * token_bytes)

    def run(**options):
        walks.clear()
        cache = art_torch.ARTCache(model.config)

        def on_call(layer, arguments, _):
            if layer == 0:
                walks.append((arguments["walk"], arguments["criterion"]))

        with guided(model, RULE, on_call=on_call, block_size=16, **options) as handle:
            generate(model, prompt(2, 400), cache, max_new_tokens=5)
        assert handle.stats.read_fraction() < 1.0
        return handle.stats.exact_fallbacks

    assert run(exact_where_faster=True) == LAYERS  # one step
    exact = ("sink_recent", None)
    assert walks == [exact, ("guided", RULE), ("guided", RULE), ("guided", RULE)]
    texts = [record.getMessage() for record in caplog.records if "is faster" in record.message]
    assert len(texts) == 1
    assert "less than 0 MB" in texts[0]
    assert run() == 0
    assert walks == 4 * [("guided", RULE)]


def test_a_cpu_always_guides():
    assert plan.least_guided_bytes(torch.device("cpu")) == 0


def test_exact_layers_take_no_codes(tiny):
    model, walks = tiny("llama"), {}

    def on_call(layer, arguments, _):
        walks[layer] = arguments["walk"], arguments["criterion"]

    settings = {"skip_layers": [0], "per_layer": {2: None}, "on_call": on_call}
    with guided(model, RULE, **settings) as handle:
        generate(model, prompt(1, 400), art_torch.ARTCache(model.config), max_new_tokens=4)
    exact, stopping = ("sink_recent", None), ("guided", RULE)
    assert walks == {0: exact, 1: stopping, 2: exact, 3: stopping}
    assert (handle.stats.fractions()[[0, 2]] == 1.0).all()
