"""patch(walk="guided"): exact without a rule, and what its calls, refusals and statistics are."""

from __future__ import annotations

import logging

import pytest
import torch
from test_art_on import Recorder
from test_exact import assert_same, cache_of, generate, left_padded
from tiny_models import LAYERS, PAD, SHARING, build, prompt
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache

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


# ---------------------------------------------------------------- the mass that was read


def test_measured_mass(tiny):
    model, shares = tiny("gpt_oss"), []
    full = full_layers(model)

    def on_call(layer, arguments, result):
        if layer not in full:
            return
        names = ("query", "key_cache", "value_cache", "block_table", "seq_lens", "scale")
        exact = art_torch.reference.decode_attention(**{n: arguments[n] for n in names})
        true = (result.lse.cpu().double() - exact.lse.double()).exp()
        tensors = {n: arguments[n] for n in names[:2] + names[3:]}
        codes = {n: arguments[n] for n in ("key_codes", "code_table", "attn_sinks")}
        log_mass = guided_walk(**tensors, **codes).log_mass.cpu().double()
        units = -(-result.tokens_read.cpu() // 16)
        read = [log_mass[0, head, : units[0, head]].exp().sum() for head in range(2)]
        estimated = torch.stack(read) / log_mass[0].exp().sum(-1)
        shares.append((true.mean(), true.min(), estimated.mean()))

    with guided(model, RULE, on_call=on_call, measure_mass=True, block_size=16) as handle:
        generate(model, prompt(1, 500), art_torch.ARTCache(model.config), max_new_tokens=5)
    mass = handle.stats.mass_read()
    means = torch.tensor(shares)
    assert means.shape == (4 * len(full), 3)
    layer = full[0]
    assert float(mass.true[layer]) == pytest.approx(float(means[:, 0].mean()), abs=1e-5)
    assert float(mass.lowest[layer]) == pytest.approx(float(means[:, 1].min()), abs=1e-5)
    assert float(mass.estimated[layer]) == pytest.approx(float(means[:, 2].mean()), abs=1e-5)
    assert 0 < mass.lowest[layer] < mass.true[layer] < 1
    windows = [i for i in range(LAYERS) if i not in full]
    assert mass.estimated[windows].isnan().all()
    assert len(handle.stats.table().columns) == 8
    handle.stats.reset()
    with pytest.raises(ValueError, match="measure_mass=True"):
        handle.stats.mass_read()


@pytest.mark.parametrize("kind", ["art", "dynamic"])
def test_mass_of_other_walks(tiny, kind):
    model = tiny("gemma2")
    ids, mask = left_padded(2, 330)
    sizes = {"num_pinned": 1, "block_size": 16, "unit_size": 8, "measure_mass": True}
    shares = []
    for criterion in (None, RULE):
        with art_torch.patch(model, criterion, **sizes) as handle:
            cache = cache_of(kind, model)
            generate(model, ids, cache, attention_mask=mask, max_new_tokens=4)
        shares.append(handle.stats.mass_read())
    torch.testing.assert_close(shares[0].lowest, torch.ones(LAYERS).double(), atol=1e-5, rtol=0)
    assert shares[1].true[2] < 1.0  # the layer without a window
    assert (shares[1].lowest <= shares[1].true + 1e-9).all()
    assert shares[1].estimated.isnan().all()


# ---------------------------------------------------------------- what is refused, what is said


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


# ---------------------------------------------------------------- compiled steps


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


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_one_graph(tiny, name):
    model = tiny(name)
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    ids = prompt(2, 378)
    with guided(model, RULE, block_size=16) as handle:
        expected = decode(model, model, art_torch.ARTCache(model.config), ids, 8)
        read = handle.stats.tokens_read()
        assert handle.stats.read_fraction() < 1.0
        handle.stats.reset()
        cache = art_torch.ARTCache(model.config)
        got = decode(model, torch.compile(model, fullgraph=True, backend=backend), cache, ids, 8)
        assert backend.frame_count == 1
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(handle.stats.tokens_read(), read)
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
