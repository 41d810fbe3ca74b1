"""What people do with models besides plain greedy generation, and what they do wrong."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_art_on import Recorder
from test_exact import assert_same, cache_of, generate, left_padded
from test_patch import traces_of_patching
from tiny_models import LAYERS, PAD, TINY, VOCAB, build, prompt
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.models.llama import LlamaConfig, LlamaForCausalLM

import art_torch

RULE = art_torch.Stability(d_scale=0.3, d_direction=0.1, patience=1)
# Small enough to decide inside the windows of the tiny models.
SIZES = {"num_pinned": 1, "block_size": 16, "unit_size": 8}


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<pad>": PAD} | {f"w{i}": i for i in range(1, VOCAB)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="w1", padding_side="left"
    )


def text_of(ids) -> str:
    return " ".join(f"w{i}" for i in ids.tolist())


# ---------------------------------------------------------------- assisted generation


@pytest.fixture(scope="module")
def assistant():
    return build("qwen3")


def assisted(model, ids, assistant, cache=None):
    return generate(model, ids, cache, assistant_model=assistant, max_new_tokens=30).sequences


@pytest.mark.parametrize("kind", ["art", "dynamic"])
def test_assistant_model(any_tiny, assistant, kind):
    ids = prompt(1, 90)
    expected = generate(any_tiny, ids, max_new_tokens=30).sequences
    assert torch.equal(assisted(any_tiny, ids, assistant), expected)
    with art_torch.patch(any_tiny, None):
        assert torch.equal(assisted(any_tiny, ids, assistant, cache_of(kind, any_tiny)), expected)


def test_an_assistant_that_stops_early_loses_nothing(any_tiny, assistant):
    """What it guesses is verified, by several queries at once: exactly."""
    ids = prompt(1, 390)
    expected = generate(any_tiny, ids, max_new_tokens=30).sequences
    with art_torch.patch(assistant, RULE, **SIZES) as handle:
        assert torch.equal(assisted(any_tiny, ids, assistant), expected)
    assert handle.stats.read_fraction() < 1.0


def test_verification_is_exact(any_tiny, assistant):
    """Its passes have several queries and never reach the operator, whatever the rule."""
    ids = prompt(1, 330)
    expected = generate(any_tiny, ids, max_new_tokens=30).sequences
    calls = []
    with art_torch.patch(any_tiny, RULE, on_call=lambda *call: calls.append(call), **SIZES):
        got = assisted(any_tiny, ids, assistant, art_torch.ARTCache(any_tiny.config))
    with art_torch.patch(any_tiny, RULE, **SIZES):
        alone = generate(any_tiny, ids, art_torch.ARTCache(any_tiny.config), max_new_tokens=30)
    # The last token may come from a step of its own, when there is no room for a guess.
    assert len(calls) in (0, LAYERS)
    assert torch.equal(got[:, :-1], expected[:, :-1])
    assert not torch.equal(alone.sequences[:, :-1], expected[:, :-1])


# ---------------------------------------------------------------- pipelines and streams


def test_pipeline(tiny, tokenizer):
    model = tiny("gemma2")
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    options = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    texts = [text_of(prompt(1, n, seed=n)[0]) for n in (300, 250, 40)]
    expected = pipe(texts, batch_size=3, **options)
    with art_torch.patch(model, None) as handle:
        assert pipe(texts, batch_size=3, **options) == expected
        cache = art_torch.ARTCache(model.config)
        assert pipe(texts[0], past_key_values=cache, **options) == pipe(texts[0], **options)
        cache.reset()
        assert pipe(texts, batch_size=3, past_key_values=cache, **options) == expected
    assert handle.stats.exact_fallbacks == 0
    with art_torch.patch(model, RULE, **SIZES) as handle:
        (answer,) = pipe(texts[0], past_key_values=art_torch.ARTCache(model.config), **options)
    assert len(answer["generated_text"].split()) == 12
    assert handle.stats.steps == 11
    assert handle.stats.read_fraction() < 1.0


@pytest.mark.parametrize("criterion", [None, RULE])
def test_streams(tiny, tokenizer, capsys, criterion):
    model, ids = tiny("llama"), prompt(1, 300)
    sizes = SIZES if criterion is not None else {}
    with art_torch.patch(model, criterion, **sizes):
        whole = generate(model, ids, art_torch.ARTCache(model.config)).sequences[0, 300:]
        streamer = TextStreamer(tokenizer, skip_prompt=True)
        model.generate(
            ids,
            past_key_values=art_torch.ARTCache(model.config),
            streamer=streamer,
            max_new_tokens=24,
            do_sample=False,
        )
        assert capsys.readouterr().out.split() == tokenizer.decode(whole).split()
        pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        arguments = {
            "past_key_values": art_torch.ARTCache(model.config),
            "streamer": pieces,
            "max_new_tokens": 24,
            "do_sample": False,
        }
        thread = threading.Thread(target=model.generate, args=(ids,), kwargs=arguments)
        thread.start()
        assert "".join(pieces).split() == tokenizer.decode(whole).split()
        thread.join()
    if criterion is None:
        assert torch.equal(generate(model, ids).sequences[0, 300:], whole)


def test_sampling_repeats_with_a_rule(any_tiny):
    """Without one the samples are the exact ones: test_art_cache.py."""
    ids, mask = left_padded(2, 330)
    options = {"do_sample": True, "top_p": 0.9, "max_new_tokens": 10, "attention_mask": mask}
    samples = []
    with art_torch.patch(any_tiny, RULE, **SIZES) as handle:
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            cache = art_torch.ARTCache(any_tiny.config)
            samples.append(any_tiny.generate(ids, past_key_values=cache, **options))
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])
    assert handle.stats.read_fraction() < 1.0


# ---------------------------------------------------------------- lengths and dtypes


def test_far_beyond_the_pages_of_the_prompt(any_tiny):
    """13 more pages a row; windows give theirs back on the way."""
    ids, mask = left_padded(2, 30)
    mask[1, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 200}
    expected = generate(any_tiny, ids, **options)
    cache = art_torch.ARTCache(any_tiny.config, page_size=16)
    with art_torch.patch(any_tiny, None) as handle:
        assert_same(generate(any_tiny, ids, cache, **options), expected)
    assert handle.stats.steps == 199
    for table in cache.tables.values():
        assert table.block_table.shape[1] >= 14


def test_far_beyond_the_prompt_with_a_rule(any_tiny):
    recorder = Recorder()
    with art_torch.patch(any_tiny, RULE, on_call=recorder, **SIZES):
        cache = art_torch.ARTCache(any_tiny.config, page_size=16)
        generate(any_tiny, prompt(1, 10), cache, max_new_tokens=120)
    assert recorder.stopped > 0
    assert recorder.inside <= 0.01 * recorder.compared


def forced_steps(model, ids, cache):
    """Logits of the last 20 tokens, fed one by one."""
    model(ids[:, :-20], past_key_values=cache)
    steps = [
        model(ids[:, i : i + 1], past_key_values=cache).logits.float()
        for i in range(ids.shape[1] - 20, ids.shape[1])
    ]
    return torch.cat(steps, dim=1)


@pytest.mark.parametrize("name", sorted(TINY))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(tiny, name, dtype):
    ids = prompt(2, 120)
    exact = forced_steps(tiny(name), ids, cache_of("dynamic", tiny(name)))
    model = build(name).to(dtype)
    own = forced_steps(model, ids, cache_of("dynamic", model))
    with art_torch.patch(model, None) as handle:
        got = forced_steps(model, ids, art_torch.ARTCache(model.config))
    assert handle.stats.steps == 20
    assert handle.stats.exact_fallbacks == 0
    # No further from float32 than the model's own attention in this dtype, with room for luck.
    assert (got - exact).norm() < 1.5 * (own - exact).norm()
    with art_torch.patch(model, RULE, **SIZES) as handle:
        stopping = forced_steps(model, ids, art_torch.ARTCache(model.config))
    assert stopping.isfinite().all()
    assert handle.stats.read_fraction() < 1.0


# ---------------------------------------------------------------- threads and global state


JOBS = {
    "llama": {"criterion": RULE, "walk": "sink_recent", **SIZES},
    "gemma2": {"criterion": art_torch.Stability(0.5, 0.2, 1), "walk": "guided", "block_size": 16},
    "qwen3": {"criterion": None, "walk": "oldest_first"},
}


def job(model, settings, meet=None):
    """Patches, generates and unpatches a few times."""
    results = []
    for seed in range(3):
        ids = prompt(2, 300 + 7 * seed, seed)
        if meet is not None:
            meet.wait(timeout=60)
        with art_torch.patch(model, **settings) as handle:
            got = generate(model, ids, art_torch.ARTCache(model.config), max_new_tokens=16)
        results.append((got, handle.stats.tokens_read(), handle.stats.steps))
    return results


def test_threads_with_models_of_their_own():
    built = {name: build(name) for name in JOBS}
    alone = {name: job(built[name], settings) for name, settings in JOBS.items()}
    assert alone["llama"][0][1].sum() < alone["qwen3"][0][1].sum()
    meet = threading.Barrier(len(JOBS))
    with ThreadPoolExecutor(len(JOBS)) as pool:
        running = {
            name: pool.submit(job, built[name], settings, meet) for name, settings in JOBS.items()
        }
        together = {name: future.result() for name, future in running.items()}
    for name in JOBS:
        for (got, read, steps), (wanted, wanted_read, wanted_steps) in zip(
            together[name], alone[name], strict=True
        ):
            assert_same(got, wanted)
            assert torch.equal(read, wanted_read)
            assert steps == wanted_steps == 15
        assert traces_of_patching(built[name]) == ([], [], {"eager"})


def test_threads_with_models_that_share_a_config():
    first = build("llama")
    models_ = [first] + [LlamaForCausalLM(first.config).eval() for _ in range(3)]
    settings = [{"criterion": None}, {"criterion": RULE, **SIZES}] * 2
    alone = [job(model, each) for model, each in zip(models_, settings, strict=True)]
    meet = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(job, models_, settings, [meet] * 4))
    for got, wanted in zip(together, alone, strict=True):
        for a, b in zip(got, wanted, strict=True):
            assert_same(a[0], b[0])
            assert torch.equal(a[1], b[1])
    assert first.config._attn_implementation == "eager"


def fail_at_step(step):
    calls = []

    def processor(_, scores):
        calls.append(scores)
        if len(calls) == step:
            raise KeyError("mine")
        return scores

    return LogitsProcessorList([processor])


@pytest.mark.parametrize("walk", ["sink_recent", "guided"])
@pytest.mark.parametrize("step", [1, 4])  # after the prompt, after a decode step
def test_nothing_is_left_of_a_generation_that_fails(tiny, walk, step):
    first, second = tiny("llama"), tiny("gemma2")
    ids = prompt(1, 300)
    expected = [generate(model, ids) for model in (first, second)]
    with art_torch.patch(first, None):  # registers the name once
        pass
    registered = [dict(table()) for table in (AttentionInterface, AttentionMaskInterface)]
    before = [traces_of_patching(model) for model in (first, second)]
    settings = first.generation_config.to_dict()
    cache = art_torch.ARTCache(first.config)
    with (
        pytest.raises(KeyError, match="mine"),
        art_torch.patch(first, RULE, walk, block_size=16),
        art_torch.patch(second, RULE, **SIZES),
    ):
        generate(first, ids, cache, logits_processor=fail_at_step(step))
    assert [traces_of_patching(model) for model in (first, second)] == before
    assert [dict(table()) for table in (AttentionInterface, AttentionMaskInterface)] == registered
    assert first.generation_config.to_dict() == settings
    for model, wanted in zip((first, second), expected, strict=True):
        got = generate(model, ids)
        assert torch.equal(got.sequences, wanted.sequences)
        assert all(map(torch.equal, got.logits, wanted.logits))
    # The passes themselves were complete: the cache is as good as before.
    assert cache.get_seq_length() == 299 + step
    cache.crop(-step)
    with art_torch.patch(first, None):
        assert torch.equal(generate(first, ids, cache).sequences, expected[0].sequences)


# ---------------------------------------------------------------- bad use


def wider(**changes):
    config = LlamaConfig(**build("llama").config.to_diff_dict() | changes)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("one", "other"), [("mistral", "llama"), ("llama", "mistral"), ("gemma2", "llama")]
)
def test_a_cache_of_a_model_with_other_windows(tiny, one, other):
    cache, model = art_torch.ARTCache(tiny(one).config), tiny(other)
    fix = r"made for another model, .* use ARTCache\(model\.config\)"
    with art_torch.patch(model, None), pytest.raises(ValueError, match=fix):
        model(prompt(1, 20), past_key_values=cache)


def test_a_cache_of_a_model_with_other_layers(tiny):
    model, cache = tiny("llama"), art_torch.ARTCache(tiny("llama").config)
    deeper = wider(num_hidden_layers=6)
    with (
        art_torch.patch(deeper, None),
        pytest.raises(ValueError, match="made for another model"),
    ):
        deeper(prompt(1, 20), past_key_values=cache)
    with art_torch.patch(model, None), pytest.raises(ValueError, match="made for another model"):
        model(prompt(1, 20), past_key_values=art_torch.ARTCache(deeper.config))


@pytest.mark.parametrize("change", [{"num_key_value_heads": 4}, {"head_dim": 64}])
@pytest.mark.parametrize("tokens", [0, 20])
def test_a_cache_of_a_model_with_other_heads(tiny, change, tokens):
    model, other = tiny("llama"), wider(**change)
    cache = art_torch.ARTCache(model.config)
    with art_torch.patch(model, None), art_torch.patch(other, None):
        if tokens:
            model(prompt(1, tokens), past_key_values=cache)
        with pytest.raises(ValueError, match=r"made for another model, .* other .* KV heads"):
            other(prompt(1, 1), past_key_values=cache)


def test_a_cache_that_holds_keys_of_other_heads(tiny):
    """As a rank of a tensor-parallel model and the whole one, which have the same config."""
    model = tiny("llama")
    cache = art_torch.ARTCache(model.config)
    other = wider(num_key_value_heads=4)
    other.config.num_key_value_heads = 2
    with art_torch.patch(model, None), art_torch.patch(other, None):
        model(prompt(1, 20), past_key_values=cache)
        with pytest.raises(
            ValueError, match=r"holds 2 KV heads of 32 .* have 4 of 32: .* ARTCache\(model"
        ):
            other(prompt(1, 1), past_key_values=cache)


def test_a_model_that_moves_to_another_device():
    model = build("llama")
    cache = art_torch.ARTCache(model.config)
    with art_torch.patch(model, None):
        model(prompt(1, 20), past_key_values=cache)
        model.to("meta")
        with pytest.raises(ValueError, match="pages are on cpu, and these keys are on meta; make"):
            model(torch.zeros(1, 1, dtype=torch.long, device="meta"), past_key_values=cache)


def test_layers_on_different_devices():
    model = build("llama")
    for layer in model.model.layers[2:]:
        layer.to("meta")
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: torch.utils._pytree.tree_map_only(
                torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs)
            ),
            with_kwargs=True,
        )
    with (
        art_torch.patch(model, None),
        pytest.raises(ValueError, match=r"lives on one device: .* use a DynamicCache"),
    ):
        model(prompt(1, 20), past_key_values=art_torch.ARTCache(model.config))
