"""Presses of kvpress on patched models: what must not get in their way, and what is refused."""

from __future__ import annotations

import pytest
import torch
from batched import batching
from pressed import (
    PROMPT,
    alone,
    imported_kvpress,
    make,
    press_of,
)
from test_exact import TOKENS, assert_same, generate
from test_patch import traces_of_patching
from tiny_models import PAD, prompt
from transformers import AttentionInterface, DynamicCache, GenerationConfig, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import art_torch
from art_torch.integrations import continuous_batching
from art_torch.integrations.kvpress import compatible
from art_torch.integrations.transformers import presses


@pytest.fixture(scope="module", autouse=True)
def kvpress():
    with imported_kvpress() as module:
        yield module


@pytest.fixture(scope="module")
def llama():
    return make("llama")


# ---------------------------------------------------------------- traps


@pytest.mark.parametrize("press_first", [False, True])
def test_either_order(llama, press_first):
    ids, press = prompt(1, PROMPT), press_of("snapkv")
    expected = alone(llama, press, ids)
    patching = lambda: art_torch.patch(llama, None)  # noqa: E731
    managers = [lambda: press(llama), patching] if press_first else [patching, lambda: press(llama)]
    with managers[0](), managers[1]():
        assert_same(generate(llama, ids, art_torch.ARTCache(llama.config)), expected)


@pytest.mark.parametrize("press", ["knorm", "adakv_snapkv"])
def test_imported_after_patching(llama, kvpress, monkeypatch, press):
    """kvpress wraps our attention function, and takes every step of an ARTCache for a prompt."""
    ids = prompt(1, PROMPT)
    expected = alone(llama, press_of(press), ids)
    with art_torch.patch(llama, None) as handle:
        wrapped = kvpress.attention_patch.attention_patch(AttentionInterface._global_mapping["art"])
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "art", wrapped)
        with press_of(press)(llama):
            assert_same(generate(llama, ids, art_torch.ARTCache(llama.config)), expected)
    assert handle.stats.steps == TOKENS - 1


def test_prompt_of_one_token(llama):
    ids = prompt(2, 1)
    expected = alone(llama, press_of("knorm"), ids)
    cache = art_torch.ARTCache(llama.config)
    with art_torch.patch(llama, None), press_of("knorm")(llama):
        assert_same(generate(llama, ids, cache), expected)
    assert all(layer.is_evicted for layer in cache.layers)


def test_masks_of_an_earlier_prompt(llama):
    """Neither what AdaKV has masked nor its pages outlive the prompt."""
    ids = prompt(1, PROMPT)
    expected = generate(llama, ids, DynamicCache(config=llama.config))
    cache = art_torch.ARTCache(llama.config)
    with art_torch.patch(llama, None):
        with press_of("adakv_snapkv")(llama):
            generate(llama, prompt(1, 300, seed=1), cache)
        assert_same(generate(llama, ids, DynamicCache(config=llama.config)), expected)
        cache.reset()
        assert_same(generate(llama, ids, cache), expected)
        # Where the cache is dense, AdaKV leaves a mask that ART would not see.
        refused = pytest.raises(RuntimeError, match=r"pass past_key_values=art_torch\.ARTCache")
        with press_of("adakv_snapkv")(llama), refused:
            generate(llama, ids, DynamicCache(config=llama.config))
        assert_same(generate(llama, ids, DynamicCache(config=llama.config)), expected)


@pytest.mark.parametrize("press", ["knorm", "pyramidkv"])
def test_patched_model_with_a_dynamic_cache(llama, press):
    ids = prompt(1, PROMPT)
    expected = alone(llama, press_of(press), ids)
    with art_torch.patch(llama, None) as handle, press_of(press)(llama):
        assert_same(generate(llama, ids, DynamicCache(config=llama.config)), expected)
    assert handle.stats.exact_fallbacks == 0


def test_dense_every_counts_evicted_tokens(llama):
    """Of an ARTCache; the layers of a dense cache differ, and do not tell what was evicted."""
    ids, exact = prompt(1, PROMPT), []

    def on_call(layer, arguments, _):
        if layer == 0:
            exact.append(arguments["criterion"] is None)

    rule = art_torch.Stability(0.3, 0.1, 1)
    options = {"dense_every": 4, "on_call": on_call}
    with art_torch.patch(llama, rule, **options), press_of("pyramidkv")(llama):
        generate(llama, ids, art_torch.ARTCache(llama.config), max_new_tokens=10)
        assert exact == [(PROMPT + i) % 4 == 0 for i in range(1, 10)]
        with pytest.raises(NotImplementedError, match=r"pass art_torch\.ARTCache\(model\.config\)"):
            generate(llama, ids, DynamicCache(config=llama.config))


