"""``generate_batch`` with ART: what is restored, what is left alone, what is refused."""

from __future__ import annotations

import re
import threading

import pytest
import torch
from batched import NEW_TOKENS, answers, batching, enabled, generated, prompts_of
from test_art_on import CRITERION, SIZES
from test_patch import traces_of_patching
from tiny_models import PAD, build
from transformers import DynamicCache, GenerationConfig, LlamaModel
from transformers.models.llama import LlamaForCausalLM

import art_torch
from art_torch.integrations import continuous_batching


def state_of(model):
    configs = [id(m.config) for m in model.modules() if hasattr(m, "config")]
    own = [name for name, m in model.named_modules() if hasattr(m, "_art_own_config")]
    cached = hasattr(model, "_cached_continuous_batching_manager")
    return (*traces_of_patching(model), configs, own, cached)


def test_leaving_restores(tiny):
    model, prompts = tiny("llama"), prompts_of(30)
    before = state_of(model)
    handle = art_torch.patch(model, CRITERION)
    patched = state_of(model)
    enabled = continuous_batching.enable(handle)
    assert enabled.active
    assert state_of(model) != patched
    answers(model, prompts, persistent_manager=True)
    assert hasattr(model, "_cached_continuous_batching_manager")
    enabled.disable()
    enabled.disable()
    assert not enabled.active
    assert state_of(model) == patched
    # ``generate`` of the patched model works again.
    steps = handle.stats.steps
    model.generate(torch.tensor(prompts), max_new_tokens=3, do_sample=False)
    assert handle.stats.steps == steps + 2
    handle.unpatch()
    assert state_of(model) == before
    assert answers(model, prompts) == generated(model, prompts)


def test_plain_calls_take_other_caches(tiny):
    model = tiny("llama")
    with enabled(model, CRITERION):
        with pytest.raises(
            RuntimeError, match=r"continuous batching is enabled \(disable\(\) it\)"
        ):
            model(torch.tensor(prompts_of(30)), past_key_values=art_torch.ARTCache(model.config))
        model(torch.tensor(prompts_of(30)), past_key_values=DynamicCache(config=model.config))


def test_leaving_by_an_exception(tiny):
    model = tiny("llama")
    before = state_of(model)
    with pytest.raises(KeyError, match="mine"), enabled(model, CRITERION):
        raise KeyError("mine")
    assert state_of(model) == before


def test_unpatching_first(tiny):
    model, prompts = tiny("llama"), prompts_of(30, 20)
    before = state_of(model)
    handle = art_torch.patch(model, CRITERION)
    with continuous_batching.enable(handle):
        handle.unpatch()
        assert answers(model, prompts) == generated(model, prompts)
    assert handle.stats.steps == 0
    assert state_of(model) == before


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_generate_is_exact_meanwhile(implementation):
    model, prompts = build("llama"), prompts_of(300)
    model.set_attn_implementation(implementation)
    expected = generated(model, prompts)
    with enabled(model, CRITERION) as (handle, _):
        assert generated(model, prompts) == expected
    assert handle.stats.steps == 0


