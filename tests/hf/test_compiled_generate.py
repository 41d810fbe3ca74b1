"""``generate`` compiles the decode step of an ARTCache of fixed capacity, by its own means."""

from __future__ import annotations

import copy

import pytest
import torch
from test_exact import cache_of, generate, left_padded
from test_guided import guided
from tiny_models import build, prompt
from torch._dynamo.utils import counters
from transformers import CompileConfig

import art_torch

RULE = art_torch.Stability(d_scale=0.3, d_direction=0.1, patience=1)
SIZES = {"num_pinned": 1, "block_size": 16, "unit_size": 8}
PATCHES = {
    "exact": {"criterion": None},
    "sink_recent": {"criterion": RULE, **SIZES},
    "guided": {"criterion": RULE, "walk": "guided", "block_size": 16, "exact_where_faster": False},
    "dense_every": {"criterion": RULE, "dense_every": 3, **SIZES},
}


def fixed(model, max_length=230, **options):
    return art_torch.ARTCache(model.config, max_length=max_length, **options)


def compiling(backend="aot_eager", mode=None):
    """What makes ``generate`` compile; on a GPU it needs ``disable_compile=False`` alone."""
    config = CompileConfig(fullgraph=True, backend=backend, mode=mode)
    config._compile_all_devices = True
    return {"compile_config": config, "disable_compile": False}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def assert_one_graph():
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


# ---------------------------------------------------------------- compiled


@pytest.mark.parametrize(
    ("name", "kind"),
    [*(("llama", kind) for kind in PATCHES), ("gemma2", "guided"), ("mistral", "sink_recent")],
)
def test_tokens_of_eager_steps(name, kind):
    model = build(name)
    ids, mask = left_padded(3, 200)
    options = {"attention_mask": mask, "max_new_tokens": 12}
    stock = generate(model, ids, **options).sequences
    with art_torch.patch(model, **PATCHES[kind]) as handle:
        expected = generate(model, ids, art_torch.ARTCache(model.config), **options).sequences
        read, present = handle.stats.tokens_read(), handle.stats.tokens_present()
        for _ in range(2):  # another cache does not compile anew
            handle.stats.reset()
            cache = fixed(model)
            got = generate(model, ids, cache, **options, **compiling()).sequences
            assert torch.equal(got, expected)
            assert_one_graph()
            assert torch.equal(handle.stats.tokens_read(), read)
            assert torch.equal(handle.stats.tokens_present(), present)
        assert handle.stats.exact_fallbacks == 0
    if kind == "exact":
        assert torch.equal(expected, stock)
    assert cache.get_seq_length() == 211


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor(mode):
    model, ids = build("llama"), prompt(2, 150)
    expected = generate(model, ids, max_new_tokens=10).sequences
    with art_torch.patch(model, None):
        options = compiling("inductor", mode)
        assert torch.equal(
            generate(model, ids, fixed(model), max_new_tokens=10, **options).sequences, expected
        )
    assert_one_graph()


def test_without_pads_and_in_turns():
    """A second prompt, cropping and reset go back to lengths on the host, and on again."""
    model, first, second = build("llama"), prompt(2, 90), prompt(2, 30, seed=1)

    def talk(cache, **options):
        so_far = generate(model, first, cache, **options).sequences
        cache.crop(-3)
        turn = torch.cat([so_far[:, :-4], second], dim=1)
        # Without a mask, answers that have the pad token are taken for pads.
        options["attention_mask"] = torch.ones_like(turn)
        return generate(model, turn, cache, **options).sequences

    expected = talk(cache_of("dynamic", model))
    cache = fixed(model)
    with art_torch.patch(model, None):
        for _ in range(2):
            assert torch.equal(talk(cache, **compiling()), expected)
            cache.reset()
    assert not counters["graph_break"]


def test_turns_of_the_guided_walk():
    """Codes are made anew between turns, and steps are not compiled anew for that."""
    model, turn = build("llama"), prompt(2, 200)
    second = prompt(2, 30, seed=1)

    def talk(cache, **options):
        so_far = generate(model, turn, cache, **options).sequences
        so_far = torch.cat([so_far, second], dim=1)
        options["attention_mask"] = torch.ones_like(so_far)
        return generate(model, so_far, cache, **options).sequences

    with art_torch.patch(model, **PATCHES["guided"]):
        expected = talk(art_torch.ARTCache(model.config))
        cache = fixed(model, 300)
        assert torch.equal(talk(cache, **compiling()), expected)
        # PyTorch counts copies of compiled steps, and others' writes would look the same.
        assert cache.tables[0].codes.keys_were_written
    assert_one_graph()


