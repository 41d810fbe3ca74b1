"""Patching and unpatching: what is restored, what is said, and where exact attention runs."""

from __future__ import annotations

import logging

import pytest
import torch
from test_exact import generate
from tiny_models import build, prompt
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache, StaticCache
from transformers.models.llama import LlamaForCausalLM

import art_torch

RULE = art_torch.Stability()


def traces_of_patching(model):
    left = [name for name, module in model.named_modules() if hasattr(module, "_art_settings")]
    hooks = [
        name
        for name, module in model.named_modules()
        if module._forward_pre_hooks or module._forward_hooks
    ]
    return (
        left,
        hooks,
        {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")},
    )


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_unpatch_restores(implementation):
    model = build("llama")
    model.set_attn_implementation(implementation)
    before, ids = traces_of_patching(model), prompt(1, 20)
    expected = model(ids).logits
    with art_torch.patch(model, RULE) as handle:
        assert handle.active
        assert model.config._attn_implementation == "art"
    assert not handle.active
    assert traces_of_patching(model) == before == ([], [], {implementation})
    assert torch.equal(model(ids).logits, expected)

    handle = art_torch.patch(model, RULE)
    handle.unpatch()
    handle.unpatch()
    assert traces_of_patching(model) == before


def test_generate_does_not_compile_the_steps_of_a_static_cache(tiny):
    """As it does on a GPU, by itself: the compiled steps would be exact attention."""
    model, ids = tiny("llama"), prompt(1, 20)
    everywhere = CompileConfig(backend="eager")
    everywhere._compile_all_devices = True
    before = model.generation_config.disable_compile
    with art_torch.patch(model, RULE) as handle:
        cache = StaticCache(model.config, max_cache_len=40)
        generate(model, ids, cache, max_new_tokens=5, compile_config=everywhere)
    assert handle.stats.steps == 4
    assert handle.stats.exact_fallbacks == 0
    assert model.generation_config.disable_compile == before


def test_unpatch_restores_after_an_exception(tiny):
    model = tiny("llama")
    before = traces_of_patching(model)
    with pytest.raises(KeyError, match="mine"), art_torch.patch(model, RULE):
        raise KeyError("mine")
    assert traces_of_patching(model) == before


def test_nothing_changes_when_patching_fails(tiny):
    model = tiny("llama")
    before = traces_of_patching(model)
    with pytest.raises(ValueError, match=r"skip_layers must name layers 0 to 3 .* got \[7\]"):
        art_torch.patch(model, RULE, skip_layers=[1, 7])
    assert traces_of_patching(model) == before


def test_patching_twice_is_refused(tiny):
    model = tiny("llama")
    with (
        art_torch.patch(model, RULE),
        pytest.raises(RuntimeError, match="patched already: unpatch"),
    ):
        art_torch.patch(model, None)
    with art_torch.patch(model, None):
        pass


def test_models_that_share_a_config():
    first = build("llama")
    second = LlamaForCausalLM(first.config).eval()
    ids = prompt(1, 300)
    expected = generate(second, ids, max_new_tokens=4)
    one = art_torch.patch(first, art_torch.Stability(0.3, 0.05, 1))
    got = generate(second, ids, max_new_tokens=4)  # not patched: exact
    assert torch.equal(got.sequences, expected.sequences)
    two = art_torch.patch(second, None)
    one.unpatch()
    generate(second, ids, max_new_tokens=4)
    assert two.stats.steps == 3
    assert second.config._attn_implementation == "art"
    two.unpatch()
    assert second.config._attn_implementation == "eager"


def test_an_unpatched_model_refuses_an_art_cache(tiny):
    model = tiny("llama")
    cache = art_torch.ARTCache(model.config)
    with pytest.raises(RuntimeError, match="ARTCache works with a patched model only"):
        model(prompt(1, 20), past_key_values=cache)
    cache.reset()
    with art_torch.patch(model, None):
        model(prompt(1, 20), past_key_values=cache)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="ARTCache works with a patched model only"):
            model(prompt(1, 1), past_key_values=cache)


def test_an_unpatched_model_of_the_same_config_refuses_an_art_cache():
    first = build("llama")
    second = LlamaForCausalLM(first.config).eval()
    with art_torch.patch(first, None):
        cache = art_torch.ARTCache(first.config)
        with pytest.raises(RuntimeError, match="this model is not"):
            second(prompt(1, 20), past_key_values=cache)


def test_gradients_run_exact_attention(tiny, caplog):
    model, ids = tiny("llama"), prompt(2, 60)
    with torch.enable_grad():
        expected = model(ids, labels=ids)
        expected.loss.backward()
        wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        with art_torch.patch(model, RULE) as handle:
            got = model(ids, labels=ids)
            got.loss.backward()
            step = model(ids[:, :1], past_key_values=got.past_key_values)
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
    assert step.logits.requires_grad
    torch.testing.assert_close(got.logits, expected.logits)
    torch.testing.assert_close(grads, wanted)
    assert handle.stats.steps == 0
    assert "gradients are enabled" in caplog.text


def test_training_mode_runs_exact_attention(tiny, caplog):
    model, ids = tiny("llama"), prompt(1, 30)
    with art_torch.patch(model, RULE) as handle:
        model.train()
        try:
            cache = model(ids, past_key_values=DynamicCache()).past_key_values
            model(ids[:, :1], past_key_values=cache)
        finally:
            model.eval()
    assert handle.stats.steps == 0
    assert "training mode" in caplog.text


