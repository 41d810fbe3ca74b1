"""``generate_batch`` with ART: its tokens, what the operator is given, what is restored."""

from __future__ import annotations

import inspect
import re
import threading
from contextlib import contextmanager

import pytest
import torch
from test_art_on import CRITERION, SIZES, Recorder
from test_patch import traces_of_patching
from tiny_models import LAYERS, PAD, build, prompt
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig, LlamaModel
from transformers.generation.continuous_batching import PagedAttentionCache, initialization
from transformers.models.llama import LlamaForCausalLM

import art_torch
from art_torch.integrations import continuous_batching
from art_torch.integrations.transformers import paged_step

NAMES = ["llama", "qwen3", "mistral", "gemma3", "gpt_oss"]
NEW_TOKENS = 12
PAGE = 16


def batching(**options):
    # transformers 5.17 and 5.18 call it block_size.
    names = inspect.signature(ContinuousBatchingConfig).parameters
    page_size = options.pop("page_size", PAGE)
    options["page_size" if "page_size" in names else "block_size"] = page_size
    return ContinuousBatchingConfig(**{"num_blocks": 60, "max_batch_tokens": 64} | options)


def answers(model, prompts, new_tokens=NEW_TOKENS, **options):
    persistent = options.pop("persistent_manager", False)
    config = GenerationConfig(max_new_tokens=new_tokens, eos_token_id=-1, pad_token_id=PAD)
    outputs = model.generate_batch(
        prompts,
        generation_config=config,
        continuous_batching_config=batching(**options),
        persistent_manager=persistent,
    )
    assert [output.error for output in outputs.values()] == [None] * len(prompts)
    return [output.generated_tokens for output in outputs.values()]


def generated(model, prompts, new_tokens=NEW_TOKENS):
    """One by one, by ``generate``."""
    return [
        model.generate(torch.tensor([ids]), max_new_tokens=new_tokens, do_sample=False)[
            0, len(ids) :
        ].tolist()
        for ids in prompts
    ]


def prompts_of(*lengths):
    return [prompt(1, length, seed=length)[0].tolist() for length in lengths]


class Passes:
    """Notes of each forward pass what transformers prepared for it."""

    def __init__(self, model):
        self.lens, self.caches, self.tables = [], [], []
        self.hook = model.register_forward_pre_hook(self.note, with_kwargs=True, prepend=True)

    def note(self, model, args, kwargs):
        if isinstance(kwargs.get("cache"), PagedAttentionCache):
            self.lens.append(kwargs["cu_seq_lens_q"].diff().tolist())
            self.caches.append(kwargs["cache"])
            self.tables.append(kwargs["block_table"] is not None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.hook.remove()

    @property
    def mixed(self):
        return sum(1 in lens and max(lens) > 1 for lens in self.lens)


@contextmanager
def enabled(model, criterion, **settings):
    with (
        art_torch.patch(model, criterion, **settings) as handle,
        Passes(model) as passes,
        continuous_batching.enable(handle),
    ):
        yield handle, passes


@pytest.mark.parametrize(
    ("name", "implementation"),
    # gpt_oss has no sdpa attention in transformers.
    [(name, "eager") for name in NAMES] + [(name, "sdpa") for name in NAMES if name != "gpt_oss"],
)
def test_tokens_without_a_criterion(name, implementation):
    model, prompts = build(name), prompts_of(5, 40, 100, 17, 1)
    model.set_attn_implementation(implementation)
    stock = answers(model, prompts)
    with enabled(model, None) as (handle, passes):
        got = answers(model, prompts)
    assert got == stock == generated(model, prompts)
    assert passes.mixed > 0
    assert handle.stats.layers == list(range(LAYERS))
    assert handle.stats.read_fraction() == 1.0
    assert handle.stats.exact_fallbacks == 0


def test_more_requests_than_fit(tiny):
    model = tiny("llama")
    prompts = prompts_of(60, 71, 82, 93, 104, 65, 76, 87, 98)
    expected = generated(model, prompts)
    with enabled(model, None) as (_, passes):
        assert answers(model, prompts, num_blocks=20) == expected
    assert 1 < max(map(len, passes.lens)) < len(prompts)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_shared_prefixes(tiny, name):
    model = tiny(name)
    start = prompt(1, 5 * PAGE, seed=3)[0].tolist()
    # The last one is there already but for one token.
    prompts = [[*start, 5, 6, 7], [*start, 8, 9], [*start, 5, 6, 7], [*start, 11]]
    expected = generated(model, prompts)
    with enabled(model, None) as (_, passes):
        got = answers(model, prompts, max_requests_per_batch=1)
    assert got == expected
    computed = sum(map(sum, passes.lens))
    every = sum(map(len, prompts)) + len(prompts) * (NEW_TOKENS - 1)
    # Only models without a sliding window share.
    assert computed == every if name == "gemma3" else computed <= every - 3 * 5 * PAGE + 1


def test_forked_requests(tiny):
    """Several answers to one prompt share its pages."""
    model, prompts = tiny("llama"), prompts_of(70)
    expected = generated(model, prompts)
    config = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        eos_token_id=-1,
        pad_token_id=PAD,
        num_return_sequences=3,
        do_sample=True,
        top_k=1,
    )
    with enabled(model, None) as (_, passes):
        outputs = model.generate_batch(
            prompts, generation_config=config, continuous_batching_config=batching()
        )
    assert passes.lens[-1] == [1, 1, 1]
    assert outputs  # transformers 5.17 returns the first only
    assert all(output.generated_tokens == expected[0] for output in outputs.values())