def test_models_of_peft(llama):
    """A press goes by the layers of the model inside, as everything here does."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model, ids = peft.get_peft_model(make("llama"), settings).eval(), prompt(1, PROMPT)
    inner = model.get_base_model()
    with compatible(model), press_of("knorm")(inner):
        expected = generate(model, ids, DynamicCache(config=model.config))
    with art_torch.patch(model, None), press_of("knorm")(inner):
        assert_same(generate(model, ids, art_torch.ARTCache(model.config)), expected)
    assert not any(module._forward_hooks for module in model.modules())


def test_two_models(llama):
    """One with a press, one without, in turn."""
    other, ids = make("qwen3"), prompt(1, PROMPT)
    pressed = alone(llama, press_of("snapkv"), ids)
    whole = generate(other, ids, DynamicCache(config=other.config))
    with art_torch.patch(llama, None), art_torch.patch(other, None), press_of("snapkv")(llama):
        for _ in range(2):
            assert_same(generate(llama, ids, art_torch.ARTCache(llama.config)), pressed)
            assert_same(generate(other, ids, art_torch.ARTCache(other.config)), whole)


def test_nothing_is_left(llama):
    functions = dict(AttentionInterface._global_mapping), dict(ALL_ATTENTION_FUNCTIONS)
    before, ids = traces_of_patching(llama), prompt(1, PROMPT)
    expected = generate(llama, ids, DynamicCache(config=llama.config))
    cache = art_torch.ARTCache(llama.config)
    with art_torch.patch(llama, None), press_of("adakv_snapkv")(llama):
        generate(llama, ids, cache)
    assert traces_of_patching(llama) == before
    with (
        pytest.raises(AssertionError, match="should be greater than the window size"),
        art_torch.patch(llama, None),
        press_of("snapkv")(llama),
    ):
        generate(llama, prompt(1, 10), art_torch.ARTCache(llama.config))
    assert traces_of_patching(llama) == before
    with pytest.raises(KeyError, match="mine"), compatible(llama), press_of("snapkv")(llama):
        raise KeyError("mine")
    assert traces_of_patching(llama) == before
    assert (AttentionInterface._global_mapping, dict(ALL_ATTENTION_FUNCTIONS)) == functions
    # Where kvpress has wrapped our attention function as well, it leaves a None.
    assert all(getattr(module, "masked_key_indices", None) is None for module in llama.modules())
    assert_same(generate(llama, ids, DynamicCache(config=llama.config)), expected)


def test_after_a_press_that_failed(llama):
    cache, ids = art_torch.ARTCache(llama.config), prompt(1, PROMPT)
    expected = alone(llama, press_of("snapkv"), ids)
    with art_torch.patch(llama, None), press_of("snapkv")(llama):
        with pytest.raises(AssertionError, match="should be greater than the window size"):
            generate(llama, prompt(1, 10), cache)
        with pytest.raises(RuntimeError, match=r"a press did not finish .* reset\(\) the cache"):
            generate(llama, ids, cache)
        cache.reset()
        assert_same(generate(llama, ids, cache), expected)


# ---------------------------------------------------------------- what is refused


def test_unpatched_model(llama):
    refused = pytest.raises(RuntimeError, match="ARTCache works with a patched model only")
    with compatible(llama), press_of("knorm")(llama), refused:
        llama(prompt(1, PROMPT), past_key_values=art_torch.ARTCache(llama.config))


def test_press_with_a_hook_of_its_own(llama, kvpress):
    press = kvpress.DecodingPress(press_of("knorm"), compression_interval=4, target_size=64)
    refused = pytest.raises(NotImplementedError, match="DecodingPress has a forward hook of its")
    with art_torch.patch(llama, None), press(llama), refused:
        generate(llama, prompt(1, PROMPT), art_torch.ARTCache(llama.config))


def test_static_cache(llama):
    refused = pytest.raises(NotImplementedError, match="StaticCache: use an ARTCache")
    with art_torch.patch(llama, None), press_of("knorm")(llama), refused:
        generate(llama, prompt(1, PROMPT), StaticCache(llama.config, max_cache_len=300))


def test_no_cache(llama):
    refused = pytest.raises(RuntimeError, match="a cache, and this forward pass has none")
    with art_torch.patch(llama, None), press_of("knorm")(llama), refused:
        llama(prompt(1, PROMPT), use_cache=False)


def test_layers_that_share_keys(tiny):
    model = tiny("gemma4")
    cache, ids = art_torch.ARTCache(model.config), prompt(1, PROMPT)
    with art_torch.patch(model, None):
        press, hooks = press_of("knorm"), []
        for layer in model.model.layers:
            hooks.append(
                layer.self_attn.register_forward_hook(press.forward_hook, with_kwargs=True)
            )
        with pytest.raises(NotImplementedError, match="whose layers share keys"):
            model(ids, past_key_values=cache)
        for hook in hooks:
            hook.remove()


def test_mask_that_hides_what_is_left(llama):
    ids, mask = prompt(1, PROMPT), torch.ones(1, PROMPT + 1, dtype=torch.long)
    mask[0, 50:60] = 0
    cache = art_torch.ARTCache(llama.config)
    with art_torch.patch(llama, None):
        with press_of("knorm")(llama):
            llama(ids, past_key_values=cache)
        with pytest.raises(RuntimeError, match="pass the padding mask of the prompt"):
            llama(ids[:, :1], attention_mask=mask, past_key_values=cache)


def test_speculative_decoding(llama):
    """Its first pass has guesses behind the prompt, and the press compresses them with it."""
    ids = prompt(1, 100).repeat(1, 2)
    refused = pytest.raises(RuntimeError, match="do not combine presses with speculative decoding")
    with art_torch.patch(llama, None), press_of("knorm")(llama), refused:
        generate(llama, ids, art_torch.ARTCache(llama.config), prompt_lookup_num_tokens=4)


def test_continuous_batching(llama):
    config = GenerationConfig(max_new_tokens=3, eos_token_id=-1, pad_token_id=PAD)
    with art_torch.patch(llama, None) as handle, press_of("knorm")(llama):
        generate(llama, prompt(1, PROMPT), art_torch.ARTCache(llama.config))
        with continuous_batching.enable(handle):
            outputs = llama.generate_batch(
                prompt(1, PROMPT).tolist(),
                generation_config=config,
                continuous_batching_config=batching(),
            )
    (output,) = outputs.values()
    assert "presses of kvpress cannot compress the cache of continuous batching" in output.error


def test_graphed_decoder(llama):
    ids = prompt(1, PROMPT)
    with art_torch.patch(llama, None):
        decoder = art_torch.GraphedDecoder(llama, max_length=300)
        expected = decoder.generate(ids, 5)
        with press_of("knorm")(llama):
            with pytest.raises(NotImplementedError, match="a press has compressed"):
                decoder.prefill(ids)
            with pytest.raises(RuntimeError, match="call prefill again"):
                decoder.step(ids[:, 0])
        assert torch.equal(decoder.generate(ids, 5), expected)


def test_preallocation(llama):
    cache = art_torch.ARTCache(llama.config)
    with art_torch.patch(llama, None):
        with press_of("knorm")(llama):
            llama(prompt(1, PROMPT), past_key_values=cache)
        with pytest.raises(NotImplementedError, match="a press has compressed"):
            cache.preallocate(400)


def test_a_cache_with_a_max_length(llama):
    """Refused before anything is compressed, and a prompt without presses is welcome."""
    ids, cache = prompt(1, PROMPT), art_torch.ARTCache(llama.config, max_length=400)
    expected = generate(llama, ids)
    with art_torch.patch(llama, None):
        refused = pytest.raises(NotImplementedError, match="make the cache without max_length")
        with press_of("knorm")(llama), refused:
            llama(ids, past_key_values=cache)
        assert not any(layer.is_evicted for layer in cache.layers)
        cache.reset()
        assert_same(generate(llama, ids, cache), expected)


def test_versions(llama, monkeypatch):
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel"):
        compatible("llama").__enter__()
    monkeypatch.setattr(presses.metadata, "version", lambda _: "0.5.4")
    presses.require_kvpress.cache_clear()
    with pytest.raises(RuntimeError, match=r"kvpress must be 0\.5\.5 or newer, got 0\.5\.4"):
        compatible(llama).__enter__()
    refused = pytest.raises(RuntimeError, match="pip install --no-deps --upgrade kvpress")
    with art_torch.patch(llama, None), press_of("knorm")(llama), refused:
        llama(prompt(1, PROMPT), past_key_values=art_torch.ARTCache(llama.config))

    def missing(name):
        raise presses.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(presses.metadata, "version", missing)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps kvpress"):
        compatible(llama).__enter__()
    monkeypatch.undo()
    presses.require_kvpress.cache_clear()
    with compatible(llama):
        pass