def test_output_attentions(tiny):
    model, ids = tiny("llama"), prompt(1, 30)
    expected = model(ids, output_attentions=True)
    with art_torch.patch(model, RULE):
        cache = art_torch.ARTCache(model.config)
        got = model(ids[:, :29], past_key_values=cache, output_attentions=True)
        last = model(ids[:, 29:], past_key_values=cache, output_attentions=True)
    assert len(got.attentions) == len(last.attentions) == 4
    torch.testing.assert_close(got.attentions[2], expected.attentions[2][:, :, :29, :29])
    torch.testing.assert_close(last.attentions[2], expected.attentions[2][:, :, 29:])


def test_memory_limit_of_generate(tiny):
    model = tiny("llama")
    cache = art_torch.ARTCache(model.config, max_bytes=400_000)
    with art_torch.patch(model, None):
        with pytest.raises(MemoryError, match="pass a larger max_bytes"):
            generate(model, prompt(1, 90), cache, max_new_tokens=400)
        held = cache.get_seq_length()
        assert 128 <= held < 490
        assert cache.bytes_in_use <= 400_000
        cache.crop(-(held - 80))  # what is in the cache is still good
        expected = model(prompt(1, 90)).logits[:, 80:]
        got = model(prompt(1, 90)[:, 80:], past_key_values=cache).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


def interrupt(*_):
    raise KeyboardInterrupt


def test_an_interrupted_pass_is_noticed(tiny, monkeypatch):
    model, ids = tiny("llama"), prompt(1, 30)
    cache = art_torch.ARTCache(model.config)
    expected = model(ids).logits[:, 20:]
    with art_torch.patch(model, None):
        model(ids[:, :20], past_key_values=cache)
        with monkeypatch.context() as patching:
            patching.setattr(model.model.layers[2].mlp, "forward", interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(ids[:, 20:21], past_key_values=cache)
        with pytest.raises(RuntimeError, match="a forward pass was interrupted"):
            model(ids[:, 20:21], past_key_values=cache)
        cache.crop(20 - cache.get_seq_length())
        got = model(ids[:, 20:], past_key_values=cache).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


def test_one_line_about_the_walk(tiny, caplog):
    caplog.set_level(logging.INFO, logger="art_torch")
    with art_torch.patch(tiny("llama"), RULE, walk="oldest_first"):
        pass
    assert len(caplog.records) == 1
    assert "oldest_first" in caplog.text
    assert "recent tokens may never be read" in caplog.text
    caplog.clear()
    with art_torch.patch(tiny("llama"), None):
        pass
    assert not caplog.records


def test_half_types():
    for dtype in (torch.bfloat16, torch.float16):
        model = build("llama").to(dtype)
        ids = prompt(2, 100)
        expected = model(ids).logits[:, -1].float()
        cache = art_torch.ARTCache(model.config)
        with art_torch.patch(model, None):
            model(ids[:, :-1], past_key_values=cache)
            got = model(ids[:, -1:], past_key_values=cache).logits[:, -1].float()
        exact = build("llama")(ids).logits[:, -1]
        # No further from float32 than the model's own attention in this dtype, with room for luck.
        assert (got - exact).norm() < 1.5 * (expected - exact).norm()


def test_from_config_with_art_is_not_offered():
    """The name alone does not patch: without settings the model's own attention runs."""
    with art_torch.patch(build("llama"), RULE):
        pass
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        build("llama").config, attn_implementation="art"
    ).eval()
    ids = prompt(1, 40)
    got = generate(model, ids, max_new_tokens=4)
    model.set_attn_implementation("eager")
    assert torch.equal(got.sequences, generate(model, ids, max_new_tokens=4).sequences)


def test_autocast_runs_exact_attention(tiny):
    """Autocast may give query, key and value different dtypes."""
    model, ids = tiny("llama"), prompt(1, 40)
    cache, own = art_torch.ARTCache(model.config), DynamicCache()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids[:, :39], past_key_values=own)
        expected = model(ids[:, 39:], past_key_values=own).logits
        with art_torch.patch(model, RULE):
            model(ids[:, :39], past_key_values=cache)
            got = model(ids[:, 39:], past_key_values=cache).logits
    assert (got - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("autocast", "Here query, key and value differ in dtype, as under torch.autocast"),
        ("training", "Here the model is in training mode"),
    ],
)
def test_a_preallocated_cache_says_what_it_does_not_take(what, reason):
    model = build("llama").train(what == "training")
    cache = art_torch.ARTCache(model.config, max_length=60)
    with (
        art_torch.patch(model, RULE),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=what == "autocast"),
        pytest.raises(RuntimeError, match=reason),
    ):
        generate(model, prompt(1, 40), cache, max_new_tokens=4)


def test_a_graphed_decoder_says_that_it_takes_no_autocast(tiny):
    model = tiny("llama")
    with art_torch.patch(model, RULE), torch.autocast("cpu", dtype=torch.bfloat16):
        decoder = art_torch.GraphedDecoder(model, max_length=60)
        with pytest.raises(RuntimeError, match=r"Here query, .* as under torch\.autocast"):
            decoder.generate(prompt(1, 40), max_new_tokens=4)