def in_pool(cache, tensor):
    pools = cache.key_cache + cache.value_cache if hasattr(cache, "key_cache") else [
        next(iter(cache.cache_allocators.values())).cache_tensor
    ]  # fmt: skip
    return tensor.untyped_storage().data_ptr() in {
        pool.untyped_storage().data_ptr() for pool in pools
    }


@pytest.mark.parametrize("walk", ["sink_recent", "oldest_first", "recent_first"])
@pytest.mark.parametrize("name", NAMES)
def test_calls_agree_with_the_reference(tiny, name, walk):
    model, recorder, problems = tiny(name), Recorder(), []

    def on_call(layer, arguments, result):
        try:  # transformers runs the model in a thread of its own
            recorder(layer, arguments, result)
            for pages in ("key_cache", "value_cache"):
                assert in_pool(passes.caches[-1], arguments[pages])
        except BaseException as error:
            problems.append(error)
            raise

    prompts = prompts_of(200, 90, 260)
    with enabled(model, CRITERION, walk=walk, on_call=on_call, **SIZES) as (handle, passes):
        answers(model, prompts, new_tokens=6)
    assert not problems
    assert passes.mixed > 0
    sliding = [
        layer
        for layer in range(LAYERS)
        if paged_step.layer_pool(passes.caches[-1], layer).window is not None
    ]
    assert (recorder.stopped > 0) == (len(sliding) < LAYERS)
    assert recorder.inside <= 0.01 * recorder.compared
    steps = sum(1 in lens for lens in passes.lens)
    assert len(recorder.calls) == steps * LAYERS
    rows = sum(lens.count(1) for lens in passes.lens)
    assert rows == 3 * 5
    read = torch.stack(
        [sum(tokens.sum(0) for n, tokens, _ in recorder.calls if n == i) for i in range(LAYERS)]
    )
    present = [sum(seen for n, _, seen in recorder.calls if n == i) for i in range(LAYERS)]
    assert torch.equal(handle.stats.tokens_read(), read)
    assert handle.stats.tokens_present().tolist() == present
    fractions = handle.stats.fractions()
    for layer in range(LAYERS):
        assert (fractions[layer] == 1.0).all() == (layer in sliding)


def test_tokens_are_those_of_generate_with_the_same_rule(tiny):
    model, prompts = tiny("llama"), prompts_of(200, 90, 260)
    with art_torch.patch(model, CRITERION, measure_mass=True, **SIZES) as alone:
        expected = generated(model, prompts)
    with enabled(model, CRITERION, measure_mass=True, **SIZES) as (together, _):
        assert answers(model, prompts) == expected
    assert torch.equal(together.stats.tokens_read(), alone.stats.tokens_read())
    assert torch.equal(together.stats.tokens_present(), alone.stats.tokens_present())
    assert (together.stats.mass_read().lowest < 1.0).all()
    torch.testing.assert_close(together.stats.mass_read().lowest, alone.stats.mass_read().lowest)
    assert expected != generated(model, prompts)


def test_nothing_is_gathered_for_decode_rows(tiny, monkeypatch):
    """transformers' own update copies all keys that a batch reads."""
    model, gathered = tiny("llama"), []
    own = PagedAttentionCache.update

    def update(self, key_states, value_states, *args, **kwargs):
        gathered.append(key_states.shape[2])
        return own(self, key_states, value_states, *args, **kwargs)

    monkeypatch.setattr(PagedAttentionCache, "update", update)
    with enabled(model, None) as (_, passes):
        answers(model, prompts_of(30, 150, 40))
    prefills = [n for lens in passes.lens for n in lens if n > 1]
    assert sum(gathered) == LAYERS * sum(prefills)
    assert all(n > 1 for n in gathered)


def test_skip_layers_and_per_layer(tiny):
    model, seen = tiny("llama"), {}

    def on_call(layer, arguments, _):
        seen.setdefault(layer, set()).add(arguments["criterion"])

    settings = {"skip_layers": [0], "per_layer": {3: None}, "on_call": on_call} | SIZES
    with enabled(model, CRITERION, **settings) as (handle, _):
        answers(model, prompts_of(300))
    assert seen == {0: {None}, 1: {CRITERION}, 2: {CRITERION}, 3: {None}}
    fractions = handle.stats.fractions()
    assert (fractions[[0, 3]] == 1.0).all()
    assert (fractions[[1, 2]] < 1.0).all()