def test_two_models_at_once(tiny):
    """Each with its own settings, in threads, and one of them sharing a config with neither."""
    first, second, third = tiny("llama"), tiny("qwen3"), tiny("gemma3")
    prompts = prompts_of(200, 60, 130)
    expected = {model: generated(model, prompts) for model in (second, third)}
    got = {}

    def run(model):
        with torch.no_grad():
            got[model] = answers(model, prompts)

    with (
        enabled(first, CRITERION, **SIZES) as (stopping, _),
        enabled(second, None, walk="oldest_first") as (reading_all, _),
    ):
        run(first)
        alone = got.pop(first)
        threads = [threading.Thread(target=run, args=[model]) for model in (first, second, third)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert got[first] == alone
    assert {model: got[model] for model in (second, third)} == expected
    assert stopping.stats.read_fraction() < 1.0
    assert reading_all.stats.read_fraction() == 1.0


def test_a_model_of_the_same_config_is_left_alone():
    first = build("llama")
    second = LlamaForCausalLM(first.config).eval()
    prompts = prompts_of(200)
    expected = answers(second, prompts)
    with enabled(first, CRITERION) as (handle, _):
        assert answers(second, prompts) == expected
        answers(first, prompts)
    assert handle.stats.steps == NEW_TOKENS - 1


# ---------------------------------------------------------------- what is refused


def test_refused_handles(tiny):
    model = tiny("llama")
    with pytest.raises(TypeError, match=r"what art_torch.patch.* returned, got LlamaForCausalLM"):
        continuous_batching.enable(model)
    with enabled(model, None) as (handle, _):
        with pytest.raises(RuntimeError, match="enabled already"):
            continuous_batching.enable(handle)
        with pytest.raises(RuntimeError, match="patched already"):
            art_torch.patch(model, None)
    with pytest.raises(RuntimeError, match="not patched any more"):
        continuous_batching.enable(handle)
    with (
        art_torch.patch(model, None, dense_every=8) as handle,
        pytest.raises(ValueError, match=r"dense_every counts .*: patch without it"),
    ):
        continuous_batching.enable(handle)


@pytest.mark.parametrize("version", ["5.16.1", "5.25.0.dev0", "6.0.0", "4.57.6"])
def test_refused_versions(tiny, monkeypatch, version):
    monkeypatch.setattr(continuous_batching.transformers, "__version__", version)
    with (
        art_torch.patch(tiny("llama"), None) as handle,
        pytest.raises(
            RuntimeError, match=rf"transformers 5\.17 to 5\.24, got {re.escape(version)}: "
        ),
    ):
        continuous_batching.enable(handle)


def test_refused_models(tiny):
    base = LlamaModel(tiny("llama").config).eval()
    with (
        art_torch.patch(base, None) as handle,
        pytest.raises(ValueError, match="LlamaModel has no generate_batch"),
    ):
        continuous_batching.enable(handle)
    capped = tiny("gemma2")
    before = state_of(capped)
    with (
        art_torch.patch(capped, None) as handle,
        pytest.raises(ValueError, match=r"caps its logits at 5.0"),
    ):
        continuous_batching.enable(handle)
    assert state_of(capped) == before


def test_refused_layer_types():
    model = build("qwen3")
    model.config.layer_types = ["full_attention", "chunked_attention"] * 2
    model.config.attention_chunk_size = 64
    with (
        art_torch.patch(model, None) as handle,
        pytest.raises(ValueError, match=r"no continuous batching .*, got chunked_attention"),
    ):
        continuous_batching.enable(handle)


def test_refused_because_of_others():
    first = build("llama")
    second = LlamaForCausalLM(first.config).eval()
    with art_torch.patch(first, None), art_torch.patch(second, None) as handle:
        with pytest.raises(RuntimeError, match="shares its config with another patched model"):
            continuous_batching.enable(handle)
        assert second.config._attn_implementation == "art"
    assert second.config._attn_implementation == "eager"


def test_refused_managers(tiny):
    model = tiny("llama")
    answers(model, prompts_of(20), persistent_manager=True)
    with art_torch.patch(model, None) as handle:
        with pytest.raises(RuntimeError, match=r"call model\.destroy_cached_continuous_batching"):
            continuous_batching.enable(handle)
        model.destroy_cached_continuous_batching_manager()
        with continuous_batching.enable(handle):
            answers(model, prompts_of(20))


def test_refused_page_sizes(tiny):
    model = tiny("llama")
    config = GenerationConfig(max_new_tokens=3, eos_token_id=-1, pad_token_id=PAD)
    with enabled(model, None):
        outputs = model.generate_batch(
            prompts_of(20),
            generation_config=config,
            continuous_batching_config=batching(page_size=8),
        )
    (output,) = outputs.values()
    assert "must be a multiple of unit_size 16, got 8" in output.error
    with enabled(model, None, unit_size=8):
        assert answers(model, prompts_of(20), page_size=8) == generated(model, prompts_of(20))