def test_keys_and_values_in_eight_bits():
    model, ids = build("llama"), prompt(2, 150)
    with art_torch.patch(model, **PATCHES["guided"]):
        expected = generate(model, ids, art_torch.ARTCache(model.config, kv_dtype=torch.int8))
        got = generate(model, ids, fixed(model, kv_dtype=torch.int8), **compiling())
    assert torch.equal(got.sequences, expected.sequences)
    assert_one_graph()


def test_prompts_of_one_token():
    model, ids = build("llama"), prompt(2, 1)
    expected = generate(model, ids, max_new_tokens=9).sequences
    with art_torch.patch(model, None):
        got = generate(model, ids, fixed(model), max_new_tokens=9, **compiling()).sequences
    assert torch.equal(got, expected)


# ---------------------------------------------------------------- not compiled


def test_it_is_compiled_only_if_asked_for():
    model, ids = build("llama"), prompt(1, 40)
    with art_torch.patch(model, None):
        assert not art_torch.ARTCache(model.config).is_compileable
        assert fixed(model).is_compileable
        generate(model, ids, fixed(model), compile_config=compiling()["compile_config"])
    assert counters["stats"]["unique_graphs"] == 0


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}])
def test_what_else_generate_does(any_tiny, options):
    ids = prompt(1, 60).repeat(1, 2)
    expected = generate(any_tiny, ids, **options).sequences
    with guided(any_tiny):
        assert torch.equal(generate(any_tiny, ids, fixed(any_tiny), **options).sequences, expected)


def test_copies_go_their_own_way():
    model, ids = build("llama"), prompt(1, 130)
    with art_torch.patch(model, RULE, walk="guided"), torch.no_grad():
        cache = fixed(model)
        token = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        clone = copy.deepcopy(cache)
        expected = [model(token, past_key_values=clone).logits for _ in range(3)]
        got = [model(token, past_key_values=cache).logits for _ in range(3)]
    assert torch.equal(torch.cat(got), torch.cat(expected))


# ---------------------------------------------------------------- what is refused


def test_too_many_tokens():
    model = build("llama")
    ids, mask = left_padded(2, 60)
    ids, mask = ids[1:], mask[1:]  # the row with pads
    pads = int((mask == 0).sum())
    assert pads
    options = {"attention_mask": mask, "max_new_tokens": 10}
    with art_torch.patch(model, None):
        cache = fixed(model, 60 + 9 - pads, page_size=16)  # the last token is not stored
        generate(model, ids, cache, **options)
        cache = fixed(model, 60 + 8 - pads, page_size=16)
        with pytest.raises((ValueError, RuntimeError), match=r"larger max_length|has no room left"):
            generate(model, ids, cache, **options)
        with pytest.raises(ValueError, match=r"at least the 60 tokens .* got 50: pass a larger"):
            generate(model, prompt(1, 60), fixed(model, 50))
        cache = fixed(model, 62)
        model(prompt(1, 60), past_key_values=cache)
        for _ in range(2):
            model(prompt(1, 1), past_key_values=cache)
        with pytest.raises(RuntimeError, match=r"preallocated for 62; pass a larger max_length"):
            model(prompt(1, 1), past_key_values=cache)


def test_a_mask_that_hides_tokens():
    model, ids = build("llama"), prompt(1, 60)
    mask = torch.ones(1, 62, dtype=torch.int64)
    with art_torch.patch(model, None), torch.no_grad():
        cache = fixed(model)
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache, attention_mask=mask[:, :61])
        mask[0, 5] = 0
        with pytest.raises(ValueError, match="this attention mask hides some of them"):
            model(ids[:, :1], past_key_values=cache, attention_mask=mask)
        with pytest.raises(ValueError, match="cover the 61 tokens of the cache and the new one"):
            model(ids[:, :1], past_key_values=cache, attention_mask=torch.ones_like(mask[:, :61]))


def test_steps_that_are_exact_attention():
    model, ids = build("llama"), prompt(1, 60)
    with art_torch.patch(model, None):
        cache = fixed(model)
        model(ids, past_key_values=cache)
        with pytest.raises(RuntimeError, match=r"in eval mode and without output_attentions"):
            model.train()(ids[:, :1], past_key_values=cache)


def test_a_prompt_cannot_be_compiled():
    model = build("llama")
    step = torch.compile(model, fullgraph=True, backend="eager")
    refused = pytest.raises(RuntimeError, match=r"call cache\.preallocate\(max_length\)")
    with art_torch.patch(model, None), refused:
        step(prompt(1, 20), past_key_values=fixed(model))


@pytest.mark.parametrize("max_length", [0, -5])
def test_bad_max_length(max_length):
    with pytest.raises(ValueError, match=f"max_length must be positive, got {max_length}"):
        fixed(build("llama"), max_length)