def test_position_bias_is_left_to_the_model(caplog):
    """The operator has none. No model of transformers that batches this way passes one today."""
    model, prompts = build("llama"), prompts_of(40, 20)
    expected = generated(model, prompts)
    model.set_attn_implementation("sdpa")

    def add_bias(model, args, kwargs):
        return args, kwargs | {"position_bias": torch.zeros(1, 1, 1, 1)}

    with enabled(model, CRITERION) as (handle, passes):
        hook = model.register_forward_pre_hook(add_bias, with_kwargs=True)
        assert answers(model, prompts) == expected
        hook.remove()
    assert handle.stats.steps == 0
    assert handle.stats.exact_fallbacks == LAYERS * sum(1 in lens for lens in passes.lens)
    assert caplog.text.count("the model passes position_bias") == 1


# ---------------------------------------------------------------- as on a GPU


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_lengths_that_only_the_device_knows(tiny, monkeypatch, name):
    model, prompts = tiny(name), prompts_of(5, 40, 100, 17)
    expected = generated(model, prompts)
    monkeypatch.setattr(paged_step, "lengths_on_host", lambda inputs: False)
    with enabled(model, None) as (handle, passes):
        assert answers(model, prompts) == expected
    assert passes.mixed > 0
    assert handle.stats.read_fraction() == 1.0
    present = handle.stats.tokens_present()
    rows = [len(ids) + step for ids in prompts for step in range(1, NEW_TOKENS)]
    full = [layer for layer in range(LAYERS) if name == "llama" or layer == 2]
    assert (present[full] == sum(rows)).all()


@pytest.mark.parametrize("rule", [None, CRITERION])
def test_block_tables(tiny, monkeypatch, rule):
    """transformers makes them only where flash attention takes them."""
    model, prompts, recorder = tiny("llama"), prompts_of(5, 140, 200, 17), Recorder()
    expected = generated(model, prompts)
    monkeypatch.setattr(initialization, "ensure_decode_fast_path_is_available", lambda *_: None)
    with enabled(model, rule, on_call=recorder, **SIZES) as (handle, passes):
        got = answers(model, prompts, max_blocks_per_request=32)
    assert any(passes.tables)
    assert not all(passes.tables)
    assert (handle.stats.read_fraction() < 1.0) == (rule is not None)
    if rule is None:
        assert got == expected


def test_compiled_and_padded_batches(tiny):
    """transformers pads batches for torch.compile as for CUDA graphs."""
    model, prompts = tiny("llama"), prompts_of(5, 40)
    expected = generated(model, prompts, new_tokens=4)
    lens = []

    @torch.compiler.disable
    def note(model, args, kwargs):
        if isinstance(kwargs.get("cache"), PagedAttentionCache):
            lens.append(kwargs["cu_seq_lens_q"].diff().tolist())

    hook = model.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
    config = CompileConfig(backend="eager", mode=None, fullgraph=False, dynamic=True)
    with art_torch.patch(model, None) as handle, continuous_batching.enable(handle):
        got = answers(
            model, prompts, new_tokens=4, varlen_compile_config=config, max_requests_per_batch=3
        )
    hook.remove()
    torch._dynamo.reset()
    assert got == expected
    assert [1, 1, 0] in [row[:3] for row in lens]
    assert handle.stats.read_fraction() == 1.0


def test_block_tables_of_padded_batches():
    """In a CUDA graph, rows behind the last request have no tokens."""
    model = build("llama")
    inputs = {}

    def note(model, args, kwargs):
        if isinstance(kwargs.get("cache"), PagedAttentionCache) and not inputs:
            inputs.update(kwargs)

    model.register_forward_pre_hook(note, with_kwargs=True)
    answers(model, prompts_of(20))
    nothing = torch.tensor([0, 20, 53, 53, 53], dtype=torch.int32)
    table = torch.full((1, 4, 3), -1, dtype=torch.int32)
    table[0, 0, :2], table[0, 1] = torch.tensor([7, 9]), torch.tensor([4, 2, 5])
    batch = inputs | {
        "block_table": table,
        "position_ids": torch.zeros(1, 4, dtype=torch.int32),
        "cu_seq_lens_q": torch.tensor([0, 1, 2, 2, 2], dtype=torch.int32),
        "cu_seq_lens_k": {"full_attention": nothing},
    }
    step = paged_step.PagedStep(batch)
    rows = step.rows(paged_step.layer_pool(step.cache, 0))
    assert rows.seq_lens.tolist() == [20, 33, 0, 0]
    assert rows.slots.tolist() == [9 * PAGE + 3, 5 * PAGE, -1, -1]
    assert step.tokens is None


# ---------------------------------------------------------------- what is restored


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
        art_torch.patch(model, None, walk="guided") as handle,
        pytest.raises(ValueError, match=r'walk="guided" needs .* patch with another walk'),
    ):
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
